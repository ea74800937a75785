"""Values that pass between the stages: layers, plans, losses, recipes; without models or torch."""

"""Values that pass between the stages: layers, plans, losses, recipes.

They know no model and no torch.
"""

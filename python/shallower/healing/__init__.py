"""Healing of a cut: in closed form, and by training low-rank adapters (QLoRA)."""

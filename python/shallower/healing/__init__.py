"""Healing of a cut by training low-rank adapters (QLoRA)."""

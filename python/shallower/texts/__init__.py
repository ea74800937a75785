"""Texts: their sources, token batches, and training sequences."""

"""Measures of a model: the held-out loss."""

"""Cuts compared by what they cost."""

"""Healing in closed form, and by a few steps."""

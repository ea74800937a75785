"""Repair of a cut in closed form, then by a few gradient steps."""

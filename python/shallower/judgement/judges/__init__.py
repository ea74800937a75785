"""Judges: what a cut is worth, item by item. ``JUDGES`` is the table of them."""

"""Figures of results, drawn by matplotlib: one panel and one idea each, in the look of the page."""

"""Adapters folded into weights, and checked."""

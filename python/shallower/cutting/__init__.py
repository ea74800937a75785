"""Cuts: layers removed in memory, on disk and from GGUF files, and what lies beside a cut."""

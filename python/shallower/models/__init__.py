"""Models: loading them, finding their layers, knowing them again."""

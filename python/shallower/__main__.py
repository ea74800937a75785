"""``python -m shallower``."""

from .cli import main

main()

"""The words of a command line of this package, as cards and pages print it."""

import shlex
from collections.abc import Mapping
from typing import Any


def command_line(*words: str) -> str:
    """Write a command of this package for a shell."""
    return shlex.join(("shallower", *words))


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Write options by their names in Python for a shell; what is None or False is left out."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def shell_lines(command: str) -> str:
    """Break a long command line before its options."""
    if len(command) <= 64:
        return command
    breaks = (" \\\n    " if word.startswith("--") else " " for word in shlex.split(command)[1:])
    first, *words = map(shlex.quote, shlex.split(command))
    return first + "".join(map("".join, zip(breaks, words, strict=True)))

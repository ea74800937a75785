"""Where a result comes from: versions of packages, hashes of content, words of a command."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("shallower", "torch", "transformers", "peft", "bitsandbytes", "numpy")


LM_EVAL = "lm_eval"
"""The package that defines the questions of a task, and the scores of its answers."""


def versions(*more: str) -> dict[str, str]:
    """Versions by name of the installed packages that decide a result, and of ``more``."""
    found = {package: _version(package) for package in (*PACKAGES, *more)}
    return {package: one for package, one in found.items() if one is not None}


@cache
def _version(package: str) -> str | None:
    """The version of a package, read from its files once; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hash_of(value: Any) -> str:
    """The SHA-256 of a JSON value, in hexadecimal, whatever the order of its keys."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=lambda inside: inside.to_json()
    )
    return hashlib.sha256(text.encode()).hexdigest()


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

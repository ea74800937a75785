"""Versions of the packages that make a result."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("shallower", "torch", "transformers", "peft", "bitsandbytes", "numpy")


LM_EVAL = "lm_eval"
"""The package that defines the questions of a task, and the scores of its answers."""


def versions(*more: str) -> dict[str, str]:
    """Versions by name of the installed packages that decide a result, and of ``more``."""
    found = {package: _version(package) for package in (*PACKAGES, *more)}
    return {package: one for package, one in found.items() if one is not None}


def forward_versions() -> dict[str, str]:
    """Versions by name of the packages that a forward depends on, and what is made of it."""
    found = versions()
    return {package: found[package] for package in ("shallower", "torch", "transformers")}


@cache
def _version(package: str) -> str | None:
    """The version of a package, read from its files once; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

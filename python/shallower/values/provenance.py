"""Versions of the packages that make a result."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("shallower", "torch", "transformers", "peft", "bitsandbytes", "numpy")


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

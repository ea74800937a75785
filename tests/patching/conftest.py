"""Cut and healed models."""

from tests.healing.conftest import both, cut, healed, patchable

__all__ = ["both", "cut", "healed", "patchable"]

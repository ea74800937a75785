"""Cut and healed models."""

from tests.healing.conftest import both, cut, healed, patchable, smol_cut

__all__ = ["both", "cut", "healed", "patchable", "smol_cut"]

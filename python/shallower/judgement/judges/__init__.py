"""Judges: what a cut is worth, item by item. ``JUDGES`` is the table of them."""

from .judge import Judge
from .kl import KLJudge
from .loss import LossJudge
from .options import OptionsJudge

JUDGES: dict[str, type[Judge]] = {judge.name: judge for judge in (LossJudge, KLJudge, OptionsJudge)}
"""Every judge by its name, as ``--judge`` names it."""

"""The criteria, a file and a row each."""

from ..criterion import Criterion

CRITERIA: dict[str, Criterion] = {}
"""Every criterion by its name; one that is put in here takes part like any other."""

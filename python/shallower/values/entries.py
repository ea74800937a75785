"""Entries of a store of results, as those who write and read them see it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ..errors import CacheError, LayersError, PlanError, ScanError

Value = TypeVar("Value")


class TrialJournal(Protocol):
    """Records of trials that outlive the process."""

    def read(self) -> Sequence[dict[str, Any]]:
        """Give all records that were appended, by this process or one before it."""

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which is there whole after any death, or not at all."""


class ResultStore(Protocol):
    """Results of one model that outlive the process."""

    def get(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Give what was put under the same kind and inputs; None if there is nothing."""

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep a result, whole or not at all."""

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> TrialJournal | None:
        """Open a journal; None if nothing is kept."""


def recalled(read: Callable[[dict[str, Any]], Value], known: dict[str, Any], what: str) -> Value:
    """Read a value that the store holds; a CacheError says that it is damaged."""
    try:
        return read(known)
    except (KeyError, TypeError, ValueError, LayersError, PlanError, ScanError) as error:
        raise CacheError(
            f"{what} in the store is damaged ({error}): remove it (shallower cache --clear), or "
            f"make it anew (--no-cache)"
        ) from error


def recall(journal: TrialJournal | None, take: Callable[[dict[str, Any]], None], what: str) -> None:
    """Read the records of a journal, if there is one; a CacheError names one that is damaged."""
    for number, record in enumerate(() if journal is None else journal.read()):
        recalled(take, record, f"record {number} of the {what}")

"""Losses of a test set, kept batch by batch, so that every command finds what another measured."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..models.source import ModelSource
from ..results.scores import Scores
from ..values.entries import ResultStore, TrialJournal
from ..values.plan import Gone
from ..values.schema import of_type

if TYPE_CHECKING:
    from .batches import AllBatches


Stores = Callable[[ModelSource], ResultStore]
"""Gives the results of a model that the store has."""


def unkept(_: ModelSource) -> ResultStore:
    """Give results of a model that nobody keeps."""
    return UnsavedResults()


def recorded(
    gone: Gone, look: int, *, sums: NDArray[np.float64], seconds: float, vocab_size: int
) -> dict[str, Any]:
    """Give a trial as its record, what goes as :func:`cut_of` reads it."""
    layers = sorted(one for one in gone if isinstance(one, int))
    experts = sorted(one for one in gone if isinstance(one, tuple))
    found = {"look": look, "sums": sums.tolist(), "seconds": seconds, "vocab_size": vocab_size}
    return {"dropped": layers, **({"experts": experts} if experts else {}), **found}


def layers_of(record: Any, num_layers: int) -> frozenset[int]:
    """Read the layers that a record drops; ValueError for what is none."""
    layers = [of_type(int, layer) for layer in of_type(list, of_type(dict, record)["dropped"])]
    if layers != sorted(set(layers) & set(range(num_layers))):
        raise ValueError(f"layers {layers} of {num_layers}")
    return frozenset(layers)


def cut_of(record: Any, num_layers: int) -> Gone:
    """Read what a record drops; ValueError for what is none."""
    layers = layers_of(record, num_layers)
    pairs = of_type(list, record.get("experts", []))
    experts = ((of_type(int, layer), of_type(int, expert)) for layer, expert in pairs)
    return frozenset([*layers, *experts])


def look_of(record: dict[str, Any], num_looks: int) -> int:
    """Read the batch of a record; ValueError for what is none."""
    index = of_type(int, record["look"])
    if not 0 <= index < num_looks:
        raise ValueError(f"look {index} of {num_looks}")
    return index


def seconds_of(record: dict[str, Any]) -> float:
    """Read how long a record took; ValueError for what is no time."""
    seconds = of_type(float, record["seconds"])
    if not 0 <= seconds < math.inf:
        raise ValueError(f"it took {seconds} seconds")
    return seconds


def sums_of(record: dict[str, Any], num_items: int) -> NDArray[np.float64]:
    """Read the scores of a record, (B,); ValueError for others than are expected."""
    sums = [of_type(float, value) for value in of_type(list, record["sums"])]
    if len(sums) != num_items:
        raise ValueError(f"{len(sums)} scores of {num_items} items")
    if not all(map(math.isfinite, sums)):
        raise ValueError("a score is not finite")
    return np.array(sums)


def cut_journal(
    store: ResultStore, items: str, judged_by: Mapping[str, Any]
) -> TrialJournal | None:
    """Open the records of a model's cuts as they are, on the batches of some items."""
    return store.journal("trials", {"state": "cut", "items": items, **judged_by})


def loss_journal(store: ResultStore, test_set: "AllBatches") -> TrialJournal | None:
    """Open the records of losses on a test set, which is identified by its token ids alone."""
    judged_by = {"judge": "loss", "looks": [len(batch) for batch in test_set.batches]}
    return cut_journal(store, test_set.fingerprint, judged_by)


class UnsavedResults:
    """Losses of a model that is saved later, to be found by whoever loads it then."""

    def __init__(self) -> None:
        self._journals: list[tuple[str, Mapping[str, Any], _Records]] = []

    def get(self, _kind: str, _inputs: Mapping[str, Any]) -> None:
        """Find nothing."""

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep nothing but losses."""

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> TrialJournal:
        """Open records in memory."""
        self._journals.append((kind, inputs, records := _Records()))
        return records

    def add(self, test_set: "AllBatches", scores: Scores, vocab_size: int) -> None:
        """Add a loss that was measured otherwise, to the same bits."""
        journal = loss_journal(self, test_set)
        assert journal is not None
        for look, batch in enumerate(test_set.numbered):
            sums = scores.sums[batch.samples]
            how: Any = {"sums": sums, "seconds": 0.0, "vocab_size": vocab_size}
            journal.append(recorded(frozenset(), look, **how))

    def keep(self, stores: Stores, source: ModelSource, dtype: str) -> None:
        """Keep the records for the model, now that it is saved in ``dtype`` at ``source``.

        They are found by that dtype, and by ``auto`` where this machine would load it so.
        """
        for name in dict.fromkeys((dtype, "auto")):
            given: Any = name
            model = replace(source, dtype=given)
            if str(model.resolved().dtype) != dtype:
                continue
            store = stores(model)
            for kind, inputs, records in self._journals:
                if (journal := store.journal(kind, inputs)) is not None:
                    for record in records:
                        journal.append(record)


class _Records(list[dict[str, Any]]):
    """Records in memory."""

    def read(self) -> "_Records":
        """Give all records."""
        return self

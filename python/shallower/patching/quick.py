"""A patch quick enough to be made for every cut that is compared: one matrix a block.

The last matrix of the feed-forward before each block is solved anew (:func:`shallower.patch`): the
stream jumps to x^(stop) of the whole model. What takes time there is left out: no loss is measured
to choose by, and nothing behind the cut is solved. The whole model runs once for all cuts.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch

from ..errors import PatchError, TextsError
from ..memory.budget import BUDGET
from ..models.layerwise import Layerwise
from ..models.offload import resident
from ..models.residual_writers import Writer, find_writers
from ..storage import check_temporary
from ..texts.batches import Batch
from ..values.counts import counted
from ..values.layers import blocks_of
from ..values.plan import Plan
from .checkpoint import Changes
from .least_squares import NormalEquations
from .states import (
    FARTHEST,
    Spool,
    missing_equations,
    no_layer_before,
    no_writer,
    not_finite,
)

RIDGES = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
"""Penalties that are tried, as shares of the inputs' mean square, until one is worse."""

HELD = 4
"""Every fourth text is held out while the ridge is chosen; then all are fitted."""


_Paired = tuple[list[Spool], Spool]
"""The whole model's states on batches, one more than it has layers, and a cut's."""


class QuickPatch:
    """Quick patches of cuts of one model, on the same texts: a few thousand tokens.

    The whole model runs once, at the first patch. Its states, ``(L+1)·tokens·D`` values in its
    dtype, lie in ``room`` bytes of memory, by default what the budget has left, or in a temporary
    file.
    """

    def __init__(
        self,
        model: Layerwise,
        batches: Sequence[Batch],
        *,
        room: int | None = None,
    ) -> None:
        self._model, self._room = model, room
        self._divided = _divide(batches)
        self._probe = self._divided[0][0].split(1)[0]
        self._writers: dict[int, Writer | None] = {}

    @cached_property
    def _parts(self) -> list[_Paired]:
        """The whole model's states on the texts to fit and on those held out, made once."""
        model = self._model
        model.check(self._probe)
        sample = model.embed(self._probe)
        width, dtype = sample.shape[-1], sample.dtype
        tokens = sum(batch.input_ids.size for part in self._divided for batch in part)
        taken = (len(model) + 1) * tokens * width * dtype.itemsize
        room = self._room
        on_disk = taken > room if room is not None else not BUDGET.reserve(self, taken)
        if on_disk:
            check_temporary(taken + taken // (len(model) + 1))

        def stored(part: Sequence[Batch]) -> Spool:
            return Spool(part, width, dtype, on_disk=on_disk)

        parts = [
            ([stored(part) for _ in range(len(model) + 1)], stored(part)) for part in self._divided
        ]
        with torch.no_grad():
            self._run_whole(parts)
        return parts

    @property
    def num_texts(self) -> int:
        """The texts that it is fitted on."""
        return sum(len(batch) for part in self._divided for batch in part)

    @property
    def settings(self) -> dict[str, Any]:
        """What a patch depends on beside the model and the texts, as plain JSON values."""
        return {
            "patch": "quick",
            "num_texts": self.num_texts,
            "ridges": list(RIDGES),
            "farthest": FARTHEST,
            "held": HELD,
        }

    @contextmanager
    def patched(self, plan: Plan) -> Iterator[dict[int, float]]:
        """Patch the model, bit for bit as before after the body, which leaves out the layers.

        Gives each layer that was solved with its ridge, a share of its inputs' mean square.
        """
        changes = Changes()
        try:
            try:
                with torch.no_grad():
                    ridges = dict(self._solve(Plan.of(len(self._model), plan), changes))
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error) from error
            yield ridges
        finally:
            changes.undo()

    @property
    def bytes_of_cut(self) -> int:
        """Bytes of a cut's states on the texts, on which the whole model has run first."""
        return sum(cut.nbytes for _, cut in self._parts)

    @torch.no_grad()
    def run_cut(
        self, plan: Plan, batches: Sequence[Batch], starts: Callable[[], list[torch.Tensor]]
    ) -> Generator[int, None, list[torch.Tensor]]:
        """Run a patched cut on batches layer by layer, as a job of :meth:`Layerwise.in_step`.

        ``starts`` gives the states of the batches before the first layer that changes. Returns
        those behind the last layer. A weight is what it was before the next layer is requested, so
        that other cuts may use the same ones.
        """
        first, _ = _solved(plan)
        changes, states = Changes(), list[torch.Tensor]()
        solving = self._solve(plan, changes, by_layer=True)
        for layer in (layer for layer in plan.survivors if layer >= first):
            yield layer
            states = states or starts()
            try:
                next(solving)
                for index, batch in enumerate(batches):
                    states[index] = self._model.run(batch, states[index], (layer,)).cpu()
            finally:
                changes.undo()
        return states

    def _run_whole(self, parts: Sequence[_Paired]) -> None:
        for whole, _ in parts:
            for index, batch in enumerate(whole[0].batches):
                whole[0][index] = self._model.embed(batch)
        for layer in self._model.one_by_one(range(len(self._model))):
            for whole, _ in parts:
                self._advance(whole[layer], whole[layer + 1], (layer,))

    def _advance(self, before: Spool, after: Spool, layers: Sequence[int]) -> None:
        for some in self._model.passes(layers):
            for index, batch in enumerate(after.batches):
                after[index] = self._model.run(batch, before[index], some)
            before = after

    def _solve(
        self, plan: Plan, changes: Changes, *, by_layer: bool = False
    ) -> Iterator[tuple[int, float]]:
        """Solve the matrix before each block, the next one from states of what has changed so far.

        Gives each layer that is solved with its ridge; ``by_layer`` each from the first of them on,
        while it is as solved: then it may change back, and other cuts may be solved meanwhile.
        """
        first, after = _solved(plan)
        cuts, stretches = [whole[first] for whole, _ in self._parts], list[list[int]]()
        for layer in (layer for layer in plan.survivors if layer >= first):
            if by_layer or layer in after:
                stretches.append([])
            stretches[-1].append(layer)
        for layer, *more in stretches:
            ridge = math.nan
            if layer in after:
                aims = [whole[after[layer]] for whole, _ in self._parts]
                ridge = self._fit(layer, aims, cuts, changes)
            if layer < max(after):
                if layer == first:
                    moved = [cut.like() if by_layer else cut for _, cut in self._parts]
                for before, behind in zip(cuts, moved, strict=True):
                    self._advance(before, behind, (layer, *more))
                cuts = moved
            yield layer, ridge

    def _fit(
        self, layer: int, aims: Sequence[Spool], cuts: Sequence[Spool], changes: Changes
    ) -> float:
        """Solve the last matrix of a layer; returns the ridge that was chosen."""
        with resident(self._model.modules[layer]):
            writer = self._writer(layer)
            fitted, held = (
                missing_equations(self._model, layer, (writer,), whole=whole, cut=cut)
                for whole, cut in zip(aims, cuts, strict=True)
            )
            ridge, scale = _best_ridge(fitted, held), fitted.scale
            fitted.join(held)  # more tokens outweigh the same penalty
            changes.add(writer, _solution(fitted, ridge * scale).div_(writer.scale))
        return ridge

    def _writer(self, layer: int) -> Writer:
        if layer not in self._writers:
            whole, _ = self._parts[0]
            states = whole[layer][0][:1, : self._probe.input_ids.shape[1]]
            found = find_writers(self._model, layer, batch=self._probe, states=states)
            self._writers[layer] = found.feed_forward
        writer = self._writers[layer]
        if writer is None:
            raise no_writer(layer)
        return writer


def out_of_memory(error: torch.OutOfMemoryError) -> PatchError:
    """The error for texts whose forward finds no memory, with its cause."""
    found = PatchError(
        "there is not enough memory to patch with so many texts in one forward: lower batch_size "
        "(--batch-size)",
        see="streaming",
    )
    found.__cause__ = error
    return found


def _solved(plan: Plan) -> tuple[int, dict[int, int]]:
    """The first layer that is solved, and of each the state that it is to reach."""
    blocks = blocks_of(plan.dropped)
    if blocks[0].start == 0:
        raise no_layer_before(blocks[0])
    return blocks[0].start - 1, {block.start - 1: block.stop for block in blocks}


def _divide(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Texts to fit, and those that are held out while the ridge is chosen."""
    numbers = count()
    parts: tuple[list[Batch], list[Batch]] = [], []
    for batch in batches:
        held = np.array([next(numbers) % HELD == 1 for _ in range(len(batch))], dtype=bool)
        for part, texts in zip(parts, (~held, held), strict=True):
            if texts.any():
                chosen = replace(
                    batch,
                    input_ids=batch.input_ids[texts],
                    attention_mask=batch.attention_mask[texts],
                    samples=batch.samples[texts],
                )
                part.append(chosen)
    if not parts[1]:
        raise TextsError(
            f"{counted(next(numbers), 'text')}, too few to patch with: give at least 2, better "
            f"16 or more"
        )
    return parts


def _solution(equations: NormalEquations, penalty: torch.Tensor) -> torch.Tensor:
    return equations.solve(1.0, penalty.expand(len(equations.gram)), kept_weight=1.0)


def _best_ridge(fitted: NormalEquations, held: NormalEquations) -> float:
    """The ridge whose map leaves the least of what the texts that are held out miss."""
    best, least = math.nan, math.inf
    for ridge in RIDGES:
        error = held.error_of(_solution(fitted, ridge * fitted.scale))
        if not error < least:
            break
        best, least = ridge, error
    if math.isinf(least):
        raise not_finite()
    return best

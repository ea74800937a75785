"""The solver of a patch: layer by layer, both models side by side, matrices solved anew."""

import math
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..errors import PatchError
from ..evaluation.loss import summed_losses
from ..models.layerwise import Layerwise
from ..models.offload import resident, stored_weight
from ..models.residual_writers import Writer, Writers, find_writers
from ..progress import Advance, track
from ..texts.batches import Batch
from ..values.patch import Fit, Patch
from ..values.plan import Plan
from .changes import Changes
from .descent import PASSES, STEPS, Descent, drawn, least
from .held_out import FIRST_RIDGE, Choice, HeldOut, choose
from .least_squares import NormalEquations
from .missing import missing_equations, missing_rows, no_writer, not_finite
from .states import StateSet, Stored, other_rows

FIRST_WEIGHTS = (0.01, 0.001, 0.1, 1.0)
"""Weights that are tried for the first token of a text, which carries massive activations."""

ATTENTION_STEP = 0.5
"""The part of its share of a jump that the attention is given; the feed-forward, whose inputs
change with it, is then solved for all that is left."""


class Patching:
    """The work on one model: both models' states advance layer by layer, side by side.

    Args:
        model: the whole model.
        plan: the plan of the cut.
        fitted: batches to fit.
        held_out: batches to choose on.
        changes: are filled with every weight that changes, and its old value.
        progress: whether to show a bar on standard error.
    """

    def __init__(
        self,
        model: Layerwise,
        plan: Plan,
        fitted: Sequence[Batch],
        held_out: Sequence[Batch],
        changes: Changes,
        progress: bool | None,
    ) -> None:
        self.model, self.plan, self.changes, self.progress = model, plan, changes, progress
        self._batches = fitted, held_out
        self.survivors = plan.survivors
        self.first_weight, self.ridge = FIRST_WEIGHTS[0], FIRST_RIDGE
        self._ran: Advance = _unheard

    def __enter__(self) -> "Patching":
        self.model.check(self._batches[1][0])
        self._folder = tempfile.TemporaryDirectory(prefix="shallower-")
        self._path = Path(self._folder.name)
        sample = self.model.embed(self._batches[0][0])
        self._kind = sample.shape[-1], sample.dtype
        self.fitted, self.held_out = (
            StateSet(
                batches,
                Stored(self._path / f"{name}.whole", batches, *self._kind),
                Stored(self._path / f"{name}.cut", batches, *self._kind),
            )
            for name, batches in zip(("fitted", "held_out"), self._batches, strict=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def solve(self, method: str) -> Patch:
        """Solve the layers before the blocks; for ``refit``, all go on down from there.

        Args:
            method: ``refit`` or ``map``.

        Returns:
            The record of the patch.

        Raises:
            PatchError: the layer before a block does not write by a plain linear map.
        """
        first = self.plan.blocks[0].start - 1
        after = {block.start - 1: block.stop for block in self.plan.blocks}
        last = max(after)
        self._embed()
        fits = []
        with track("patch", self._batch_layers(method), self.progress) as self._ran:
            self._advance_whole(0, first)
            self._copy_whole()
            if method == "refit":
                self._keep_start()
            original, cut = self._loss(first, range(first, len(self.model))), self._loss(first)
            for layer in self.survivors[first:]:
                target = after.get(layer, layer + 1)
                self._ran(0, f"layer {layer}")
                self._advance_whole(layer, target)
                if layer in after:
                    fits.append(self._fit(layer, target, method))
                if layer == last:
                    break
                self._advance_cut(layer)
            nats = fits[-1].nats
            descent = self._descend(first, after[last], nats) if method == "refit" else ()
        nats = min((nats, *descent))
        return self._done(method, original, cut, nats, fits=tuple(fits), descent=descent)

    def magnitude(self) -> Patch:
        """Divide everything that is written after a block by the growth of the norms across it.

        A norm stands before each reader of the stream, so that this is the same as to multiply
        the stream itself, and the embeddings stay.

        Returns:
            The record of the patch.

        Raises:
            PatchError: a layer does not write by two plain linear maps.
        """
        norms = self._norms()
        original, cut = self._loss(0, range(len(self.model))), self._loss(0, self.survivors)
        scales = tuple(norms[block.stop] / norms[block.start] for block in self.plan.blocks)
        batch, factor = self.held_out.batches[0], 1.0
        hidden = self.model.embed(batch)
        for layer in self.survivors:
            passed = [s for b, s in zip(self.plan.blocks, scales, strict=True) if b.stop <= layer]
            factor = math.prod(passed)
            with resident(self.model.modules[layer]):
                if factor != 1.0:
                    self._divide(layer, factor, batch, hidden)
                hidden = self.model.run(batch, hidden, (layer,))
        return self._done("magnitude", original, cut, self._loss(0, self.survivors), scales=scales)

    def _norms(self) -> dict[int, float]:
        """The sums of the states' norms at both ends of every block; the embeddings are kept."""
        places = sorted({p for block in self.plan.blocks for p in (block.start, block.stop)})
        sums: dict[int, torch.Tensor] = {}
        self._embed()
        for at, place in zip((0, *places), places, strict=False):
            self._advance_whole(at, place)
            for states in (self.fitted, self.held_out):
                for index, batch in enumerate(states.batches):
                    hidden = other_rows(batch, states.whole[index])
                    _add_to(sums, place, hidden.float().norm(dim=-1))
        return {place: float(total) for place, total in sums.items()}

    def _divide(self, layer: int, factor: float, batch: Batch, hidden: torch.Tensor) -> None:
        """Divide what a layer writes into the residual stream."""
        writers = find_writers(self.model, layer, batch=batch, states=hidden)
        for writer in self._both(layer, writers):
            for name, _ in writer.module.named_parameters(recurse=False):
                stored = stored_weight(writer.module, name)
                self.changes.change(writer.module, name, stored / factor)

    def _both(self, layer: int, writers: Writers) -> tuple[Writer, Writer]:
        if writers.attention is None or writers.feed_forward is None:
            raise PatchError(
                f"layer {layer} does not write into the residual stream by two plain linear maps, "
                f"which the method magnitude scales"
            )
        return writers.attention, writers.feed_forward

    def _done(self, method: str, original: float, cut: float, patched: float, **more: Any) -> Patch:
        fitted, held_out = (
            sum(int(batch.attention_mask.sum()) for batch in batches) for batches in self._batches
        )
        return Patch(self.plan, method, fitted, held_out, original, cut, patched, **more)

    def _batch_layers(self, method: str) -> int:
        """Batches times the layers that run on them, at most; a head counts as a layer."""
        fitted, held_out = map(len, self._batches)
        blocks, count = self.plan.blocks, len(self.model)
        first, stop = blocks[0].start - 1, blocks[-1].stop
        passes = 2 if method == "refit" else 1
        before, later = bisect_left(self.survivors, first), bisect_left(self.survivors, stop)
        total = (stop + later - before - 1 + passes * len(blocks)) * (fitted + held_out)
        losses = [count - first, len(self.survivors) - before]
        at = (bisect_left(self.survivors, block.start - 1) for block in blocks)
        losses += [len(self.survivors) - index for index in at]
        if method == "refit":
            steps = drawn(self.fitted.batches)
            down = sum(map(len, steps))
            total += down * (count - stop)
            passes_down = min(STEPS, PASSES * len(steps)) / len(steps)
            total += int(down * passes_down * (2 * (len(self.survivors) - before) + 1))
            losses += [len(self.survivors) - before] * 2
        return total + held_out * (sum(losses) + len(losses))

    def _embed(self) -> None:
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                states.whole[index] = states.cut[index] = self.model.embed(batch)

    def _copy_whole(self) -> None:
        for states in (self.fitted, self.held_out):
            for index in range(len(states.batches)):
                states.cut[index] = states.whole[index]

    def _advance_whole(self, layer: int, target: int) -> None:
        for states in (self.fitted, self.held_out):
            self._advance(states, states.whole, range(layer, target))

    def _advance_cut(self, layer: int) -> None:
        for states in (self.fitted, self.held_out):
            self._advance(states, states.cut, (layer,))

    def _advance(
        self,
        states: StateSet,
        moved: Stored,
        layers: Sequence[int],
        indices: Iterable[int] | None = None,
    ) -> None:
        indices = range(len(states.batches)) if indices is None else list(indices)
        for some in self.model.passes(layers):
            for index in indices:
                moved[index] = self.model.run(states.batches[index], moved[index], some)
                self._ran(len(some))

    def _keep_start(self) -> None:
        """Keep the states before the first layer that changes, of the texts to go down on and of
        those held out.
        """
        self._starts = []
        for name, states, indices in (
            ("fitted", self.fitted, self._down),
            ("held_out", self.held_out, range(len(self.held_out.batches))),
        ):
            start = Stored(self._path / f"{name}.start", states.batches, *self._kind)
            for index in indices:
                start[index] = states.whole[index]
            self._starts.append(start)

    def _descend(self, first: int, stop: int, nats: float) -> tuple[float, ...]:
        """Go down the slopes of the divergence, as far as the held-out loss falls.

        The states of the whole model are before the layer ``stop``; no layer from there on has
        changed.
        """
        if not self.model.head.by_rows:
            return ()
        self._advance(self.fitted, self.fitted.whole, range(stop, len(self.model)), self._down)
        fitted, held_out = self._starts
        states = StateSet(self.fitted.batches, self.fitted.whole, fitted)
        layers = [layer for layer in self.survivors if layer >= first]
        self._ran(0, "all layers")
        descent = Descent(self.model, layers, states=states, changes=self.changes, ran=self._ran)
        descent.go()
        reached = least(descent, lambda: self._loss(first, states=held_out), nats)
        return (reached,) if reached < nats else ()

    @cached_property
    def _down(self) -> list[int]:
        """The batches to go down on."""
        return sorted({index for step in drawn(self.fitted.batches) for index in step})

    def _fit(self, layer: int, target: int, method: str) -> Fit:
        """Solve a layer's matrices for the whole model's state; the best of a few choices."""
        with resident(self.model.modules[layer]):
            return self._best_fit(layer, target, method)

    def _best_fit(self, layer: int, target: int, method: str) -> Fit:
        batch = self.held_out.batches[0]
        writers = find_writers(self.model, layer, batch=batch, states=self.held_out.cut[0])
        feed_forward = writers.feed_forward
        if feed_forward is None:
            raise no_writer(layer)
        changed, missing = [feed_forward.name], None
        if method == "refit" and writers.attention is not None:
            missing = self._give_attention_its_share(layer, writers.attention, feed_forward)
            changed.insert(0, writers.attention.name)
        equations, held_out = self._sums(layer, (feed_forward,))
        missing = missing or held_out.others.error()
        own = feed_forward.weight.to(equations.gram.device, copy=True)
        if method == "map":
            equations, held_out = equations.mapped(own), held_out.mapped(own)
        penalty = equations.scale.expand(len(equations.gram))
        chosen = self._choose(equations, held_out, penalty, FIRST_WEIGHTS)
        explained = 1.0 - held_out.others.error(chosen.solution) / missing
        delta = chosen.solution.div_(feed_forward.scale)
        if method == "map":
            delta = delta @ own.double()
        self.changes.set(feed_forward, delta.add_(own))
        self.first_weight, self.ridge = chosen.first_weight, chosen.ridge
        names = tuple(f"{layer}.{name}" for name in changed)
        nats = self._loss(layer)
        return Fit(layer, names, target, chosen.ridge, chosen.first_weight, explained, nats)

    def _give_attention_its_share(self, layer: int, attention: Writer, other: Writer) -> float:
        """Change the attention's matrix, and tell what is missing on held-out text before it."""
        equations, held_out = self._sums(layer, (attention, other))
        inputs = attention.weight.shape[1]
        diagonal = equations.gram.diagonal()
        parts = diagonal[:inputs], diagonal[inputs:]
        penalty = torch.cat([part.mean().expand(len(part)) for part in parts])
        joint = self._choose(equations, held_out, penalty, (self.first_weight,)).solution
        self.changes.add(attention, ATTENTION_STEP * joint[:, :inputs] / attention.scale)
        return held_out.others.error()

    def _sums(self, layer: int, writers: tuple[Writer, ...]) -> tuple[NormalEquations, HeldOut]:
        of = partial(missing_equations, self.model, layer, writers, ran=self._ran)
        kept = partial(missing_rows, self.model, layer, writers, ran=self._ran)
        return of(states=self.fitted), kept(states=self.held_out)

    def _choose(
        self,
        equations: NormalEquations,
        held_out: HeldOut,
        penalty: torch.Tensor,
        weights: Sequence[float],
    ) -> Choice:
        chosen = choose(equations, held_out, penalty, first_weights=weights, start=self.ridge)
        if chosen is None:
            raise not_finite()
        return chosen

    def _loss(
        self, layer: int, layers: Sequence[int] | None = None, states: Stored | None = None
    ) -> float:
        """The held-out loss, from the cut model's states before ``layer``."""
        if layers is None:
            layers = [index for index in self.survivors if index >= layer]
        batches, total, count = self.held_out.batches, 0.0, 0
        given = states or self.held_out.cut
        moved = [given[index] for index in range(len(batches))]
        for some in self.model.passes(layers):
            moved = [self.model.run(*pair, some) for pair in zip(batches, moved, strict=True)]
            self._ran(len(some) * len(batches))
        for batch, last in zip(batches, moved, strict=True):
            with self.model.starting_from(last, ()):
                total += sum(summed_losses(self.model.head, batch).tolist())
            count += int(batch.attention_mask.sum()) - len(batch)
            self._ran(1)
        return total / count if math.isfinite(total) else math.inf


def _unheard(_steps: int, _note: str = "", /) -> None:
    """Advance no bar."""


def _add_to(sums: dict[int, torch.Tensor], place: int, values: torch.Tensor) -> None:
    """Add to a sum in float64 that stays on its device, which nobody waits for."""
    total = values.double().sum()
    sums[place] = sums[place] + total if place in sums else total

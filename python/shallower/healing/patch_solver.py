"""The solver of a patch: layer by layer, both models side by side, matrices solved anew."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import PatchError
from ..evaluation.loss import summed_losses
from ..models.layerwise import Layerwise
from ..models.offload import resident, stored_weight
from ..models.residual_writers import Writer, Writers, find_writers
from ..progress import track
from ..texts.batches import Batch
from ..values.patch import Fit, Patch
from ..values.plan import Plan
from .changes import Changes
from .least_squares import NormalEquations
from .missing import missing_equations, no_writer
from .patch_states import StateSet, Stored, other_rows

RIDGES = (0.03, 0.3, 3.0)
"""Penalties on the change of a matrix that are tried, as shares of its inputs' mean square."""

FIRST_WEIGHTS = (0.01, 0.001, 0.1, 1.0)
"""Weights that are tried for the first token of a text, which carries massive activations."""

ATTENTION_STEP = 0.5
"""The part of its share of a jump that the attention is given; the feed-forward, whose inputs
change with it, is then solved for all that is left."""

LATER_SHARE = 2
"""Layers after the cut, which have little to make up, are solved on every second batch."""

PATIENCE = 2
"""Consecutive layers after the cut that may fail to lower the loss before the solver stops."""


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
        self.first_weight = FIRST_WEIGHTS[0]

    def __enter__(self) -> "Patching":
        self.model.check(self._batches[1][0])
        self._folder = tempfile.TemporaryDirectory(prefix="shallower-")
        folder = Path(self._folder.name)
        sample = self.model.embed(self._batches[0][0])
        width, dtype = sample.shape[-1], sample.dtype
        self.fitted, self.held_out = (
            StateSet(
                batches,
                Stored(folder / f"{name}.whole", batches, width, dtype),
                Stored(folder / f"{name}.cut", batches, width, dtype),
            )
            for name, batches in zip(("fitted", "held_out"), self._batches, strict=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def solve(self, method: str) -> Patch:
        """Solve the layers before the blocks and, for ``refit``, those after them.

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
        self._advance_whole(0, first)
        for states in (self.fitted, self.held_out):
            for index in range(len(states.batches)):
                states.cut[index] = states.whole[index]
        original, cut = self._loss(first, range(first, len(self.model))), self._loss(first)
        nats, fits, failures = cut, [], 0
        with track("patch", len(self.survivors) - first, self.progress) as advance:
            for layer in self.survivors[first:]:
                target = after.get(layer, layer + 1)
                self._advance_whole(layer, target)
                wanted = layer in after or (method == "refit" and failures < PATIENCE)
                fit = self._fit(layer, target, method, layer in after) if wanted else None
                if fit and (layer in after or fit.nats < nats):
                    fits.append(fit)
                    nats, failures = fit.nats, 0
                elif wanted:
                    self.changes.take_back(self._mark)
                    failures += 1
                if layer >= last and (method == "map" or failures >= PATIENCE):
                    break
                if layer == last:
                    self.fitted.thin(LATER_SHARE)
                self._advance_cut(layer)
                advance(1)
        return self._done(method, original, cut, nats, fits=tuple(fits))

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

    def _embed(self) -> None:
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                states.whole[index] = states.cut[index] = self.model.embed(batch)

    def _advance_whole(self, layer: int, target: int) -> None:
        for layers in self.model.passes(range(layer, target)):
            for states in (self.fitted, self.held_out):
                for index, batch in enumerate(states.batches):
                    states.whole[index] = self.model.run(batch, states.whole[index], layers)

    def _advance_cut(self, layer: int) -> None:
        for layers in self.model.passes((layer,)):
            for states in (self.fitted, self.held_out):
                for index, batch in enumerate(states.batches):
                    states.cut[index] = self.model.run(batch, states.cut[index], layers)

    def _fit(self, layer: int, target: int, method: str, jump: bool) -> Fit | None:
        """Solve a layer's matrices for the whole model's state; the best of a few choices."""
        self._mark = len(self.changes)
        with resident(self.model.modules[layer]):
            return self._best_fit(layer, target, method, jump)

    def _best_fit(self, layer: int, target: int, method: str, jump: bool) -> Fit | None:
        batch = self.held_out.batches[0]
        writers = find_writers(self.model, layer, batch=batch, states=self.held_out.cut[0])
        feed_forward = writers.feed_forward
        if feed_forward is None:
            if not jump:
                return None
            raise no_writer(layer)
        before = self._missing(layer)
        changed = [feed_forward.name]
        if method == "refit" and writers.attention is not None:
            self._give_attention_its_share(layer, writers.attention, feed_forward)
            changed.insert(0, writers.attention.name)
        equations = self._equations(layer, (feed_forward,))
        own = feed_forward.weight.to(equations.gram.device, copy=True)
        if method == "map":
            equations = equations.mapped(own)
        penalty = equations.scale.expand(len(equations.gram))

        def change(ridge: float, first_weight: float) -> None:
            delta = equations.solve(ridge, penalty, first_weight).div_(feed_forward.scale)
            if method == "map":
                delta = delta @ own.double()
            self.changes.set(feed_forward, delta.add_(own))

        choices = [(RIDGES[0], self.first_weight)]
        best, nats = choices[0], math.inf
        trials = [(RIDGES[0], w) for w in FIRST_WEIGHTS] if jump else choices
        for trial in trials:
            change(*trial)
            if (loss := self._loss(layer)) < nats:
                best, nats = trial, loss
        for ridge in RIDGES[1:]:
            change(ridge, best[1])
            if (loss := self._loss(layer)) >= nats:
                break
            best, nats = (ridge, best[1]), loss
        change(*best)
        self.first_weight = best[1]
        explained = 1.0 - self._missing(layer) / before
        prefix = f"{layer}."
        return Fit(layer, tuple(prefix + name for name in changed), target, *best, explained, nats)

    def _give_attention_its_share(self, layer: int, attention: Writer, other: Writer) -> None:
        equations = self._equations(layer, (attention, other))
        inputs = attention.weight.shape[1]
        diagonal = equations.gram.diagonal()
        parts = diagonal[:inputs], diagonal[inputs:]
        penalty = torch.cat([part.mean().expand(len(part)) for part in parts])
        joint = equations.solve(RIDGES[0], penalty, self.first_weight)
        self.changes.add(attention, ATTENTION_STEP * joint[:, :inputs] / attention.scale)

    def _equations(self, layer: int, writers: tuple[Writer, ...]) -> NormalEquations:
        return missing_equations(self.model, layer, writers, states=self.fitted)

    def _missing(self, layer: int) -> float:
        """The squared distance to the whole model's states on held-out text, first tokens apart."""
        states = self.held_out
        sums: dict[int, torch.Tensor] = {}
        for index, batch in enumerate(states.batches):
            output = self.model.run(batch, states.cut[index], (layer,))
            missing = states.whole[index].to(output.device).float() - output.float()
            _add_to(sums, layer, other_rows(batch, missing).double().square())
        return float(sums[layer])

    def _loss(self, layer: int, layers: Sequence[int] | None = None) -> float:
        """The held-out loss, from the cut model's states before ``layer``."""
        if layers is None:
            layers = [index for index in self.survivors if index >= layer]
        batches, total, count = self.held_out.batches, 0.0, 0
        states = [self.held_out.cut[index] for index in range(len(batches))]
        for some in self.model.passes(layers):
            states = [self.model.run(*pair, some) for pair in zip(batches, states, strict=True)]
        for batch, last in zip(batches, states, strict=True):
            with self.model.starting_from(last, ()):
                total += sum(summed_losses(self.model.head, batch).tolist())
            count += int(batch.attention_mask.sum()) - len(batch)
        return total / count if math.isfinite(total) else math.inf


def _add_to(sums: dict[int, torch.Tensor], place: int, values: torch.Tensor) -> None:
    """Add to a sum in float64 that stays on its device, which nobody waits for."""
    total = values.double().sum()
    sums[place] = sums[place] + total if place in sums else total

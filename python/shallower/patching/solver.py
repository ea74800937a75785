"""The solver of a patch: layer by layer, both models side by side, matrices solved anew."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from ..evaluation.loss import predicting_tokens, summed_losses
from ..memory.weights import module_bytes
from ..models.layerwise import Layerwise
from ..models.offload import is_on_disk, resident
from ..models.residual_writers import Writer, find_writers
from ..progress import Advance, part, say_goes_on, track
from ..results.patch import Fit, Patch
from ..storage import check_temporary
from ..texts.batches import Batch
from ..values.layers import layer_count
from ..values.plan import Plan
from .changes import Changes
from .checkpoint import PatchCheckpoint
from .counts import SOLVING, STEPPING, PatchLayers
from .descent import Descent, draw_steps, keep_best, kept_bytes, num_steps
from .least_squares import FIRST_RIDGE, ChosenMap, HeldOut, NormalEquations, choose
from .states import (
    FILES,
    Spool,
    StateSet,
    missing_equations,
    missing_rows,
    no_writer,
    not_finite,
)

FIRST_WEIGHTS = (0.01, 0.001, 0.1, 1.0)
"""Weights that are tried for the first token of a text, which carries massive activations."""

ATTENTION_STEP = 0.5
"""The attention's part of its share of a jump; the feed-forward is then solved for all the rest."""


class Solver:
    """Both models' states on the batches, in temporary files, which advance layer by layer.

    Every weight that changes is noted in ``changes``. What is done is kept in the folder
    ``checkpoint``, if any.
    """

    def __init__(
        self,
        model: Layerwise,
        plan: Plan,
        fitted: Sequence[Batch],
        held_out: Sequence[Batch],
        changes: Changes,
        checkpoint: Path | None = None,
    ) -> None:
        self.model, self.plan, self.changes = model, plan, changes
        self._batches = fitted, held_out
        self._kept = checkpoint
        self.survivors = plan.survivors
        self._bar: Advance
        self.first_weight, self.ridge = FIRST_WEIGHTS[0], FIRST_RIDGE

    def _open(self) -> None:
        """Take the room of all that lies in files; layers on disk keep there what moves."""
        first = self.plan.blocks[0].start - 1
        left = [self.model.modules[layer] for layer in self.survivors if layer >= first]
        sample = self.model.embed(self._batches[0][0])
        width, dtype = sample.shape[-1], sample.dtype
        tokens = sum(batch.input_ids.size for batches in self._batches for batch in batches)
        states = FILES * tokens * width * dtype.itemsize
        check_temporary(states + kept_bytes(filter(is_on_disk, left)))

        def stored(batches: Sequence[Batch]) -> Spool:
            return Spool(batches, width, dtype, on_disk=True)

        self.fitted, self.held_out = (
            StateSet(batches, stored(batches), stored(batches)) for batches in self._batches
        )
        self._starts = [stored(batches) for batches in self._batches]

    def solve(self, progress: bool | None = None) -> Patch:
        """Solve the layers before the blocks, then let all matrices from there on descend."""
        self.model.check(self._batches[1][0])
        self._open()
        first, stop = self.plan.blocks[0].start - 1, self.plan.blocks[-1].stop
        after = {block.start - 1: block.stop for block in self.plan.blocks}
        solved = [layer for layer in self.survivors if first <= layer <= max(after)]
        self._embed()
        fits = []
        steps, taken = draw_steps(self.fitted.batches), num_steps(self.fitted.batches)
        counts = [len(batches) for batches in self._batches]
        total = PatchLayers.of(self.plan.num_layers, self.plan.dropped).times(
            fitted=counts[0],
            held_out=counts[1],
            descended=len(self._descended),
            stepped=taken * sum(map(len, steps)) / len(steps),
        )
        with track("patch, layers run", round(total), progress), part(total) as self._bar:
            self._advance_whole(0, first)
            self._copy_whole()
            self._keep_start()
            original, cut = self._loss(first, range(first, len(self.model))), self._loss(first)
            self._checkpoint = PatchCheckpoint(
                self._kept,
                self.plan,
                self._batches,
                (original, cut),
                reserve=module_bytes(self.model.head.decoder.model),
            )
            self._say_goes_on([layer for layer in solved if layer in after], progress)
            for layer in solved:
                self._bar(0, f"layer {layer}")
                target = after.get(layer, layer + 1)
                self._advance_whole(layer, target)
                if layer in after:
                    module = self.model.modules[layer]
                    known = self._checkpoint.fit(layer, module, self.changes)
                    with part(SOLVING * sum(counts)):
                        fits.append(known or self._fit(layer, target))
                    self.first_weight, self.ridge = fits[-1].first_weight, fits[-1].ridge
                if layer != solved[-1]:
                    self._advance_cut(layer)
            self._bar(0, "all layers")
            descent = self._descend(first, stop, fits[-1].nats)
        num_tokens, num_held_out = (
            sum(int(batch.learned.sum()) for batch in batches) for batches in self._batches
        )
        return Patch(
            self.plan,
            "refit",
            num_tokens,
            num_held_out,
            original=original,
            cut=cut,
            patched=min((fits[-1].nats, *descent)),
            fits=tuple(fits),
            descent=descent,
        )

    def _say_goes_on(self, layers: Sequence[int], progress: bool | None) -> None:
        """Say what an earlier run has kept of this patch, of the layers before the blocks."""
        taken, known = self._checkpoint.taken, len(self._checkpoint.solved(layers))
        if taken:
            steps = num_steps(self.fitted.batches)
            say_goes_on(f"{taken:,} of {steps:,} steps of the patch were taken", progress)
        elif known:
            say_goes_on(f"solved {known} of {layer_count(len(layers))} before a block", progress)

    def _embed(self) -> None:
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                states.whole[index] = states.cut[index] = self.model.embed(batch)

    def _copy_whole(self) -> None:
        for states in (self.fitted, self.held_out):
            for index in range(len(states.batches)):
                states.cut[index] = states.whole[index]

    def _advance_whole(self, layer: int, target: int) -> None:
        sets = (self.fitted, self.held_out)
        self._advance([(one.batches, one.whole) for one in sets], range(layer, target))

    def _advance_cut(self, layer: int) -> None:
        sets = (self.fitted, self.held_out)
        self._advance([(one.batches, one.cut) for one in sets], (layer,))

    def _advance(
        self,
        moved: Sequence[tuple[Sequence[Batch], Spool]],
        layers: Sequence[int],
        indices: Sequence[int] | None = None,
    ) -> None:
        """Run layers on batches and their states, of the batches ``indices`` alone or of all."""
        for some in self.model.passes(layers):
            for batches, states in moved:
                for index in range(len(batches)) if indices is None else indices:
                    states[index] = self.model.run(batches[index], states[index], some)
                    self._bar(len(some))

    def _keep_start(self) -> None:
        """Keep the states before the first layer that changes, to descend on and held out."""
        chosen = self._descended, range(len(self.held_out.batches))
        for states, start, indices in zip(
            (self.fitted, self.held_out), self._starts, chosen, strict=True
        ):
            for index in indices:
                start[index] = states.whole[index]

    def _descend(self, first: int, stop: int, nats: float) -> tuple[float, ...]:
        """Descend the divergence from the whole model, as far as the held-out loss falls.

        The whole model's states are before the layer ``stop``, from which on no layer has changed.
        """
        if not self.model.head.by_rows:
            return ()
        whole = range(stop, len(self.model))
        self._advance([(self.fitted.batches, self.fitted.whole)], whole, self._descended)
        fitted, held_out = self._starts
        states = StateSet(self.fitted.batches, self.fitted.whole, fitted)
        layers = [layer for layer in self.survivors if layer >= first]
        descent = Descent(self.model, layers, states=states, changes=self.changes)
        each = STEPPING * len(layers) * len(self._descended) / len(draw_steps(self.fitted.batches))
        descent.run(lambda steps: self._bar(each * steps), self._checkpoint)
        reached = keep_best(descent, lambda: self._loss(first, states=held_out), nats)
        return (reached,) if reached < nats else ()

    @cached_property
    def _descended(self) -> list[int]:
        """The batches to descend on."""
        return sorted({index for step in draw_steps(self.fitted.batches) for index in step})

    def _fit(self, layer: int, target: int) -> Fit:
        """Solve a layer's matrices for the whole model's state; the best of a few choices."""
        with resident(self.model.modules[layer]):
            return self._best_fit(layer, target)

    def _best_fit(self, layer: int, target: int) -> Fit:
        batch = self.held_out.batches[0]
        writers = find_writers(self.model, layer, batch=batch, states=self.held_out.cut[0])
        feed_forward = writers.feed_forward
        if feed_forward is None:
            raise no_writer(layer)
        changed, missing = [feed_forward.name], None
        if writers.attention is not None:
            missing = self._give_attention_its_share(layer, writers.attention, feed_forward)
            changed.insert(0, writers.attention.name)
        equations, held_out = self._sums(layer, (feed_forward,))
        missing = missing or held_out.others.error()
        own = feed_forward.weight.to(equations.gram.device, copy=True)
        penalty = equations.scale.expand(len(equations.gram))
        chosen = self._choose(equations, held_out, penalty, FIRST_WEIGHTS)
        explained = 1.0 - held_out.others.error(chosen.solution) / missing
        delta = chosen.solution.div_(feed_forward.scale)
        self.changes.set(feed_forward, delta.add_(own))
        names = tuple(f"{layer}.{name}" for name in changed)
        nats = self._loss(layer)
        fit = Fit(layer, names, target, chosen.ridge, chosen.first_weight, explained, nats)
        self._checkpoint.keep_fit(fit, self.model.modules[layer], changed)
        return fit

    def _give_attention_its_share(self, layer: int, attention: Writer, other: Writer) -> float:
        """Change the attention's matrix; returns what was missing on held-out text before it."""
        equations, held_out = self._sums(layer, (attention, other))
        inputs = attention.weight.shape[1]
        diagonal = equations.gram.diagonal()
        parts = diagonal[:inputs], diagonal[inputs:]
        penalty = torch.cat([part.mean().expand(len(part)) for part in parts])
        joint = self._choose(equations, held_out, penalty, (self.first_weight,)).solution
        self.changes.add(attention, ATTENTION_STEP * joint[:, :inputs] / attention.scale)
        return held_out.others.error()

    def _sums(self, layer: int, writers: tuple[Writer, ...]) -> tuple[NormalEquations, HeldOut]:
        return (
            missing_equations(self.model, layer, writers, states=self.fitted),
            missing_rows(self.model, layer, writers, states=self.held_out),
        )

    def _choose(
        self,
        equations: NormalEquations,
        held_out: HeldOut,
        penalty: torch.Tensor,
        weights: Sequence[float],
    ) -> ChosenMap:
        chosen = choose(equations, held_out, penalty, first_weights=weights, start=self.ridge)
        if chosen is None:
            raise not_finite()
        return chosen

    def _loss(
        self, layer: int, layers: Sequence[int] | None = None, states: Spool | None = None
    ) -> float:
        """The held-out loss, from the cut model's states before ``layer``."""
        if layers is None:
            layers = [index for index in self.survivors if index >= layer]
        batches, total, count = self.held_out.batches, 0.0, 0
        given = states or self.held_out.cut
        moved = [given[index] for index in range(len(batches))]
        for some in self.model.passes(layers):
            moved = [self.model.run(*pair, some) for pair in zip(batches, moved, strict=True)]
            self._bar(len(some) * len(batches))
        for batch, last in zip(batches, moved, strict=True):
            with self.model.starting_from(last, ()):
                total += sum(summed_losses(self.model.head, batch).tolist())
            count += int(predicting_tokens(batch).sum())
        return total / count if math.isfinite(total) else math.inf

"""The solver of a patch: layer by layer, both models side by side, matrices solved anew.

The layers that it runs are counted before, for its bar, its time and its disk.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from ..values.layers import blocks_of, layer_count
from ..values.plan import Plan
from .checkpoint import Changes, PatchCheckpoint
from .descent import Descent, draw_steps, keep_best, kept_bytes, num_steps
from .least_squares import FIRST_RIDGE, HeldOut, NormalEquations, choose
from .states import (
    FILES,
    Spool,
    missing_equations,
    missing_rows,
    no_writer,
    not_finite,
)

FIRST_WEIGHTS = (0.01, 0.001, 0.1, 1.0)
"""Weights that are tried for the first token of a text, which carries massive activations."""

ATTENTION_STEP = 0.5
"""The attention's part of its share of a jump; the feed-forward is then solved for all the rest."""

SOLVING, STEPPING = 6, 3.3
"""Layers that run in the time of solving a layer's matrices, and of a step of it, about."""


@dataclass(frozen=True, slots=True)
class PatchLayers:
    """The layers that a full patch runs, by what they run on."""

    num_layers: int  # of the whole model
    num_blocks: int  # blocks that go; the layer before each is solved
    walked: int  # of both models up to the last block, on all batches
    judged: int  # for losses before and after, and behind solved layers, on held-out batches
    rest: int  # of the whole model behind the last block, on the batches to descend on
    moved: int  # in each step: those from the one before the first block on

    @classmethod
    def of(cls, num_layers: int, dropped: Iterable[int]) -> "PatchLayers":
        """Count those of a cut of a model of so many layers."""
        blocks = blocks_of(sorted(dropped))
        stays = sorted({*range(num_layers)}.difference(*(one.layers for one in blocks)))
        first, last, stop = blocks[0].start - 1, blocks[-1].start - 1, blocks[-1].stop
        behind = [sum(layer >= one.start - 1 for layer in stays) for one in blocks]
        walked = stop + sum(first <= layer < last for layer in stays)
        judged = num_layers - first + 3 * behind[0] + sum(behind)
        return cls(num_layers, len(blocks), walked, judged, num_layers - stop, behind[0])

    def times(self, *, fitted: float, held_out: float, descended: float, stepped: float) -> float:
        """Count what takes as long, about, times texts: of a pass, and ``stepped`` in all steps."""
        walked = (self.walked + SOLVING * self.num_blocks) * (fitted + held_out)
        steps = STEPPING * self.moved * stepped
        return walked + self.judged * held_out + self.rest * descended + steps

    def passes(self, steps: int) -> float:
        """Count passes over all layers on disk; those that move are read once, and twice a step."""
        read = self.walked + self.judged + self.rest + (1 + 2 * steps) * self.moved
        return read / self.num_layers


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

        self.whole, self.cut, self._starts = (
            [Spool(batches, width, dtype, on_disk=True) for batches in self._batches]
            for _ in range(FILES)
        )

    def solve(self, progress: bool | None = None) -> Patch:
        """Solve the layers before the blocks, then let all matrices from there on descend."""
        self.model.check(self._batches[1][0])
        self._open()
        first, stop = self.plan.blocks[0].start - 1, self.plan.blocks[-1].stop
        after = {block.start - 1: block.stop for block in self.plan.blocks}
        solved = [layer for layer in self.survivors if first <= layer <= max(after)]
        self._embed()
        fits = []
        steps, taken = draw_steps(self._batches[0]), num_steps(self._batches[0])
        counts = [len(batches) for batches in self._batches]
        total = PatchLayers.of(self.plan.num_layers, self.plan.dropped).times(
            fitted=counts[0],
            held_out=counts[1],
            descended=len(self._descended),
            stepped=taken * sum(map(len, steps)) / len(steps),
        )
        with track("patch, layers run", round(total), progress), part(total) as self._bar:
            self._advance(self.whole, range(first))
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
                self._advance(self.whole, range(layer, target))
                if layer in after:
                    module = self.model.modules[layer]
                    known = self._checkpoint.fit(layer, module, self.changes)
                    with part(SOLVING * sum(counts)):
                        fits.append(known or self._fit(layer, target))
                    self.first_weight, self.ridge = fits[-1].first_weight, fits[-1].ridge
                if layer != solved[-1]:
                    self._advance(self.cut, (layer,))
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
            steps = num_steps(self._batches[0])
            say_goes_on(f"{taken:,} of {steps:,} steps of the patch were taken", progress)
        elif known:
            say_goes_on(f"solved {known} of {layer_count(len(layers))} before a block", progress)

    def _embed(self) -> None:
        for states in self.whole:
            for index, batch in enumerate(states.batches):
                states[index] = self.model.embed(batch)

    def _advance(
        self, moved: Sequence[Spool], layers: Sequence[int], indices: Sequence[int] | None = None
    ) -> None:
        """Run layers on states of batches, of the batches ``indices`` alone or of all."""
        for some in self.model.passes(layers):
            for states in moved:
                for index in range(len(states.batches)) if indices is None else indices:
                    states[index] = self.model.run(states.batches[index], states[index], some)
                    self._bar(len(some))

    def _keep_start(self) -> None:
        """Begin the cut, and keep the states before the first layer that changes.

        On those of some batches the cut descends, and on all that are held out.
        """
        chosen = self._descended, range(len(self._batches[1]))
        for whole, cut, start, indices in zip(
            self.whole, self.cut, self._starts, chosen, strict=True
        ):
            for index in range(len(whole.batches)):
                cut[index] = whole[index]
            for index in indices:
                start[index] = whole[index]

    def _descend(self, first: int, stop: int, nats: float) -> tuple[float, ...]:
        """Descend the divergence from the whole model, as far as the held-out loss falls.

        The whole model's states are before the layer ``stop``, from which on no layer has changed.
        """
        if not self.model.head.by_rows:
            return ()
        whole = range(stop, len(self.model))
        self._advance(self.whole[:1], whole, self._descended)
        layers = [layer for layer in self.survivors if layer >= first]
        descent = Descent(
            self.model, layers, whole=self.whole[0], cut=self._starts[0], changes=self.changes
        )
        each = STEPPING * len(layers) * len(self._descended) / len(draw_steps(self._batches[0]))
        descent.run(lambda steps: self._bar(each * steps), self._checkpoint)
        reached = keep_best(descent, lambda: self._loss(first, states=self._starts[1]), nats)
        return (reached,) if reached < nats else ()

    @cached_property
    def _descended(self) -> list[int]:
        """The batches to descend on."""
        return sorted({index for step in draw_steps(self._batches[0]) for index in step})

    def _fit(self, layer: int, target: int) -> Fit:
        """Solve a layer's matrices for the whole model's state; the best of a few choices."""
        with resident(self.model.modules[layer]):
            return self._best_fit(layer, target)

    def _best_fit(self, layer: int, target: int) -> Fit:
        batch, states = self._batches[1][0], self.cut[1][0]
        writers = find_writers(self.model, layer, batch=batch, states=states)
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
        solution, ridge, first_weight = self._choose(equations, held_out, penalty, FIRST_WEIGHTS)
        explained = 1.0 - held_out.others.error(solution) / missing
        delta = solution.div_(feed_forward.scale)
        self.changes.set(feed_forward, delta.add_(own))
        names = tuple(f"{layer}.{name}" for name in changed)
        nats = self._loss(layer)
        fit = Fit(layer, names, target, ridge, first_weight, explained, nats)
        self._checkpoint.keep_fit(fit, self.model.modules[layer], changed)
        return fit

    def _give_attention_its_share(self, layer: int, attention: Writer, other: Writer) -> float:
        """Change the attention's matrix; returns what was missing on held-out text before it."""
        equations, held_out = self._sums(layer, (attention, other))
        inputs = attention.weight.shape[1]
        diagonal = equations.gram.diagonal()
        parts = diagonal[:inputs], diagonal[inputs:]
        penalty = torch.cat([part.mean().expand(len(part)) for part in parts])
        joint, *_ = self._choose(equations, held_out, penalty, (self.first_weight,))
        self.changes.add(attention, ATTENTION_STEP * joint[:, :inputs] / attention.scale)
        return held_out.others.error()

    def _sums(self, layer: int, writers: tuple[Writer, ...]) -> tuple[NormalEquations, HeldOut]:
        return (
            missing_equations(self.model, layer, writers, whole=self.whole[0], cut=self.cut[0]),
            missing_rows(self.model, layer, writers, whole=self.whole[1], cut=self.cut[1]),
        )

    def _choose(
        self,
        equations: NormalEquations,
        held_out: HeldOut,
        penalty: torch.Tensor,
        weights: Sequence[float],
    ) -> tuple[torch.Tensor, float, float]:
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
        batches, total, count = self._batches[1], 0.0, 0
        given = states or self.cut[1]
        moved = [given[index] for index in range(len(batches))]
        for some in self.model.passes(layers):
            moved = [self.model.run(*pair, some) for pair in zip(batches, moved, strict=True)]
            self._bar(len(some) * len(batches))
        for batch, last in zip(batches, moved, strict=True):
            with self.model.starting_from(last, ()):
                total += sum(summed_losses(self.model.head, batch).tolist())
            count += int(predicting_tokens(batch).sum())
        return total / count if math.isfinite(total) else math.inf

"""The way down from a patched cut: its matrices move to where the whole model's words are.

What falls is the divergence of the cut model's next-token distributions from those of the whole
model. Its slopes are taken backwards through the cut, layer after layer, each run anew from the
states before it, so that the weights and the equations of one layer are needed at a time. A
matrix with inputs a and slopes g behind it moves along −(Σ g aᵀ)(Σ a aᵀ + λ)⁻¹, the least-squares
map onto the slopes by the equations of a jump; how far, a few losses tell.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.head import Head, part_sizes
from ..models.layerwise import Layerwise, token_rows
from ..models.offload import resident
from ..models.residual_writers import Writer, find_writers
from ..texts.batches import Batch
from .changes import Changes
from .least_squares import NormalEquations
from .patch_states import StateSet, Stored, other_rows

RIDGE = 3.0
"""The penalty on a step, as a share of the inputs' mean square."""

REACH = 0.5
"""The first step that is tried would take this share of the lost nats back, were the slope to stay
what it is."""

TRIES = 6
"""Steps that are tried, at most."""

ROUNDS = 2
"""Times that ways down are found, each on texts of its own."""

ROUND_TOKENS = 16_384
"""Tokens of such texts, at most."""

COPIES = 4
"""Copies of the logits in float32 that are made beside them."""


def rounds(batches: Sequence[Batch]) -> list[list[int]]:
    """Share batches out to rounds, those of all lengths to each.

    Args:
        batches: to fit, by length.

    Returns:
        The indices of each round's batches; no round is empty.
    """
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    count = max(1, ROUND_TOKENS * len(batches) // max(1, tokens))
    shares = (range(start, len(batches), ROUNDS) for start in range(ROUNDS))
    return [list(share[:: -(-len(share) // count)]) for share in shares if share]


@dataclass(frozen=True, slots=True)
class Way:
    """A direction in which one matrix moves.

    Attributes:
        layer: index of its layer.
        writer: the matrix.
        step: (D, inputs), on the CPU.
    """

    layer: int
    writer: Writer
    step: torch.Tensor


class Descent:
    """The ways down from a cut model, found on a few batches.

    Args:
        model: with the matrices of the patched cut.
        layers: those that are left from the first whose matrices move on, ascending.
        states: texts, with the cut's states before the first of the layers, and the whole model's
            behind all of its own.
        folder: where files of states are made.
        ran: is told of batches that ran through a layer.
    """

    def __init__(
        self,
        model: Layerwise,
        layers: Sequence[int],
        *,
        states: StateSet,
        folder: Path,
        ran: Callable[[int], None],
    ) -> None:
        self._model, self._layers, self._ran = model, layers, ran
        self._batches, self._whole = states.batches, states.whole
        start = states.cut[0]

        def stored(name: str) -> Stored:
            return Stored(folder / name, states.batches, start.shape[-1], start.dtype)

        self._states = [states.cut, *(stored(f"before.{layer}") for layer in layers[1:])]
        self._slopes = stored("slopes")

    def find(self) -> tuple[list[Way], float]:
        """Find the ways down.

        Returns:
            The ways, and by how much the divergence of a token falls for a step of one, if it
            kept its slope.
        """
        self._advance()
        scale = self._final_slopes()
        ways: list[Way] = []
        fall = 0.0
        for layer, states in zip(self._layers[::-1], self._states[::-1], strict=True):
            with resident(self._model.modules[layer]):
                found, falls = self._of_layer(layer, states)
            ways += found
            fall += falls
        tokens = sum(int(batch.attention_mask.sum()) for batch in self._batches)
        return ways, fall / (scale * tokens)

    def _advance(self) -> None:
        """Run the layers; the states behind the last take the room of the slopes."""
        after = [*self._states[1:], self._slopes]
        for layer, states, target in zip(self._layers, self._states, after, strict=True):
            for some in self._model.passes((layer,)):
                for index, batch in enumerate(self._batches):
                    target[index] = self._model.run(batch, states[index], some)
                    self._ran(1)

    def _final_slopes(self) -> float:
        """Turn the final states into slopes, times the number that is returned."""
        scale = 0.0
        for index, batch in enumerate(self._batches):
            slopes = self._behind_last(batch, self._slopes[index], self._whole[index]).float()
            # Halves are coarse near zero: slopes are made as large as one.
            scale = scale or 1 / max(float(slopes.square().mean().sqrt()), 1e-30)
            self._slopes[index] = slopes * scale
            self._ran(1)
        return scale

    def _behind_last(self, batch: Batch, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """(B, T, D): the slopes in the states before the final norm."""
        head = self._model.head
        inputs = batch.input_ids, batch.attention_mask
        ids, mask = (torch.from_numpy(values).to(head.decoder.device) for values in inputs)
        with torch.no_grad(), self._model.starting_from(whole, ()):
            aim = token_rows(batch, head.states(ids, mask))
        given = cut.clone().requires_grad_()
        with torch.enable_grad(), self._model.starting_from(given, ()):
            reached = token_rows(batch, head.states(ids, mask))
        slopes = divergence_slopes(head, reached.detach(), aim)
        (found,) = torch.autograd.grad(reached, given, slopes)
        return found

    def _of_layer(self, layer: int, states: Stored) -> tuple[list[Way], float]:
        """The ways of a layer's matrices; the slopes go back to the states before it."""
        found = find_writers(self._model, layer, batch=self._batches[0], states=states[0])
        writers = [w for w in (found.attention, found.feed_forward) if w is not None]
        sums: list[NormalEquations] = []
        for index, batch in enumerate(self._batches):
            self._slopes[index], taken = self._model.slopes(
                batch, states[index], layer,
                behind=self._slopes[index], modules=[w.module for w in writers],
            )  # fmt: skip
            if not sums:
                sums = [NormalEquations.empty(x.shape[-1], g.shape[-1], x.device)
                        for x, g in taken]  # fmt: skip
            for equations, (x, g) in zip(sums, taken, strict=True):
                # Some families run a feed-forward on (B·T, D).
                wide, slopes = (v.view(*batch.input_ids.shape, -1) for v in (x, g))
                equations.add(other_rows(batch, wide), -other_rows(batch, slopes).float())
            self._ran(1)
        ways, fall = [], 0.0
        for writer, equations in zip(writers, sums, strict=True):
            step = equations.solve(RIDGE, equations.scale.expand(len(equations.gram)))
            fall += float((step * equations.cross.mT).sum())
            ways.append(Way(layer, writer, step.to("cpu", writer.weight.dtype)))
        return ways, fall


def divergence_slopes(head: Head, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Take the slopes of the divergence from the whole model, a few rows of logits at a time.

    Args:
        head: of the model.
        cut: (R, D) final states of the cut, as the head gets them.
        whole: (R, D), those of the whole model.

    Returns:
        (R, D), the slopes of Σ KL(whole ‖ cut) in the cut's states.
    """
    slopes = torch.empty_like(cut)
    sizes = part_sizes(len(cut), COPIES * head.vocab_size)
    for rows, aim, found in zip(*(x.split(sizes) for x in (cut, whole, slopes)), strict=True):
        with torch.no_grad():
            wanted = head.logits(aim).float().softmax(-1)
        with torch.enable_grad():
            given = rows.clone().requires_grad_()
            logits = head.logits(given)
        errors = logits.detach().float().softmax(-1).sub_(wanted)
        found.copy_(torch.autograd.grad(logits, given, errors.to(logits.dtype))[0])
    return slopes


def walk(
    ways: Sequence[Way], first: float, *, changes: Changes, loss: Callable[[], float], nats: float
) -> float:
    """Go down the ways as far as a loss falls: by a first step, its halves or its doubles.

    Args:
        ways: the matrices and their directions.
        first: the step that is tried first.
        changes: what is told of changes.
        loss: measures the model.
        nats: the loss before any step.

    Returns:
        The least loss, with which the model is left.
    """
    if not (math.isfinite(first) and first > 0):
        return nats
    before = [way.writer.weight.to("cpu", copy=True) for way in ways]
    losses = {0.0: nats}

    def go(step: float) -> None:
        for way, weight in zip(ways, before, strict=True):
            changes.set(way.writer, torch.add(weight, way.step, alpha=step))

    def tried(step: float) -> float:
        if step not in losses:
            go(step)
            losses[step] = loss()
        return losses[step]

    factor, step = (2.0, first) if tried(first) < tried(first / 2) else (0.5, first / 2)
    while len(losses) <= TRIES and tried(step * factor) < tried(step):
        step *= factor
    best = min(losses, key=lambda step: losses[step])
    go(best)
    return losses[best]

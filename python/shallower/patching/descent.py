"""The way down from a patched cut: its matrices move to where the whole model's words are.

What falls is the divergence of the cut model's next-token distributions from those of the whole
model. Its slopes are taken backwards through the cut, layer after layer, so that the slopes of one
layer's matrices are there at a time. So is its graph: the layer runs anew from the states before
it, but on a CPU whose memory has room for the graphs of more. Every matrix takes steps of Adam
(1412.6980) with second moments of rows and columns alone (Adafactor, 1804.04235), each a share of
the root mean square of its own entries: one rate does for matrices of any width. Moves are kept
beside the old values, so that steps below a dtype's grain add up.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..memory.sizes import free_bytes
from ..models.head import Head, part_sizes
from ..models.layerwise import Layerwise, Trace, token_rows
from ..models.offload import is_offloaded, resident, stored_weight
from ..texts.batches import Batch
from .changes import Changes
from .states import StateSet

STEPS = 48
"""Steps, at most."""

STEP_TOKENS = 2048
"""Tokens of a step, of whole batches: at least so many, where there are."""

PASSES = 2
"""Times that the same texts are gone through, at most."""

RATE = 0.002
"""The size of a step, as a share of the root mean square of a matrix's entries."""

WARM_UP, DECAY = 4, 0.6
"""Steps in which the rate grows, and the share of all steps in which it falls to nothing."""

MOMENTUM, SQUARES = 0.9, 0.99
"""What of the mean slope, and of the mean square, is kept from step to step."""

MOST = 10.0
"""The largest step of one entry, in those of the rate: an outer product misjudges some."""

COPIES = 4
"""Copies of the logits that are made beside them."""


def drawn(batches: Sequence[Batch]) -> list[list[int]]:
    """Draw the batches of every step.

    Args:
        batches: to fit, by length.

    Returns:
        The indices of each step's batches, those of all lengths in any order. No batch comes
        again before its turn in the next pass.
    """
    order = list(range(len(batches)))
    random.Random(0).shuffle(order)
    steps: list[list[int]] = []
    tokens = STEP_TOKENS
    for index in order:
        if tokens >= STEP_TOKENS:
            steps.append([])
            tokens = 0
        steps[-1].append(index)
        tokens += int(batches[index].attention_mask.sum())
    return steps[:STEPS]


def rate_at(step: int, steps: int) -> float:
    """Give the rate of a step: it grows from step to step, stays, and falls in a line.

    Args:
        step: counted from 0.
        steps: all of them.

    Returns:
        The rate.
    """
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


class Moving:
    """One matrix on its way, or several of a kind in one tensor, in the memory of the CPU.

    Args:
        module: the module that has it.
        name: its name there.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._base = stored_weight(module, name).detach().to("cpu", copy=True)
        self._size = float(self._base.float().square().mean().sqrt())
        self._move = torch.zeros_like(self._base)
        self._momentum = torch.zeros_like(self._base)
        self._rows = torch.zeros(self._base.shape[:-1])
        self._columns = torch.zeros(*self._base.shape[:-2], self._base.shape[-1])
        self._steps = 0

    @property
    def is_stacked(self) -> bool:
        """Whether it is several matrices in one tensor."""
        return self._base.ndim > 2

    def step(self, slopes: torch.Tensor, rate: float, changes: Changes) -> None:
        """Take a step.

        Args:
            slopes: of the matrix's shape, in float32, on the device of the step's work.
            rate: the size of the step, as a share of the entries' root mean square.
            changes: what is told of changes.
        """
        self._steps += 1
        device, squares = slopes.device, slopes.square()
        rows, columns = self._rows.to(device), self._columns.to(device)
        rows.lerp_(squares.mean(-1), 1 - SQUARES)
        columns.lerp_(squares.mean(-2), 1 - SQUARES)
        momentum = self._momentum.to(device).float().lerp_(slopes, 1 - MOMENTUM)
        mean = rows.mean(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        scale = (rows / mean).unsqueeze(-1) * columns.unsqueeze(-2)
        scale = scale.div_(1 - SQUARES**self._steps).sqrt_()
        turn = momentum / (1 - MOMENTUM**self._steps)
        turn = turn.div_(scale.clamp_min_(torch.finfo(scale.dtype).tiny)).clamp_(-MOST, MOST)
        move = self._move.to(device).float().sub_(turn, alpha=rate * self._size)
        for kept, new in (
            (self._rows, rows), (self._columns, columns),
            (self._momentum, momentum), (self._move, move),
        ):  # fmt: skip
            kept.copy_(new)
        changes.change(self.module, self.name, self._base.to(device).float() + move)

    def put(self, share: float, changes: Changes) -> None:
        """Put the matrix somewhere on its way.

        Args:
            share: of the way; nothing is the old value, bit for bit.
            changes: what is told of changes.
        """
        value = self._base if share == 0 else self._base.float().add(self._move, alpha=share)
        changes.change(self.module, self.name, value)


def matrices(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Find the matrices of a layer.

    Args:
        layer: of a decoder.

    Yields:
        The module that has one, and its name there; each once.
    """
    seen: set[int] = set()
    for module in layer.modules():
        for name, _ in module.named_parameters(recurse=False):
            stored = stored_weight(module, name)
            if stored.ndim > 1 and stored.is_floating_point() and id(stored) not in seen:
                seen.add(id(stored))
                yield module, name


def graph_bytes(layer: nn.Module, tokens: int) -> int:
    """Count what the graph of a layer's forward takes, about.

    Args:
        layer: of a decoder.
        tokens: of its inputs, padding included.

    Returns:
        Twice the inputs and outputs of its linear maps, in bytes.
    """
    maps = [m.weight for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    size = max((weight.itemsize for weight in maps if weight.is_floating_point()), default=2)
    return 2 * size * tokens * sum(sum(weight.shape) for weight in maps)


class Descent:
    """The way down of a cut model.

    Args:
        model: with the matrices of the patched cut.
        layers: those that are left from the first whose matrices move on, ascending.
        states: texts, with the cut's states before the first of the layers, and the whole model's
            behind all of its own.
        changes: what is told of changes.
        ran: is told of batches that ran through a layer.
    """

    def __init__(
        self,
        model: Layerwise,
        layers: Sequence[int],
        *,
        states: StateSet,
        changes: Changes,
        ran: Callable[[int], None],
    ) -> None:
        self._model, self._states, self._changes, self._ran = model, states, changes, ran
        self._moving = {
            layer: [Moving(*found) for found in matrices(model.modules[layer])] for layer in layers
        }
        self._scale = 0.0
        device = model.head.decoder.device
        # A card runs a layer again in less time than its memory is worth.
        self._room = free_bytes(device) // 4 if device.type == "cpu" else 0

    def go(self) -> None:
        """Take all steps."""
        drawn_steps = drawn(self._states.batches)
        steps = min(STEPS, PASSES * len(drawn_steps))
        for number in range(steps):
            chosen = drawn_steps[number % len(drawn_steps)]
            self._step(chosen, rate_at(number, steps))

    def put(self, share: float) -> None:
        """Put all matrices somewhere on their way.

        Args:
            share: of the way; nothing is where it began, bit for bit.
        """
        for moving in self._moving.values():
            for one in moving:
                one.put(share, self._changes)

    def _step(self, chosen: Sequence[int], rate: float) -> None:
        """Take one step on some batches."""
        batches = [self._states.batches[index] for index in chosen]
        states = [self._states.cut[index] for index in chosen]
        kept, passed = self._kept(batches), []
        for layer, moving in self._moving.items():
            with resident(self._model.modules[layer]):
                entered = [
                    self._entered(*pair, layer, moving if layer in kept else None)
                    for pair in zip(batches, states, strict=True)
                ]
            passed.append([run for run, _ in entered])
            states = [reached for _, reached in entered]
            self._ran(len(batches))
        slopes = [
            self._behind_last(batch, last, self._states.whole[index])
            for batch, last, index in zip(batches, states, chosen, strict=True)
        ]
        self._ran(len(batches))
        for layer in reversed(self._moving):
            self._step_layer(layer, batches, passed.pop(), slopes, rate)

    def _kept(self, batches: Sequence[Batch]) -> set[int]:
        """The layers whose graphs there is room for; the others run twice."""
        kept, room = set(), self._room
        tokens = sum(batch.input_ids.size for batch in batches)
        for layer in reversed(self._moving):
            module = self._model.modules[layer]
            room -= graph_bytes(module, tokens)
            # What experts in one tensor keep depends on how many of them a token is sent to.
            stacked = any(one.is_stacked for one in self._moving[layer])
            if room < 0 or stacked or is_offloaded(module):
                break
            kept.add(layer)
        return kept

    def _entered(
        self, batch: Batch, states: torch.Tensor, layer: int, moving: Sequence[Moving] | None
    ) -> tuple[Trace | torch.Tensor, torch.Tensor]:
        """A layer's run, or the states before it where its graph is not kept; and those behind."""
        if moving is None:
            return states, self._model.run(batch, states, (layer,)).cpu()
        trace = self._traced(batch, states, layer, moving)
        return trace, trace.output.detach()

    def _traced(
        self, batch: Batch, states: torch.Tensor, layer: int, moving: Sequence[Moving]
    ) -> Trace:
        weights = [getattr(one.module, one.name) for one in moving]
        return self._model.trace(batch, states, layer, weights=weights)

    def _step_layer(
        self,
        layer: int,
        batches: Sequence[Batch],
        passed: list[Trace | torch.Tensor],
        slopes: list[torch.Tensor],
        rate: float,
    ) -> None:
        """Move the matrices of a layer; the slopes go back to the states before it."""
        moving = self._moving[layer]
        sums: list[torch.Tensor | None] = [None] * len(moving)
        with resident(self._model.modules[layer]):
            for index, batch in enumerate(batches):
                run = passed.pop(0)
                if isinstance(run, torch.Tensor):
                    run = self._traced(batch, run, layer, moving)
                slopes[index], found = run.slopes(slopes[index])
                for place, part in enumerate(found):
                    total = sums[place]
                    if part is not None:
                        sums[place] = part.float() if total is None else total.add_(part)
                self._ran(1)
            for one, total in zip(moving, sums, strict=True):
                if total is not None:  # experts that no token was sent to have none
                    one.step(total, rate, self._changes)

    def _behind_last(self, batch: Batch, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """(B, T, D): the slopes in the states before the final norm, times the same number for
        all steps.
        """
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
        # Halves are coarse near zero: slopes are made as large as one.
        found = found.float()
        self._scale = self._scale or 1 / max(float(found.square().mean().sqrt()), 1e-30)
        return found.mul_(self._scale).to(cut.dtype)


def divergence_slopes(head: Head, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Take the slopes of the divergence from the whole model, a few rows of logits at a time.

    Args:
        head: of the model.
        cut: (R, D) final states of the cut, as the head gets them.
        whole: (R, D), those of the whole model.

    Returns:
        (R, D), the slopes of Σ KL(whole ‖ cut) in the cut's states; the distributions are in the
        dtype of the logits.
    """
    slopes = torch.empty_like(cut)
    sizes = part_sizes(len(cut), COPIES * head.vocab_size)
    for rows, aim, found in zip(*(x.split(sizes) for x in (cut, whole, slopes)), strict=True):
        with torch.no_grad():
            wanted = head.logits(aim).softmax(-1)
        with torch.enable_grad():
            given = rows.clone().requires_grad_()
            logits = head.logits(given)
        errors = logits.detach().softmax(-1).sub_(wanted)
        found.copy_(torch.autograd.grad(logits, given, errors)[0])
    return slopes


def least(descent: Descent, loss: Callable[[], float], nats: float) -> float:
    """Go down as far as a loss falls: the whole way, half of it, or not at all.

    Args:
        descent: that was gone.
        loss: measures the model.
        nats: the loss before.

    Returns:
        The least loss, with which the model is left.
    """
    found = {0.0: nats}
    for share in (1.0, 0.5):
        descent.put(share)
        found[share] = loss()
    best = min(found, key=lambda share: found[share] if math.isfinite(found[share]) else math.inf)
    descent.put(best)
    return found[best]

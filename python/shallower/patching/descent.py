"""Gradient descent from a patched cut towards the whole model's next-token distributions.

The loss is the cross-entropy of the cut model's distributions with a mixture of those of the whole
model and the text's next tokens. Its gradient is taken backwards through the cut, layer after
layer, so that only one layer's gradients are held at a time. The same holds for the graph: a layer
runs anew from the states before it. On a CPU whose memory has room, the graphs of more layers are
kept.

Every matrix takes steps of Adam (1412.6980), with second moments of rows and columns alone
(Adafactor, 1804.04235). A step is a share of the root mean square of the matrix's entries, so that
one rate does for matrices of any width. Moves are kept beside the old values, so that steps below a
dtype's grain add up.

Where the layers are streamed, each step reads them forwards once and backwards once. All that is
kept of a matrix then lies in temporary files.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..evaluation.loss import predicting_tokens
from ..memory.budget import BUDGET
from ..models.head import Head, part_sizes
from ..models.layerwise import Gradients, Layerwise, rows
from ..models.offload import in_file, is_offloaded, is_on_disk, stored_weight, will_need
from ..texts.batches import Batch
from .checkpoint import Changes, PatchCheckpoint
from .states import Spool

STEPS = 112
"""Steps, at most."""

STEP_TOKENS = 1024
"""Tokens of a step, of whole batches: at least so many, where there are."""

PASSES = 2
"""Passes over the texts, at most."""

RATE = 0.001
"""The size of a step, as a share of the root mean square of a matrix's entries."""

WARM_UP, DECAY = 4, 0.6
"""Steps in which the rate grows, and the share of all steps in which it falls to nothing."""

MOMENTUM, SQUARES = 0.9, 0.99
"""Decay of the mean gradient, and of the mean square, from step to step."""

MOST = 10.0
"""The largest step of one entry, in those of the rate: an outer product misjudges some."""

LABELS = 0.5
"""The share of the text's next token in the target; the rest is the whole model's distribution.

Of a patch that takes fewer than half of all steps it is less, in proportion."""

COPIES = 4
"""Copies of the logits that are made beside them."""


def draw_steps(batches: Sequence[Batch]) -> list[list[int]]:
    """Draw the batches of the steps of one pass: their indices, of all lengths in any order."""
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


def num_steps(batches: Sequence[Batch]) -> int:
    """Steps that a descent on these batches takes."""
    return min(STEPS, PASSES * len(draw_steps(batches)))


def most_steps(num_tokens: float) -> int:
    """Steps that a descent on so many tokens takes, at most."""
    return min(STEPS, PASSES * math.ceil(num_tokens / STEP_TOKENS))


def rate_at(step: int, steps: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, a plateau, and a linear decay."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


class MovingMatrix:
    """One matrix that descends, or several in one tensor, in CPU memory; in files if streamed."""

    STATE = ("_move", "_momentum", "_rows", "_columns")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._on_disk, stored = is_on_disk(module), stored_weight(module, name).detach().cpu()
        room = in_file if self._on_disk else torch.zeros_like
        self._base = room(stored).copy_(stored)
        self._size = float(self._base.float().square().mean().sqrt())
        self._move, self._momentum = room(stored), room(stored)
        self._rows = torch.zeros(self._base.shape[:-1])
        self._columns = torch.zeros(*self._base.shape[:-2], self._base.shape[-1])
        self.steps = 0

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the next step depends on, by name: the state, and the weight as it is."""
        yield from ((name, getattr(self, name)) for name in self.STATE)
        yield "weight", stored_weight(self.module, self.name)

    def resume(self, steps: int, state: Mapping[str, torch.Tensor], changes: Changes) -> None:
        """Go on behind so many steps, from what :meth:`state` gave."""
        self.steps = steps
        for name in self.STATE:
            getattr(self, name).copy_(state[name])
        changes.change(self.module, self.name, state["weight"])

    def fetch_ahead(self) -> None:
        """Let the system read from files what the next step needs, while other work goes on."""
        if self._on_disk:
            will_need(self._base, self._move, self._momentum)

    @property
    def is_stacked(self) -> bool:
        """Whether it is several matrices in one tensor."""
        return self._base.ndim > 2

    def step(self, gradients: torch.Tensor, rate: float, changes: Changes) -> None:
        """Step along float32 gradients, by a share of the root mean square of the entries."""
        self.steps += 1
        device, squares = gradients.device, gradients.square()
        rows, columns = self._rows.to(device), self._columns.to(device)
        rows.lerp_(squares.mean(-1), 1 - SQUARES)
        columns.lerp_(squares.mean(-2), 1 - SQUARES)
        momentum = self._momentum.to(device).float().lerp_(gradients, 1 - MOMENTUM)
        mean = rows.mean(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        scale = (rows / mean).unsqueeze(-1) * columns.unsqueeze(-2)
        scale = scale.div_(1 - SQUARES**self.steps).sqrt_()
        turn = momentum / (1 - MOMENTUM**self.steps)
        turn = turn.div_(scale.clamp_min_(torch.finfo(scale.dtype).tiny)).clamp_(-MOST, MOST)
        move = self._move.to(device).float().sub_(turn, alpha=rate * self._size)
        for kept, new in (
            (self._rows, rows),
            (self._columns, columns),
            (self._momentum, momentum),
            (self._move, move),
        ):
            kept.copy_(new)
        changes.change(self.module, self.name, self._base.to(device).float() + move)

    def put(self, share: float, changes: Changes) -> None:
        """Set the matrix to a share of its move; 0 is the old value, bit for bit."""
        value = self._base if share == 0 else self._base.float().add(self._move, alpha=share)
        changes.change(self.module, self.name, value)


def matrices(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Find the matrices of a layer, each once: its module, and its name there."""
    seen: set[int] = set()
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            stored = parameter if is_on_disk(module) else stored_weight(module, name)
            if stored.ndim > 1 and stored.is_floating_point() and id(stored) not in seen:
                seen.add(id(stored))
                yield module, name


def kept_bytes(layers: Iterable[nn.Module]) -> int:
    """Count what is kept of all matrices of layers: old and new values, moves and momenta."""
    moving = (found for layer in layers for found in matrices(layer))
    return 4 * sum(getattr(module, name).nbytes for module, name in moving)


def graph_bytes(layer: nn.Module, tokens: int) -> int:
    """Estimate the bytes of a layer's graph for so many tokens: twice its maps' in and outputs."""
    maps = [m.weight for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)]
    size = max((weight.itemsize for weight in maps if weight.is_floating_point()), default=2)
    return 2 * size * tokens * sum(sum(weight.shape) for weight in maps)


class Descent:
    """The descent of a patched cut over ``layers``, ascending, from the first that moves.

    ``cut`` are the cut's states before it, and ``whole`` the whole model's behind all of its own.
    """

    def __init__(
        self,
        model: Layerwise,
        layers: Sequence[int],
        *,
        whole: Spool,
        cut: Spool,
        changes: Changes,
    ) -> None:
        self._model, self._whole, self._cut, self._changes = model, whole, cut, changes
        self._batches = cut.batches
        self._moving = {
            layer: [MovingMatrix(*found) for found in matrices(model.modules[layer])]
            for layer in model.one_by_one(layers)
        }
        self._on_disk = model.is_streamed
        self._scale = 0.0
        # The fewer the texts, the more their next tokens say of these texts alone.
        self._labels = LABELS * min(1.0, 2 * num_steps(cut.batches) / STEPS)
        device = model.head.decoder.device
        # A card runs a layer again in less time than its memory is worth.
        self._room = BUDGET.share(self) if device.type == "cpu" else 0

    def run(
        self,
        advance: Callable[[int], object] = lambda _steps: None,
        checkpoint: PatchCheckpoint | None = None,
    ) -> None:
        """Take all steps that an earlier run has not; ``advance`` is called with their number."""
        steps_of_pass = draw_steps(self._batches)
        steps = num_steps(self._batches)
        taken = self._go_on(checkpoint)
        advance(taken)
        for number in range(taken, steps):
            chosen = steps_of_pass[number % len(steps_of_pass)]
            self._step(chosen, rate_at(number, steps))
            advance(1)
            if checkpoint and checkpoint.is_due:
                self._keep(checkpoint, number + 1)

    def _go_on(self, checkpoint: PatchCheckpoint | None) -> int:
        """How many steps were taken by an earlier run, whose state is set."""
        found = checkpoint and checkpoint.steps()
        if not found:
            return 0
        facts, tensors = found
        for name, one in self._named():
            names = (*MovingMatrix.STATE, "weight")
            kept = {key: tensors.get_tensor(f"{name}.{key}") for key in names}
            one.resume(facts["steps"][name], kept, self._changes)
        self._scale = float(facts["scale"])
        return int(facts["taken"])

    def _keep(self, checkpoint: PatchCheckpoint, taken: int) -> None:
        tensors = {
            f"{name}.{key}": value for name, one in self._named() for key, value in one.state()
        }
        steps = {name: one.steps for name, one in self._named()}
        checkpoint.keep_steps({"taken": taken, "scale": self._scale, "steps": steps}, tensors)

    def _named(self) -> Iterator[tuple[str, MovingMatrix]]:
        for layer, moving in self._moving.items():
            for place, one in enumerate(moving):
                yield f"{layer}.{place}", one

    def put(self, share: float) -> None:
        """Set all matrices to a share of their moves; 0 is where they began, bit for bit."""
        for moving in self._moving.values():
            for one in moving:
                one.put(share, self._changes)

    def _step(self, chosen: Sequence[int], rate: float) -> None:
        """Take one step on some batches."""
        batches = [self._batches[index] for index in chosen]
        states = [self._cut[index] for index in chosen]
        kept, passed = self._kept(batches), []
        for layer in self._model.one_by_one(self._moving):
            moving = self._moving[layer] if layer in kept else None
            entered = [
                self._entered(*pair, layer, moving) for pair in zip(batches, states, strict=True)
            ]
            passed.append([run for run, _ in entered])
            states = [reached for _, reached in entered]
            if self._on_disk:
                states = [in_file(reached).copy_(reached) for reached in states]
        gradients = [
            self._behind_last(batch, last, self._whole[index])
            for batch, last, index in zip(batches, states, chosen, strict=True)
        ]
        ahead = dict(pairwise(reversed(self._moving)))
        for layer in self._model.one_by_one(reversed(self._moving)):
            for one in self._moving.get(ahead.get(layer, -1), ()):
                one.fetch_ahead()
            self._step_layer(layer, batches, passed.pop(), gradients, rate)

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
        self, batch: Batch, states: torch.Tensor, layer: int, moving: Sequence[MovingMatrix] | None
    ) -> tuple[Gradients | torch.Tensor, torch.Tensor]:
        """A layer's run, or the states before it where its graph is not kept; and those behind."""
        if moving is None:
            return states, self._model.run(batch, states, (layer,)).cpu()
        output, gradients = self._traced(batch, states, layer, moving)
        return gradients, output.detach()

    def _traced(
        self, batch: Batch, states: torch.Tensor, layer: int, moving: Sequence[MovingMatrix]
    ) -> tuple[torch.Tensor, Gradients]:
        weights = [getattr(one.module, one.name) for one in moving]
        return self._model.trace(batch, states, layer, weights=weights)

    def _step_layer(
        self,
        layer: int,
        batches: Sequence[Batch],
        passed: list[Gradients | torch.Tensor],
        gradients: list[torch.Tensor],
        rate: float,
    ) -> None:
        """Move the matrices of a layer; the gradients go back to the states before it."""
        moving = self._moving[layer]
        sums: list[torch.Tensor | None] = [None] * len(moving)
        for index, batch in enumerate(batches):
            run = passed.pop(0)
            if isinstance(run, torch.Tensor):
                _, run = self._traced(batch, run, layer, moving)
            gradients[index], found = run(gradients[index])
            for place, part in enumerate(found):
                total = sums[place]
                if part is not None:
                    sums[place] = part.float() if total is None else total.add_(part)
        for one, total in zip(moving, sums, strict=True):
            if total is not None:  # experts that no token was sent to have none
                one.step(total, rate, self._changes)

    def _behind_last(self, batch: Batch, cut: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """(B, T, D): gradients in the states before the final norm, times a constant number."""
        head = self._model.head
        inputs = batch.input_ids, batch.attention_mask
        ids, mask = (torch.from_numpy(values).to(head.decoder.device) for values in inputs)
        with torch.no_grad(), self._model.starting_from(whole, ()):
            aim = rows(head.states(ids, mask), batch.learned)
        given = cut.clone().requires_grad_()
        with torch.enable_grad(), self._model.starting_from(given, ()):
            reached = rows(head.states(ids, mask), batch.learned)
        next_ids = np.where(predicting_tokens(batch), np.roll(batch.input_ids, -1, axis=1), -1)
        labels = torch.from_numpy(next_ids[batch.learned])
        gradients = target_gradients(head, reached.detach(), aim, labels=labels, share=self._labels)
        (found,) = torch.autograd.grad(reached, given, gradients)
        # Halves are coarse near zero: gradients are made as large as one.
        found = found.float()
        self._scale = self._scale or 1 / max(float(found.square().mean().sqrt()), 1e-30)
        return found.mul_(self._scale).to(cut.dtype)


def target_gradients(
    head: Head, cut: torch.Tensor, whole: torch.Tensor, *, labels: torch.Tensor, share: float
) -> torch.Tensor:
    """Take the gradients of Σ KL(target ‖ cut) in the cut's final states, a few rows at a time.

    States are (R, D), as the head gets them; the distributions are in the dtype of the logits. The
    target is the whole model's distribution, with a ``share`` of the label, (R,) int64 token ids;
    -1 where a text ends.
    """
    gradients = torch.empty_like(cut)
    sizes = part_sizes(len(cut), COPIES * head.vocab_size)
    parts = (values.split(sizes) for values in (cut, whole, labels, gradients))
    for some, aim, label, found in zip(*parts, strict=True):
        with torch.no_grad():
            wanted = head.logits(aim).softmax(-1)
            label = label.to(wanted.device)
            part = (label >= 0).to(wanted) * share
            wanted.mul_(1 - part[:, None])
            wanted.scatter_add_(1, label.clamp(min=0)[:, None], part[:, None])
        with torch.enable_grad():
            given = some.clone().requires_grad_()
            logits = head.logits(given)
        errors = logits.detach().softmax(-1).sub_(wanted)
        found.copy_(torch.autograd.grad(logits, given, errors)[0])
    return gradients


def keep_best(descent: Descent, loss: Callable[[], float], nats: float) -> float:
    """Keep the whole of a descent, half of it or none: the least loss, which is returned."""
    found = {0.0: nats}
    for share in (1.0, 0.5):
        descent.put(share)
        found[share] = loss()
    best = min(found, key=lambda share: found[share] if math.isfinite(found[share]) else math.inf)
    descent.put(best)
    return found[best]

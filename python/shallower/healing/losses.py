"""The losses that a healing minimises: of the next token, and of the distillation at the cut."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..models.architecture import find_layers
from ..values.layers import Block
from ..values.plan import Plan

_ROWS = 128
"""Rows of logits that are in float32 at a time."""


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ (logsumexp z − z[target]) in float32, rows at a time; the gradient is kept in the logits'
    dtype, so that no float32 copy of all logits exists.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(targets), _ROWS):
            part = slice(start, start + _ROWS)
            rows = logits[part].to(torch.float32, copy=True)
            counts = targets[part, None] >= 0
            expected = targets[part, None].clamp(min=0)
            log_sum = rows.logsumexp(-1, keepdim=True)
            total += ((log_sum - rows.gather(1, expected)) * counts).double().sum()
            errors = rows.sub_(log_sum).exp_()
            errors.scatter_add_(1, expected, torch.full_like(log_sum, -1))
            gradient[part] = errors.mul_(counts)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy of the next tokens, without a float32 copy of the logits.

    Args:
        logits: (B, T, V), of any float dtype; the gradient has the same.
        labels: (B, T) int64 token ids, unshifted; -100 where nothing is predicted.

    Returns:
        A float32 scalar, in nats.
    """
    nothing = torch.full_like(labels[:, :1], -100)
    expected = torch.cat([labels[:, 1:], nothing], dim=1).to(logits.device)
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits.flatten(0, 1), expected.flatten())
    return loss


class _EnoughError(Exception):
    """Ends a forward whose later layers nobody needs."""


class Distillation:
    """The distillation at the cut, a footnote of the paper.

    The student's state there is to match the state that the uncut model has behind the block that
    went.

    For a block [l, l+n) the loss is |x' - x|² / |x|² with x = x^(l+n) of the teacher and x' the
    state where the student's layers were joined, under the same tokens; mean over the tokens but
    the first of each sequence, which carries massive activations, and over the blocks.

    Args:
        student: the cut model.
        teacher: the uncut model; frozen, and run through its first layers only.
        plan: the plan of the cut.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, plan: Plan) -> None:
        self._teacher = teacher.eval().requires_grad_(False)
        self._runner = find_layers(teacher).runner
        self._of_student = _States(student, [_join(plan, block) for block in plan.blocks])
        self._of_teacher = _States(teacher, [block.stop for block in plan.blocks])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the student's states of the forward in the body, for :meth:`summed`."""
        with self._of_student.kept():
            yield

    def summed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute the loss of the forward just watched.

        Args:
            input_ids: (B, T) int64, those of that forward.
            attention_mask: (B, T), 1 at tokens and 0 at padding.

        Returns:
            A float32 scalar: the sum over tokens of the mean over blocks.
        """
        with torch.no_grad(), self._of_teacher.kept(stop=True), suppress(_EnoughError):
            self._runner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        counts = attention_mask.bool().clone()
        counts[:, 0] = False
        errors = []
        for got, wanted in zip(self._of_student.take(), self._of_teacher.take(), strict=True):
            here = counts.to(got.device)
            expected = wanted.to(got.device).float()[here]
            missed = got.float()[here] - expected
            errors.append((missed.square().sum(-1) / expected.square().sum(-1)).sum())
        return torch.stack(errors).mean()


def _join(plan: Plan, block: Block) -> int:
    """The number of the cut model's state that is where a block was."""
    return sum(index < block.start for index in plan.survivors)


class _States:
    """States x^(l) of a model, kept in a forward by hooks."""

    def __init__(self, model: nn.Module, states: list[int]) -> None:
        self._layers = find_layers(model).modules
        self._states = states
        self._found: dict[int, torch.Tensor] = {}

    @contextmanager
    def kept(self, stop: bool = False) -> Iterator[None]:
        """Keep the states of the forward in the body; end it at the last one if ``stop``."""
        self._found.clear()
        last = max(self._states) if stop else -1
        hooks = []
        for state in set(self._states):
            if state < len(self._layers):
                hook = self._layers[state].register_forward_pre_hook(
                    lambda _m, args, kwargs, state=state: self._keep(
                        state, args[0] if args else kwargs["hidden_states"], state == last
                    ),
                    with_kwargs=True,
                )
            else:
                hook = self._layers[-1].register_forward_hook(
                    lambda _m, _args, output, state=state: self._keep(
                        state, output[0] if isinstance(output, tuple) else output, state == last
                    )
                )
            hooks.append(hook)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, state: int, value: torch.Tensor, enough: bool) -> None:
        self._found[state] = value
        if enough:
            raise _EnoughError

    def take(self) -> list[torch.Tensor]:
        """The kept states, one for every state asked for; forgets them."""
        found, self._found = self._found, {}
        return [found[state] for state in self._states]

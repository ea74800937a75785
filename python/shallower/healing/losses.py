"""The losses that a healing minimises: of the next token, and of the distillation at the cut."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.architecture import find_layers
from ..models.decoder import Decoder
from ..models.head import FEWEST_ROWS, Head, part_sizes, replaced
from ..values.layers import Block
from ..values.plan import Plan

_ROWS = 128
"""Rows of logits that are in float32 at a time, at most."""

_LOGITS = 1 << 23
"""Logits that are in float32 at a time, at most, if that leaves as many rows as keep the bits."""


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take logsumexp z − z[target] of every row in float32, a few rows at a time.

    Returns:
        The losses, 0 where the target is negative, and the gradient of ``scale`` times their sum
        in the logits' dtype, so that no float32 copy of all logits exists.
    """
    gradient = torch.empty_like(logits)
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    size = min(_ROWS, max(FEWEST_ROWS, _LOGITS // logits.shape[1]))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        rows = logits[part].to(torch.float32, copy=True)
        counts = targets[part, None] >= 0
        expected = targets[part, None].clamp(min=0)
        log_sum = rows.logsumexp(-1, keepdim=True)
        losses[part] = ((log_sum - rows.gather(1, expected)) * counts).squeeze(1)
        errors = rows.sub_(log_sum).exp_()
        errors.scatter_add_(1, expected, torch.full_like(log_sum, -1))
        gradient[part] = errors.mul_(counts).mul_(scale)
    return losses, gradient


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum over rows of logits; the gradient to them is made at once, and kept."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses, gradient = _cross_entropy(logits, targets, 1.0)
        ctx.save_for_backward(gradient)
        return losses.double().sum().float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None


class _MeanCrossEntropy(torch.autograd.Function):
    """The same from final states, whose logits exist a few rows at a time: the gradient to the
    states, (N, D), is all that is kept. The head gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor, head: Head
    ) -> torch.Tensor:
        gradient = torch.empty_like(states)
        scale = 1 / divisor
        losses = []
        sizes = part_sizes(len(states), 2 * head.vocab_size)  # their gradient is as large
        for rows, expected, found in zip(
            states.split(sizes), targets.split(sizes), gradient.split(sizes), strict=True
        ):
            with torch.enable_grad():
                given = rows.detach().requires_grad_()
                logits = head.logits(given)
            of_rows, errors = _cross_entropy(
                logits.detach(), expected.to(logits.device), scale.to(logits.device)
            )
            losses.append(of_rows.to(states.device))
            found.copy_(torch.autograd.grad(logits, given, errors)[0])
            del logits, errors
        ctx.save_for_backward(gradient)
        return torch.cat(losses).double().sum().float() / divisor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy of the next tokens, without a float32 copy of the logits.

    Args:
        logits: (B, T, V), of any float dtype; the gradient has the same.
        labels: (B, T) int64 token ids, unshifted; -100 where nothing is predicted.

    Returns:
        A float32 scalar, in nats.
    """
    loss: torch.Tensor = _SummedCrossEntropy.apply(
        logits.flatten(0, 1), _expected(labels).to(logits.device)
    )
    return loss


def mean_loss(
    head: Head, states: torch.Tensor, labels: torch.Tensor, *, divisor: torch.Tensor | int
) -> torch.Tensor:
    """Take the mean cross-entropy of the next tokens, without all logits.

    Args:
        head: of the model; its weights get no gradient.
        states: (B, T, D) final states, as the head gets them.
        labels: (B, T) int64 token ids, unshifted; -100 where nothing is predicted.
        divisor: the tokens that are predicted, in all that belongs to one step.

    Returns:
        A float32 scalar, in nats.
    """
    count = torch.as_tensor(divisor, dtype=torch.float32, device=states.device)
    loss: torch.Tensor = _MeanCrossEntropy.apply(
        states.flatten(0, 1), _expected(labels), count, head
    )
    return loss


def _expected(labels: torch.Tensor) -> torch.Tensor:
    """The next token of every token, -100 where there is none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()


class TrainingLoss:
    """The loss of a model that is trained, made inside its forward.

    So it is made through whatever is wrapped around the model: peft, accelerate, DDP. Where the
    head is not frozen, or takes more than final states, the loss is made of all logits.

    Args:
        model: the model whose layers are trained, without peft's around it; it runs once, on a
            few tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = Decoder.of(model)
        inside = {id(p) for layer in decoder.layers.modules for p in layer.parameters()}
        frozen = not any(p.requires_grad and id(p) not in inside for p in model.parameters())
        self._model = model
        self._head = Head.of(decoder) if frozen else None

    @contextmanager
    def made_inside(self, labels: torch.Tensor, divisor: torch.Tensor | int) -> Iterator[None]:
        """Let the model's forward return the loss instead of logits, where it can.

        Args:
            labels: (B, T) int64 token ids, unshifted; -100 where nothing is predicted.
            divisor: the tokens that are predicted, in all that belongs to one step.
        """
        head, run = self._head, self._model.forward
        if head is None or not head.by_rows:
            yield
            return

        def forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with replaced(self._model, run):
                states = head.reached_by(run, *args, **kwargs)
                loss = mean_loss(head, states, labels, divisor=divisor)
                return {"loss": loss.to(labels.device)}  # the states may be on the last of several

        with replaced(self._model, forward):
            yield

    @staticmethod
    def of(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        """Take the loss that a forward made, or make it of its logits.

        Args:
            outputs: of a forward inside :meth:`made_inside`.
            labels: as there.
            num_items_in_batch: the divisor, by the Trainer's name.

        Returns:
            A float32 scalar, in nats.
        """
        loss: torch.Tensor | None = outputs.get("loss")
        return summed_loss(outputs["logits"], labels) / num_items_in_batch if loss is None else loss


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
            shares = missed.square().sum(-1) / expected.square().sum(-1)
            errors.append(shares.sum().to(input_ids.device))
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

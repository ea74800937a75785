"""The losses that a healing minimises: of the next token, or the divergence from a teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.head import FEWEST_ROWS, Head, divergence_terms, part_sizes, replaced

_ROWS = 128
"""Rows of logits that are in float32 at a time, at most."""

_LOGITS = 1 << 23
"""Logits that are in float32 at a time, at most, if that leaves as many rows as keep the bits."""


Lesson = Callable[[slice], torch.Tensor]
"""Gives a teacher's (R, V) logits for a range of a forward's tokens, counted over all sequences."""


def _row_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor | float,
    lesson: Lesson | None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the loss of every row in float32, a few rows at a time.

    It is logsumexp z − z[target], or KL(p ‖ q) where there is a lesson of p; 0 where the target is
    negative. The ``first`` row is that of the lesson. The gradient of ``scale`` times their sum is
    of the logits' dtype, so that no float32 copy of all logits exists.
    """
    teacher = None
    if lesson is not None:
        teacher = lesson(slice(first, first + len(logits))).to(logits.device)
    gradient = torch.empty_like(logits)
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    size = min(_ROWS, max(FEWEST_ROWS, _LOGITS // logits.shape[1]))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        rows = logits[part].to(torch.float32, copy=True)
        counts = targets[part, None] >= 0
        log_sum = rows.logsumexp(-1, keepdim=True)
        if teacher is None:
            expected = targets[part, None].clamp(min=0)
            of_rows = log_sum - rows.gather(1, expected)
            errors = rows.sub_(log_sum).exp_()
            errors.scatter_add_(1, expected, torch.full_like(log_sum, -1))
        else:
            of_rows, errors = _divergence(teacher[part], rows.sub_(log_sum))
        losses[part] = (of_rows * counts).squeeze(1)
        gradient[part] = errors.mul_(counts).mul_(scale)
    return losses, gradient


def _divergence(teacher: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p ‖ q) of rows, (R, 1), and its gradient q − p, into which ``log_q`` is turned."""
    log_p = teacher.to(torch.float32, copy=True)
    log_p.sub_(log_p.logsumexp(-1, keepdim=True))  # as q is made: equal logits give 0 exactly
    terms, p, q = divergence_terms(log_p, log_q)
    return terms.sum(-1, keepdim=True), q.sub_(p)


class _KnownGradient(torch.autograd.Function):
    """A loss with its gradient to what it was made of, which was made at once, and is kept."""

    @staticmethod
    def forward(
        ctx: Any, _given: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def _row_losses_of_states(
    head: Head,
    states: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    lesson: Lesson | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the same from final states, (N, D), whose logits exist a few rows at a time.

    Gradients are those of the states alone; the head gets none.
    """
    gradient = torch.empty_like(states)
    losses = []
    copies = 2 if lesson is None else 3  # their gradient is as large, and the teacher's
    sizes = part_sizes(len(states), copies * head.vocab_size)
    start = 0
    for rows, expected, found in zip(
        states.split(sizes), targets.split(sizes), gradient.split(sizes), strict=True
    ):
        with torch.enable_grad():
            given = rows.detach().requires_grad_()
            logits = head.logits(given)
        here = expected.to(logits.device), scale.to(logits.device)
        of_rows, errors = _row_losses(logits.detach(), *here, lesson, start)
        start += len(rows)
        losses.append(of_rows.to(states.device))
        found.copy_(torch.autograd.grad(logits, given, errors)[0])
        del logits, errors
    return torch.cat(losses), gradient


def summed_loss(
    logits: torch.Tensor, labels: torch.Tensor, lesson: Lesson | None = None
) -> torch.Tensor:
    """Sum the losses of the tokens that are predicted, in nats, a float32 scalar.

    No float32 copy of the logits, (B, T, V) of any float dtype, is made. The labels, (B, T), are
    unshifted token ids, -100 where nothing is predicted. Without a lesson the loss is the
    cross-entropy.
    """
    rows = logits.flatten(0, 1)
    with torch.no_grad():
        losses, gradient = _row_losses(rows, _expected(labels).to(logits.device), 1.0, lesson)
        total = losses.double().sum().float()
    loss: torch.Tensor = _KnownGradient.apply(rows, total, gradient)
    return loss


def mean_loss(
    head: Head,
    states: torch.Tensor,
    labels: torch.Tensor,
    *,
    divisor: torch.Tensor | int,
    lesson: Lesson | None = None,
) -> torch.Tensor:
    """Take the mean loss as :func:`summed_loss` from (B, T, D) final states, without all logits.

    The divisor is the number of tokens that are predicted in all that belongs to one step. The
    weights of the head get no gradient.
    """
    rows, expected = states.flatten(0, 1), _expected(labels)
    count = torch.as_tensor(divisor, dtype=torch.float32, device=states.device)
    with torch.no_grad():
        losses, gradient = _row_losses_of_states(head, rows, expected, 1 / count, lesson)
        mean = losses.double().sum().float() / count
    loss: torch.Tensor = _KnownGradient.apply(rows, mean, gradient)
    return loss


def _expected(labels: torch.Tensor) -> torch.Tensor:
    """The next token of every token, -100 where there is none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1).flatten()


@torch.no_grad()
def teach(teacher: Head, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Lesson:
    """Run the uncut model on the tokens of a forward, (B, T), and give its logits by rows.

    Its final states, (B, T, D), are kept; logits are made of a few of them at a time.
    """
    model = teacher.decoder.model
    with evaluating(model):
        if not teacher.by_rows:
            whole = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            known = whole.logits.flatten(0, 1)
            return lambda tokens: known[tokens]
        states = teacher.states(input_ids, attention_mask).flatten(0, 1)

    @torch.no_grad()
    def logits(tokens: slice) -> torch.Tensor:
        return teacher.logits(states[tokens])

    return logits


class TrainingLoss:
    """The loss of a trained model, made inside its forward, below peft, accelerate and DDP.

    All logits are made where the head is trained or takes more than states; the bare model is
    probed once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = Decoder.of(model)
        inside = {id(p) for layer in decoder.layers.modules for p in layer.parameters()}
        frozen = not any(p.requires_grad and id(p) not in inside for p in model.parameters())
        self._model = model
        self._head = Head.of(decoder) if frozen else None

    @contextmanager
    def made_inside(
        self, labels: torch.Tensor, divisor: torch.Tensor | int, lesson: Lesson | None = None
    ) -> Iterator[None]:
        """Let the model's forward return the loss, as :func:`mean_loss`, where it can or must."""
        head, run = self._head, self._model.forward
        by_rows = head is not None and head.by_rows
        if not by_rows and lesson is None:
            yield
            return

        def forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with replaced(self._model, run):
                if head is not None and by_rows:
                    states = head.reached_by(run, *args, **kwargs)
                    loss = mean_loss(head, states, labels, divisor=divisor, lesson=lesson)
                else:
                    loss = summed_loss(run(*args, **kwargs).logits, labels, lesson) / divisor
                return {"loss": loss.to(labels.device)}  # the states may be on the last of several

        with replaced(self._model, forward):
            yield

    @staticmethod
    def of(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        """The loss that a forward inside :meth:`made_inside` made, or one of its logits.

        The divisor is ``num_items_in_batch``, the Trainer's name for it.
        """
        loss: torch.Tensor | None = outputs.get("loss")
        return summed_loss(outputs["logits"], labels) / num_items_in_batch if loss is None else loss

"""What the uncut model teaches a cut that is trained: its distributions, and its states."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.architecture import evaluating, find_layers
from ..models.decoder import Decoder
from ..models.head import Head
from ..values.layers import Block
from ..values.plan import Plan
from .losses import Lesson


class Teacher:
    """The uncut model beside its cut, for the divergence of next-token distributions.

    It runs on the tokens of every forward, and keeps its final states, (B, T, D); logits are made
    of a few of them at a time.

    Args:
        model: the uncut model; it runs once, on a few tokens.
        share: of the divergence in the loss.
    """

    def __init__(self, model: PreTrainedModel, share: float) -> None:
        self._share = share
        self._head = Head.of(Decoder.of(model))

    @torch.no_grad()
    def lesson(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Lesson:
        """Run on the tokens of a forward.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 at tokens and 0 at padding.

        Returns:
            What there is to say of them.
        """
        head, model = self._head, self._head.decoder.model
        with evaluating(model):
            if not head.by_rows:
                whole = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
                known = whole.logits.flatten(0, 1)
                return Lesson(lambda tokens: known[tokens], self._share)
            states = head.states(input_ids, attention_mask).flatten(0, 1)

        @torch.no_grad()
        def logits(tokens: slice) -> torch.Tensor:
            return head.logits(states[tokens])

        return Lesson(logits, self._share)


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
        self._of_student = _States(student, [join_of(plan, block) for block in plan.blocks])
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


def join_of(plan: Plan, block: Block) -> int:
    """Find where a cut joins its layers.

    Args:
        plan: of the cut.
        block: one of its blocks.

    Returns:
        The number of the cut model's state that is where the block was.
    """
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

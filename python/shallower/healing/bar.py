"""The bar of a training: its steps, and what is done of the one that runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..progress import track
from ..texts.quiet import hushed

with hushed():
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Reach = Callable[[float, str], None]
"""Reports that so many steps are done, with a note on the last one that is whole."""


@contextmanager
def steps_bar(steps: int, show: bool | None) -> Iterator[Reach]:
    """Show a bar of steps, of which a training that begins again repeats some."""
    reached = 0.0
    with track("heal", steps, show) as advance:

        def reach(step: float, note: str) -> None:
            nonlocal reached
            ahead = max(0.0, step - reached)
            reached += ahead
            advance(ahead, note and f"step {step:,.0f}, {note}")

        yield reach


class Throughput(TrainerCallback):
    """Times the steps, of so many tokens each, (steps,), and reports them, and what is done of one.

    A layer that has run forward is a third of what it is in a step, and backward the rest.
    """

    def __init__(self, tokens: NDArray[np.int64], reach: Reach) -> None:
        self._tokens, self._reach = tokens, reach
        self._began = 0.0
        self._seconds, self._trained = 0.0, 0
        self._done, self._next, self._forward = 0.0, 0.0, 0.0

    @contextmanager
    def watching(self, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Report the layers that run in a step, while the body trains."""

        def move(thirds: int) -> None:
            self._done = min(self._next, self._done + thirds / 3 / len(layers) * self._forward)
            self._reach(self._done, "")

        def count(_layer: object, _args: object, output: Any) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            move(1)
            if states.requires_grad:
                states.register_hook(lambda _: move(2))

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_hook(count).remove)
            yield

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the steps of this process; None if there were none."""
        return self._trained / self._seconds if self._trained else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the steps that an earlier run has done."""
        self._reach(state.global_step, "")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()
        self._forward = 1 / args.gradient_accumulation_steps
        self._done, self._next = state.global_step, state.global_step + self._forward

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Go on to the next forward of the step."""
        self._done, self._next = self._next, self._next + self._forward

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the clock once a GPU has done its work; count the step's tokens."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._forward = 0.0  # what runs between two steps measures
        self._seconds += time.perf_counter() - self._began
        self._trained += int(self._tokens[state.global_step - 1])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Report a step, its loss and the speed so far."""
        if logs and "loss" in logs:
            speed = self._trained / max(self._seconds, 1e-9)
            self._reach(state.global_step, f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")

"""The Trainer's callbacks: speed, checkpoints, and the stop of a training that diverges."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ModelError
from ..progress import Advance
from . import trainer_checkpoints
from .ranks import agree

SECONDS_BETWEEN_CHECKPOINTS = 120.0


class StepsOnce:
    """Reports every step once, though a training that begins again does some anew.

    Args:
        advance: told of every step.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance, self._reached = advance, 0

    def reach(self, step: int, note: str = "") -> None:
        """Report a step, and all before it.

        Args:
            step: how many steps are done.
            note: what is said of the last one.
        """
        self._advance(max(0, step - self._reached), note)
        self._reached = max(step, self._reached)


class Throughput(TrainerCallback):
    """Times the steps, and reports them.

    Args:
        tokens: tokens of every step, (steps,).
        report: told of every step.
    """

    def __init__(self, tokens: NDArray[np.int64], report: StepsOnce) -> None:
        self._tokens, self._report = tokens, report
        self._began = 0.0
        self._seconds, self._trained = 0.0, 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the steps of this process; None if there were none."""
        return self._trained / self._seconds if self._trained else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the steps that an earlier run has done."""
        self._report.reach(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the clock, once a GPU has done what it was asked for; count the step's tokens."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
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
            self._report.reach(state.global_step, f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")


class StopOnNonFinite(TrainerCallback):
    """Stops a training whose loss is NaN or infinite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Raise a ModelError if the loss is not finite."""
        if logs and "loss" in logs and not math.isfinite(logs["loss"]):
            raise ModelError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower the "
                f"learning rate (learning_rate, --learning-rate)"
            )


class CheckpointCallback(TrainerCallback):
    """Asks for the measurement before the first step and for checkpoints between the regular
    ones; marks complete checkpoints, and deletes those that are no longer needed.

    Args:
        trainer: the Trainer that calls back.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._saved = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the held-out loss before the first step."""
        if state.global_step == 0 and args.eval_strategy != "no":
            self._trainer.evaluate()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint if the last one is old."""
        if agree(lambda: time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS):
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint, and delete those that are no longer needed."""
        self._trainer.accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(str(args.output_dir))
            trainer_checkpoints.mark_complete(
                trainer_checkpoints.of_step(folder, state.global_step)
            )
            trainer_checkpoints.keep(folder, {state.global_step, state.best_global_step or 0})
        self._saved = time.monotonic()

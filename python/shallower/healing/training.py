"""The training: transformers' Trainer over peft's adapters, resumable at any moment.

Steps, order and random numbers depend on the recipe and the checkpoint alone, so that a resumed
run ends with the bits of an uninterrupted one on the CPU.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..errors import ModelError, OutputError
from ..memory.retry import Shrinking
from ..models.dtypes import computing
from ..models.feed_forward import Targets
from ..models.offload import is_offloaded
from ..processes import num_processes
from ..progress import Advance
from ..texts.sequences import Samples, collate, order
from ..values.healing import Measured, Step
from ..values.loss import FIGURES, Loss
from ..values.recipe import GLOBAL_BATCH, Resolved
from . import trainer_checkpoints
from .callbacks import CheckpointCallback, StepsOnce, StopOnNonFinite, Throughput
from .determinism import deterministic
from .distillation import Distillation, Teacher
from .losses import TrainingLoss
from .ranks import agree
from .trainer_arguments import trainer_arguments


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training.

    Attributes:
        steps: training loss and rate, step by step.
        held_out: held-out losses and the steps that they were measured after.
        best_step: the step whose adapters are kept.
        checkpoint: the folder that holds them.
        tokens_per_second: speed of the training alone, since this process began; None if it
            had nothing left to do.
        recipe: the settings at the end, of which the size of a forward may have changed.
    """

    steps: tuple[Step, ...]
    held_out: tuple[Measured, ...]
    best_step: int
    checkpoint: Path
    tokens_per_second: float | None
    recipe: Resolved


def add_adapters(model: PreTrainedModel, targets: Targets, recipe: Resolved, *, base: str) -> Any:
    """Freeze a model and put float32 adapters on it.

    Args:
        model: a causal language model, quantised or not.
        targets: the linear maps to adapt.
        recipe: the settings; alpha is the rank.
        base: the name that the adapters remember their model by.

    Returns:
        peft's model around ``model``.

    Raises:
        ModelError: peft adapts other weights than ``targets``; or layers are offloaded.
    """
    from peft import LoraConfig, get_peft_model

    if is_offloaded(model):
        raise ModelError(
            f"layers of {type(model).__name__} wait in the memory of the CPU, where adapters "
            f"cannot be trained: heal in 4 bits (dtype, --dtype nf4), heal a smaller model, or "
            f"take a GPU with more memory"
        )
    torch.manual_seed(recipe.seed)
    modules, parameters = _named(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.rank,
        lora_dropout=recipe.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=targets.transposed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that peft uses an old name of transformers
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    count = sum(name.endswith(".lora_A") for name, _ in adapted.named_modules())
    if count != len(targets):
        raise ModelError(
            f"peft put adapters on {count} weights of {type(model).__name__}, not on the "
            f"{len(targets)} of its feed-forward parts: try plain weights (dtype, --dtype bfloat16)"
        )
    module: Any
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast does, in bfloat16
    return adapted


def _named(model: PreTrainedModel, targets: Targets) -> tuple[list[str], list[str]]:
    """The targets as peft takes them, modules and parameters.

    In models with fused experts peft takes ``gate_proj`` and the like for what experts were named
    in transformers 4, wherever it stands; so plain weights are all named as parameters there.
    """
    if not targets.parameters:
        return list(targets.modules), []
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in targets.modules}
    plain = [name for name, weight in weights.items() if _is_plain(weight)]
    rest = [name for name in targets.modules if name not in plain]
    return rest, [*targets.parameters, *(f"{name}.weight" for name in plain)]


def _is_plain(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.is_floating_point()


def train(
    model: Any,
    samples: Samples,
    recipe: Resolved,
    *,
    folder: Path,
    held_out: Callable[[int], Loss] | None,
    advance: Advance,
    distillation: Distillation | None = None,
    teacher: Teacher | None = None,
    automatic: Collection[str] = (),
) -> Trained:
    """Train the adapters of a model, going on from what ``folder`` holds.

    Args:
        model: what :func:`add_adapters` gave.
        samples: the sequences to train on.
        recipe: the settings.
        folder: the folder of checkpoints; with several processes, one that all of them see.
        held_out: measures the held-out loss of the model as it is after so many steps; None to
            measure nothing.
        advance: told of every step.
        distillation: added to the loss with the recipe's weight.
        teacher: the uncut model, if the objective compares with it.
        automatic: names of the settings that may be changed where memory is short, of
            ``batch_size`` and ``recompute``; one process does.

    Returns:
        Losses, the step that is kept, and its checkpoint.

    Raises:
        ModelError: the loss is not finite.
        RecipeError: there is not enough memory.
        OutputError: a checkpoint cannot be written.
    """
    shrinking = Shrinking(model, recipe, automatic if num_processes() == 1 else ())
    report = StepsOnce(advance)

    def attempt(recipe: Resolved) -> Trained:
        return _train(
            model, samples, recipe, folder=folder, held_out=held_out, distillation=distillation,
            teacher=teacher, report=report,
        )  # fmt: skip

    with _quiet_trainer(), deterministic(next(model.parameters()).device):
        return shrinking.run(attempt)


def _train(
    model: Any,
    samples: Samples,
    recipe: Resolved,
    *,
    folder: Path,
    held_out: Callable[[int], Loss] | None,
    distillation: Distillation | None,
    teacher: Teacher | None,
    report: StepsOnce,
) -> Trained:
    """Train by these very settings."""
    taken = order(len(samples), recipe.steps * GLOBAL_BATCH, recipe.seed)
    lengths = np.array([len(row) for row in samples.rows])
    throughput = Throughput(lengths[taken].reshape(recipe.steps, GLOBAL_BATCH).sum(axis=1), report)
    trainer = _Trainer(
        model, trainer_arguments(model, recipe, folder, measured=held_out is not None),
        OrderedDataset(samples, taken), recipe, held_out, distillation,
        [throughput, StopOnNonFinite()], teacher,
    )  # fmt: skip
    trainer.add_callback(CheckpointCallback(trainer))
    checkpoint = agree(lambda: _last_checkpoint(folder))
    try:
        with warnings.catch_warnings():
            # peft's, of a patched cut that comes to its place with the adapters
            warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
            trainer.train(resume_from_checkpoint=checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_about_writing(error):
            raise
        raise OutputError(f"cannot write a checkpoint of the healing: {error}") from error
    return _trained(trainer, folder, throughput, recipe)


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint, alone of all that an earlier run left."""
    trainer_checkpoints.discard_incomplete(folder)
    checkpoint = trainer_checkpoints.last(folder)
    return str(checkpoint) if checkpoint else None


_WRITING = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream",
    "unexpected pos",
    "No space left",
)
"""Words of what torch raises where a file cannot be written; it has no class of its own."""


def _is_about_writing(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return True
    return any(word in str(error) for word in _WRITING)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Hold back what the Trainer says of settings that are ours."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class OrderedDataset(torch.utils.data.Dataset[NDArray[np.uint32]]):
    """The samples in the order that they are taken, all steps one after the other."""

    def __init__(self, samples: Samples, taken: NDArray[np.int64]) -> None:
        self._samples, self._taken = samples, taken

    def __len__(self) -> int:
        return len(self._taken)

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self._samples.rows[self._taken[index]]


def _collate(rows: Sequence[NDArray[np.uint32]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in collate(rows)}


class _Trainer(Trainer):
    """The Trainer with our losses, held-out and of training, and our arithmetic."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        dataset: OrderedDataset,
        recipe: Resolved,
        held_out: Callable[[int], Loss] | None,
        distillation: Distillation | None,
        callbacks: list[TrainerCallback],
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            data_collator=_collate,
            train_dataset=dataset,
            eval_dataset=dataset if held_out else None,  # never read: see evaluate
            compute_loss_func=TrainingLoss.of,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._recipe, self._held_out, self._distillation = recipe, held_out, distillation
        self._teacher = teacher
        with computing(recipe, arguments.device):
            self._loss = TrainingLoss(model.get_base_model())

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(computing(self._recipe, self.args.device))
        return stack

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        divisor = options["num_items_in_batch"]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        lesson = None if self._teacher is None else self._teacher.lesson(ids, mask)
        made = self._loss.made_inside(inputs["labels"], divisor, lesson)
        if self._distillation is None:
            with made:
                return super().compute_loss(model, inputs, return_outputs, **options)
        with made, self._distillation.watching():
            loss = super().compute_loss(model, inputs, False, **options)
        # As many tokens are matched as are predicted, so both have the same divisor.
        scale = self._recipe.distill * self.accelerator.num_processes
        return loss + scale * self._distillation.summed(ids, mask) / divisor

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        assert self._held_out is not None
        loss = self._held_out(self.state.global_step)
        metrics = {"eval_loss": loss.nats, **{f"held_out_{k}": v for k, v in _flat(loss).items()}}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _flat(loss: Loss) -> dict[str, Any]:
    return {name: getattr(loss, name) for name in FIGURES}


def _trained(trainer: _Trainer, folder: Path, throughput: Throughput, recipe: Resolved) -> Trained:
    history: list[dict[str, Any]] = trainer.state.log_history
    steps = tuple(
        Step(entry["step"], entry["loss"], entry["learning_rate"])
        for entry in history
        if "loss" in entry
    )
    held_out = tuple(
        Measured(entry["step"], Loss(**{name: entry[f"held_out_{name}"] for name in FIGURES}))
        for entry in history
        if "eval_loss" in entry
    )
    best = trainer.state.best_global_step or trainer.state.global_step
    checkpoint = trainer_checkpoints.of_step(folder, best)
    return Trained(steps, held_out, best, checkpoint, throughput.tokens_per_second, recipe)

"""The training: transformers' Trainer over peft's adapters, resumable bit for bit on the CPU.

Steps, order and random numbers depend on the recipe and the checkpoint alone.
"""

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import ModelError, OutputError, why
from ..memory.retry import train_within
from ..models.architecture import find_layers
from ..models.dtypes import CUBLAS_WORKSPACE, computing
from ..models.feed_forward import Targets
from ..models.head import Head
from ..models.offload import is_offloaded
from ..processes import num_processes
from ..results.healing import OptimiserStep
from ..results.loss import FIGURES, Loss
from ..settings.recipe import GLOBAL_BATCH, Resolved
from ..texts.quiet import hushed
from ..texts.sequences import Sample, Samples, collate, mixed_order
from . import folders
from .bar import Reach, Throughput
from .losses import TrainingLoss, teach
from .ranks import agree

_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
RECOMPUTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"
"""What transformers calls it; it was renamed with 5.23."""


def recompute_activations(model: Any, on: bool) -> None:
    """Have activations recomputed in the backward pass, or kept."""
    if on:
        getattr(model, "_".join((RECOMPUTING, "enable")))({"use_reentrant": False})
    else:
        getattr(model, "_".join((RECOMPUTING, "disable")))()


with hushed():  # the Trainer imports peft, and that bitsandbytes, which advises to get a kernel
    from transformers import (
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

SECONDS_BETWEEN_CHECKPOINTS = 120.0

_FLASH = "FLASH_ATTENTION_DETERMINISTIC"


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, on what, and how."""

    model: Any  # of :func:`add_adapters`
    samples: Samples  # sequences to train on
    recipe: Resolved
    folder: Path  # of checkpoints, for all processes to see
    held_out: Callable[[int], Loss] | None = None  # measures the loss after so many steps
    teacher: Head | None = None  # of the uncut model, if the objective compares with it


def add_adapters(model: PreTrainedModel, targets: Targets, recipe: Resolved, *, base: str) -> Any:
    """Freeze a model and give it, inside peft's, with float32 adapters; alpha is the rank.

    Adapters name the model ``base``.
    """
    from peft import LoraConfig, get_peft_model

    if is_offloaded(model):
        raise ModelError(
            f"layers of {type(model).__name__} are kept in CPU memory, where adapters "
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
        adapted: Any = get_peft_model(model, config)
    adapted.create_or_update_model_card = lambda _folder: None  # of a checkpoint, which none reads
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
            module.cast_input_dtype_enabled = False  # autocast casts the weights, a third faster
    return adapted


def _named(model: PreTrainedModel, targets: Targets) -> tuple[list[str], list[str]]:
    """The targets as peft takes them, modules and parameters."""
    # In models with fused experts peft takes gate_proj and the like for what experts were named
    # in transformers 4, wherever it stands; so plain weights are all named as parameters there.
    if not targets.parameters:
        return list(targets.modules), []
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in targets.modules}
    plain = [name for name, weight in weights.items() if _is_plain(weight)]
    rest = [name for name in targets.modules if name not in plain]
    return rest, [*targets.parameters, *(f"{name}.weight" for name in plain)]


def _is_plain(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.is_floating_point()


def train(training: Training, reach: Reach, adjustable: Collection[str] = ()) -> dict[str, Any]:
    """Train the adapters of a model, from the checkpoints of an earlier run if there are any.

    Returns fields of the :class:`Healing`: its recipe may have smaller forwards, and the adapters
    of its best step are in the checkpoint of that. ``reach`` is called for every step.
    ``adjustable`` names the settings that one process may change where memory is short, of
    ``batch_size`` and ``recompute``.
    """
    automatic = adjustable if num_processes() == 1 else ()
    with _quiet_trainer(), deterministic(next(training.model.parameters()).device):
        return train_within(
            training.model,
            training.recipe,
            lambda recipe: _train(replace(training, recipe=recipe), reach),
            automatic=automatic,
        )


def _train(training: Training, reach: Reach) -> dict[str, Any]:
    """Train by these very settings."""
    samples, recipe = training.samples, training.recipe
    total = recipe.steps * GLOBAL_BATCH
    taken = mixed_order(samples, total, share=recipe.share, seed=recipe.seed)
    lengths = np.array([len(row) for row in samples.rows])
    throughput = Throughput(lengths[taken].reshape(recipe.steps, GLOBAL_BATCH).sum(axis=1), reach)
    trainer = _Trainer(
        training,
        trainer_arguments(training),
        [samples.rows[index] for index in taken],
        [throughput],
    )
    trainer.add_callback(CheckpointCallback(trainer))
    layers = [*find_layers(training.model.get_base_model()).modules]
    checkpoint = agree(lambda: _last_checkpoint(training.folder))
    try:
        with warnings.catch_warnings(), throughput.watching(layers):
            # peft's, of a patched cut that comes to its place with the adapters
            warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
            trainer.train(resume_from_checkpoint=checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_about_writing(error):
            raise
        raise _no_checkpoint(training, error) from error
    return _trained(trainer, throughput)


def _no_checkpoint(training: Training, error: Exception) -> OutputError:
    """Say that a checkpoint cannot be written, for which torch has no word of its own."""
    reason = "the disk is full or failed" if isinstance(error, RuntimeError) else why(error)
    on = f"do the same again to go on from step {folders.last_step(training.folder)}"
    place = f"cannot write a checkpoint of the healing in {training.folder}"
    return OutputError(f"{place}: {reason}; make room, and {on}")


def _last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint, alone of all that an earlier run left."""
    folders.discard_incomplete(folder)
    step = folders.last_step(folder)
    return str(folders.of_step(folder, step)) if step else None


_WRITING = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream",
    "unexpected pos",
    "No space left",
)
"""Words of torch's error where a file cannot be written; it has no class of its own."""


def _is_about_writing(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return True
    return any(word in str(error) for word in _WRITING)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Hold back the Trainer's warnings about settings that are ours."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _collate(rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in collate(rows)}


class _Trainer(Trainer):
    """The Trainer with our losses, held-out and of training, and our arithmetic."""

    def __init__(
        self,
        training: Training,
        arguments: TrainingArguments,
        dataset: Any,  # the samples in the order that they are taken
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=training.model,
            args=arguments,
            data_collator=_collate,
            train_dataset=dataset,
            eval_dataset=dataset if training.held_out else None,  # never read: see evaluate
            compute_loss_func=TrainingLoss.of,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.training = training
        with computing(training.recipe, arguments.device):
            self._loss = TrainingLoss(training.model.get_base_model())

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(computing(self.training.recipe, self.args.device))
        return stack

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        teacher, lesson = self.training.teacher, None
        if teacher is not None:
            lesson = teach(teacher, inputs["input_ids"], inputs["attention_mask"])
        with self._loss.made_inside(inputs["labels"], options["num_items_in_batch"], lesson):
            return super().compute_loss(model, inputs, return_outputs, **options)

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        assert self.training.held_out is not None
        loss = self.training.held_out(self.state.global_step)
        figures = {f"held_out_{name}": getattr(loss, name) for name in FIGURES}
        metrics = {"eval_loss": loss.nats, **figures}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ModelError(
                f"the training loss is {logs['loss']} at step {self.state.global_step}: lower the "
                f"learning rate (learning_rate, --learning-rate)"
            )


def _trained(trainer: _Trainer, throughput: "Throughput") -> dict[str, Any]:
    history: list[dict[str, Any]] = trainer.state.log_history
    steps = tuple(
        OptimiserStep(entry["step"], entry["loss"], entry["learning_rate"])
        for entry in history
        if "loss" in entry
    )
    held_out = {
        entry["step"]: Loss(**{name: entry[f"held_out_{name}"] for name in FIGURES})
        for entry in history
        if "eval_loss" in entry
    }
    return {
        "recipe": trainer.training.recipe,
        "steps": steps,
        "held_out": held_out,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "tokens_per_second": throughput.tokens_per_second,
    }


def trainer_arguments(training: Training) -> TrainingArguments:
    """Name a recipe's settings as the Trainer does; they decide the device as well."""
    recipe, measured = training.recipe, training.held_out is not None
    recomputing: dict[str, Any] = {
        RECOMPUTING: recipe.recompute,
        "_".join((RECOMPUTING, "kwargs")): {"use_reentrant": False} if recipe.recompute else None,
    }
    cuda = torch.cuda.is_available()
    adapters = [name for name, weight in training.model.named_parameters() if weight.requires_grad]
    arguments = TrainingArguments(
        output_dir=str(training.folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation(num_processes()),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.0,
        optim="adamw_torch",  # paged states cannot be loaded again, and adapters are small
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if measured else "no",
        eval_steps=recipe.eval_every,
        save_strategy="steps",
        save_steps=recipe.eval_every,
        metric_for_best_model="loss" if measured else None,
        greater_is_better=False,
        train_sampling_strategy="sequential",
        seed=recipe.seed,
        **recomputing,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        label_names=["labels"],
        # An expert that is a module of its own gets no gradient from texts that pass it by.
        ddp_find_unused_parameters=any("expert" in name for name in adapters),
        disable_tqdm=True,
        report_to="none",
        use_cpu=not cuda,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # however many this process sees
    return arguments


class CheckpointCallback(TrainerCallback):
    """Measures before the first step, keeps and marks checkpoints, and deletes needless ones."""

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
        """Save a checkpoint if the last one is old."""
        if agree(lambda: time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS):
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint, and delete those that are no longer needed."""
        self._trainer.accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(str(args.output_dir))
            folders.mark_complete(folders.of_step(folder, state.global_step))
            folders.keep(folder, {state.global_step, state.best_global_step or 0})
        self._saved = time.monotonic()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic algorithms alone in the body, on this device.

    Where cuBLAS began without a fixed workspace, as after CUDA work that came before shallower, a
    warning says that bits may differ.
    """
    # transformers' full_determinism does the same and sets CUDA_LAUNCH_BLOCKING besides, after
    # which every kernel is waited for, and nothing is more deterministic for it. It also replaces
    # the workspace of cuBLAS that the user chose.
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    flash = os.environ.get(_FLASH)
    try:
        memory.fill_uninitialized_memory = False  # a twentieth of the time
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        os.environ[_FLASH] = "1"  # read by transformers at every call
        with warnings.catch_warnings():
            if not _products_are_deterministic(device):
                _warn_of_late_setting()
                torch.use_deterministic_algorithms(True, warn_only=True)
                warnings.filterwarnings("ignore", f"(?s).*{CUBLAS_WORKSPACE}", UserWarning)
            yield
    finally:
        memory.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if flash is None:
            os.environ.pop(_FLASH, None)
        else:
            os.environ[_FLASH] = flash


def _products_are_deterministic(device: torch.device) -> bool:
    """Multiply: torch alone knows what cuBLAS read when its first handle was made."""
    square = torch.ones(2, 2, device=device)
    try:
        torch.mm(square, square)
    except RuntimeError as error:
        if CUBLAS_WORKSPACE not in str(error):
            raise
        return False
    return True


def _warn_of_late_setting() -> None:
    warnings.warn(
        f"this training may differ in its last bits when it is repeated: cuBLAS began without a "
        f"fixed workspace, as when CUDA was used in this process before. Set "
        f"{CUBLAS_WORKSPACE}=:4096:8 in the environment before the process starts",
        stacklevel=4,
    )

"""The settings that transformers' Trainer is given for a recipe."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..processes import num_processes
from ..values.recipe import Resolved


class _Arguments(TrainingArguments):
    """The Trainer's settings; a process trains on one GPU, however many it sees."""

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


def trainer_arguments(
    model: Any, recipe: Resolved, folder: Path, *, measured: bool
) -> TrainingArguments:
    """Put a recipe into the Trainer's words.

    Args:
        model: peft's model, whose adapters are trained.
        recipe: the settings.
        folder: the folder of checkpoints.
        measured: whether held-out losses are measured.

    Returns:
        The settings; they decide the device as well.
    """
    cuda = torch.cuda.is_available()
    adapters = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return _Arguments(
        output_dir=str(folder),
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
        activation_checkpointing=recipe.recompute,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.recompute else None,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        label_names=["labels"],
        # An expert that is a module of its own gets no gradient from texts that pass it by.
        ddp_find_unused_parameters=any("expert" in name for name in adapters),
        disable_tqdm=True,
        report_to="none",
        use_cpu=not cuda,
    )

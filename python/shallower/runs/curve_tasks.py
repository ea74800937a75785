"""The tasks of a curve: loaded once, known by their items, and the main measure of each."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values.hashing import hash_of
from ..values.provenance import LM_EVAL, versions
from ..values.task_scores import TaskScores
from ..values.tokens import BatchSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import ChosenTasks


@dataclass(frozen=True, kw_only=True)
class CurveTasks:
    """The tasks that a curve is measured on, loaded when they are first asked for.

    Attributes:
        names: of the tasks.
        tasks_dir: a folder of further definitions.
        data: the folder in which task files find their data.
        max_items: items of a task at most.
        num_shots: solved examples before each item; as the task says by default.
        pass_at: answers to sample to each item of a task that is answered in text.
        batch_size: texts in one forward.
        seed: of the items, the examples and the sampled answers.
    """

    names: tuple[str, ...]
    tasks_dir: Path | None = None
    data: Path | None = None
    max_items: int | None = None
    num_shots: int | None = None
    pass_at: int | None = None
    batch_size: BatchSize = "auto"
    seed: int = 0

    @cached_property
    def chosen(self) -> "ChosenTasks":
        """The tasks with their items.

        Raises:
            TextsError: there is no such task, or its data is missing.
            MissingExtraError: lm-eval is not installed.
        """
        from ..evaluation.tasks import ChosenTasks

        return ChosenTasks.of(
            self.names, tasks_dir=self.tasks_dir, data=self.data, max_items=self.max_items,
            num_shots=self.num_shots, pass_at=self.pass_at, seed=self.seed,
        )  # fmt: skip

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that make losses and, where there are tasks, scores."""
        return versions(LM_EVAL) if self.names else versions()

    @cached_property
    def identity(self) -> str | None:
        """A hash of lm-eval, definitions, items and examples; None where there are no tasks."""
        if not self.names:
            return None
        found: list[Any] = [self.pass_at, self.versions.get(LM_EVAL)]
        for group in self.chosen.groups:
            for name, task in group.tasks.items():
                items = [task.eval_docs[index] for index in self.chosen.items[name]]
                solved = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
                found.append([group.name, name, task.dump_config(), items, solved])
        return hash_of([json.dumps(found, default=str)])

    def scores(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[TaskScores, ...]:
        """Ask a model as it is now.

        Args:
            model: with all of its layers or without some.
            tokenizer: its tokenizer.

        Returns:
            The main measure of every task, and behind it that of its sampled answers.

        Raises:
            TextsError, ModelError: a task cannot be done.
        """
        main: dict[str, TaskScores] = {}
        if self.names:
            for one in self.chosen.evaluate(
                model, tokenizer, batch_size=self.batch_size, progress=False
            ):
                main.setdefault(one.task, one)
                if one.metric == f"pass@{self.pass_at}":
                    name = f"{one.task} sampled"
                    main[name] = replace(one, task=name)
        return tuple(main.values())

    def to_json(self) -> dict[str, Any]:
        """Give what was asked for, but places, as plain JSON values."""
        names = {"names": list(self.names)}
        shots = {"num_shots": self.num_shots, "pass_at": self.pass_at}
        return {**names, "max_items": self.max_items, **shots}

"""The tasks of a study: loaded once, known by their items, and the main measure of each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values.hashing import hash_of
from ..values.provenance import LM_EVAL, versions
from ..values.settings import CurveSettings
from ..values.task_scores import TaskScores
from ..values.tokens import BatchSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import ChosenTasks


@dataclass(frozen=True, kw_only=True)
class StudyTasks:
    """The tasks that cuts are measured on, loaded when they are first needed; none by default.

    The fields are those of :class:`shallower.CurveSettings`.
    """

    names: Sequence[str] = ()
    tasks_dir: str | Path | None = None
    data: str | Path | None = None
    max_items: int | None = None
    num_shots: int | None = None
    pass_at: int | None = None
    batch_size: BatchSize = "auto"
    seed: int = 0

    @classmethod
    def of(cls, settings: CurveSettings) -> "StudyTasks":
        """The tasks of a curve."""
        return cls(
            names=settings.tasks,
            tasks_dir=settings.tasks_dir,
            data=settings.data,
            max_items=settings.max_items,
            num_shots=settings.num_shots,
            pass_at=settings.pass_at,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )

    @cached_property
    def chosen(self) -> "ChosenTasks":
        """The tasks with their items; raises TextsError or MissingExtraError."""
        from ..evaluation.tasks import ChosenTasks

        return ChosenTasks.of(
            self.names,
            tasks_dir=self.tasks_dir,
            data=self.data,
            max_items=self.max_items,
            num_shots=self.num_shots,
            pass_at=self.pass_at,
            seed=self.seed,
        )

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
        """Measure a model as it is now: each task, and behind it that of its sampled answers."""
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
        """Give the settings, but places, as plain JSON values."""
        names = {"names": list(self.names)}
        shots = {"num_shots": self.num_shots, "pass_at": self.pass_at}
        return {**names, "max_items": self.max_items, **shots}

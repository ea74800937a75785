"""The tasks of a study: loaded once, known by their items, and the main measure of each."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..values.hashing import hash_of
from ..values.provenance import LM_EVAL, versions
from ..values.settings import CurveSettings
from ..values.task_scores import TaskScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import ChosenTasks


@dataclass(frozen=True)
class StudyTasks:
    """The tasks of a curve that its cuts are measured on, loaded when they are first needed."""

    settings: CurveSettings

    @cached_property
    def chosen(self) -> "ChosenTasks":
        """The tasks with their items; raises TextsError or MissingExtraError."""
        from ..evaluation.tasks import ChosenTasks

        return ChosenTasks.of(self.settings.tasks, self.settings)

    @property
    def num_items(self) -> int:
        """The items of all tasks."""
        return sum(map(len, self.chosen.items.values())) if self.settings.tasks else 0

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that make losses and, where there are tasks, scores."""
        return versions(LM_EVAL) if self.settings.tasks else versions()

    @cached_property
    def identity(self) -> str | None:
        """A hash of lm-eval, definitions, items and examples; None where there are no tasks."""
        if not self.settings.tasks:
            return None
        found: list[Any] = [self.settings.pass_at, self.versions.get(LM_EVAL)]
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
        if self.settings.tasks:
            for one in self.chosen.evaluate(
                model, tokenizer, batch_size=self.settings.batch_size, progress=False
            ):
                main.setdefault(one.task, one)
                if one.metric == f"pass@{self.settings.pass_at}":
                    name = f"{one.task} sampled"
                    main[name] = replace(one, task=name)
        return tuple(main.values())

    def to_json(self) -> dict[str, Any]:
        """Give what the scores depend on, but places, as plain JSON values."""
        given = self.settings
        beside = {name: getattr(given, name) for name in ("max_items", "num_shots", "pass_at")}
        return {"names": list(given.tasks), **beside}

"""The tasks of a study: loaded once, known by their items, and the main measure of each."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..store.store import Store
from ..values.plan import Plan
from ..values.provenance import LM_EVAL, versions
from ..values.settings import CompareSettings
from ..values.task_scores import TaskScores
from .measures import ScoresOnTasks

if TYPE_CHECKING:
    from ..evaluation.kept import ResultStore
    from .measures import Loaded


@dataclass(frozen=True)
class StudyTasks:
    """The tasks that the cuts of a study are measured on, loaded when they are first needed."""

    settings: CompareSettings
    store: Store = field(default_factory=lambda: Store(None))

    @cached_property
    def measure(self) -> ScoresOnTasks:
        """The tasks with their items; raises TextsError or MissingExtraError."""
        return ScoresOnTasks(self.settings.tasks, self.settings, False)

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that make losses and, where there are tasks, scores."""
        return versions(LM_EVAL) if self.settings.tasks else versions()

    @cached_property
    def key(self) -> dict[str, Any] | None:
        """What the scores depend on beside the model; None where there are no tasks."""
        return self.measure.key(self.store) if self.settings.tasks else None

    def check(self) -> None:
        """Load the tasks, and find out what is wrong with them."""
        if self.settings.tasks:
            self.measure.prepare()

    def scores(
        self, loaded: "Loaded", plan: Plan | None = None, *, store: "ResultStore | None" = None
    ) -> tuple[TaskScores, ...]:
        """Score a model and its tokenizer; sampled answers behind.

        Of the whole model and a bare cut ``store`` has the scores that any command measured.
        """
        main: dict[str, TaskScores] = {}
        if self.settings.tasks:
            of: Any = {"tokens": self.measure.tokens, "plan": plan}
            for one in self.measure.kept(loaded, store, self.key, **of):
                main.setdefault(one.task, one)
                if one.metric == f"pass@{self.settings.pass_at}":
                    name = f"{one.task} sampled"
                    main[name] = replace(one, task=name)
        return tuple(main.values())

    def to_json(self) -> dict[str, Any]:
        """Give what the scores depend on, but places, as plain JSON values."""
        given, beside = self.settings, ("max_items", "num_shots", "pass_at")
        return {"names": list(given.tasks), **{name: getattr(given, name) for name in beside}}

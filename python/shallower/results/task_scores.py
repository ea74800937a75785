"""TaskScores: what a model scores on the items of a task, paired with another by item."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TextsError
from ..values.schema import fields_of, finite, of_type
from .scores import Difference, Scores


@dataclass(frozen=True, slots=True)
class TaskScores:
    """One measure of a model on the items of a task; higher is better.

    Attributes:
        task: its name, as ``mmlu``.
        metric: the measure, as ``acc``, ``acc_norm``, ``exact_match`` or ``pass@4``.
        items: identities of the items, in the order of ``by_item``; of a group of tasks with the
            name of the task before it, as ``mmlu_anatomy/12``.
        by_item: the score of every item, of weight 1 each; mostly 0 or 1.
        num_shots: solved examples before each item.
        chance: the mean that a guess has; None where a guess cannot be right.
    """

    task: str
    metric: str
    items: tuple[str, ...] = field(repr=False)
    by_item: Scores = field(compare=False, repr=False)
    num_shots: int
    chance: float | None

    @property
    def mean(self) -> float:
        """The mean over items."""
        return self.by_item.mean

    @property
    def stderr(self) -> float:
        """The standard error of the mean over items; NaN for a single one."""
        return self.by_item.stderr

    @property
    def at_chance(self) -> bool:
        """Whether the mean is no more than two standard errors above that of a guess."""
        above = math.inf if self.chance is None else self.mean - self.chance
        return math.isfinite(self.stderr) and above <= 2 * self.stderr

    def minus(self, other: "TaskScores") -> Difference:
        """The paired difference to another model by the same measure of the same items.

        Else TextsError.
        """
        mine, theirs = (self.task, self.metric), (other.task, other.metric)
        if mine != theirs or self.items != other.items or self.num_shots != other.num_shots:
            raise TextsError(
                f"scores cannot be paired: {'/'.join(mine)} of {len(self.items)} items with "
                f"{self.num_shots} examples, and {'/'.join(theirs)} of {len(other.items)} with "
                f"{other.num_shots}; measure both on the same items"
            )
        return self.by_item.minus(other.by_item)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values; ``stderr`` is None where there is none."""
        return {
            "task": self.task,
            "metric": self.metric,
            "mean": self.mean,
            "stderr": finite(self.stderr),
            "num_items": len(self.items),
            "num_shots": self.num_shots,
            "chance": self.chance,
            "at_chance": self.at_chance,
        }

    def to_record(self) -> dict[str, Any]:
        """As :meth:`to_json`, with ``items`` and ``by_item``, which :meth:`from_json` reads."""
        by_item = self.by_item.sums.tolist()
        return {**self.to_json(), "items": list(self.items), "by_item": by_item}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TaskScores":
        """Read what :meth:`to_record` gave; raises KeyError, TypeError, ValueError."""
        by_item = {"sums": of_type(dict, data)["by_item"], "weights": [1.0] * len(data["items"])}
        return cls(**fields_of(cls, {**data, "by_item": by_item}))

    def __str__(self) -> str:
        error = f" ± {100 * self.stderr:.1f}" if math.isfinite(self.stderr) else ""
        return f"{100 * self.mean:.1f}{error} %"

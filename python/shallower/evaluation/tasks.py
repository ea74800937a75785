"""What a model scores on tasks of lm-eval, item by item."""

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ShallowerError, TextsError, one_sentence
from ..models.decoder import Decoder
from ..results.scores import Scores
from ..results.task_scores import TaskScores
from ..settings.stages import EvalSettings
from ..settings.studies import CompareSettings
from ..texts.quiet import hushed
from ..values.provenance import LM_EVAL, hash_of, versions
from ..values.tokens import BatchSize
from .task_files import TaskGroup, find_tasks
from .task_model import TaskModel

LUCK = 4.0
"""Standard errors by which an answer that is always the same does better than guessing."""

SAMPLING: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 0,
}
"""How answers are sampled for pass@k, as Chen et al. (2021, arXiv 2107.03374) do."""


def evaluate_tasks(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    data: str | Path | None = None,
    max_items: int | None = None,
    num_shots: int | None = None,
    pass_at: int | None = None,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    progress: bool | None = None,
    description: str = "tasks",
) -> tuple[TaskScores, ...]:
    """Measure what a model scores on tasks of lm-eval.

    Args:
        model: a causal language model of transformers, quantised or not, on any device, with all
            of its layers or without some.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags: ours where there is a folder of data (boolq, gsm8k,
            hellaswag, lambada, mmlu); those in ``tasks_dir``; and lm-eval's own.
        tasks_dir: a folder of lm-eval's task files; its tasks go before others of their name.
        data: the folder in which task files find their data; by default that of the variable
            ``SHALLOWER_DATA``.
        max_items: items of a task at most, drawn by ``seed``; of a group evenly from its tasks.
            Fewer items are among more.
        num_shots: solved examples before each item; by default what the task file says. A task
            whose file says 0 keeps 0.
        pass_at: for tasks that are answered in text also sample so many answers to each item,
            and give ``pass@1`` and ``pass@K`` of them.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        seed: of the items, the examples and the sampled answers.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        description: the name of the bar.

    Returns:
        The scores by task and measure, task by task in the order of ``tasks``; the first of each
        task is its main measure: ``acc_norm`` where it has one, else the first that its file names.
        A group whose tasks have the same measures is one task.

    Raises:
        TextsError: there is no such task; a task file is damaged, or its data is missing; a task
            has no measure that is a mean over items.
        ModelError: the model cannot generate and a task needs text, or its logits are not
            finite.
        MissingExtraError: lm-eval is not installed.
    """
    settings = EvalSettings(
        tasks_dir=tasks_dir,
        data=data,
        max_items=max_items,
        num_shots=num_shots,
        pass_at=pass_at,
        seed=seed,
    )
    chosen = ChosenTasks.of(tasks, settings)
    return chosen.evaluate(
        model, tokenizer, batch_size=batch_size, progress=progress, description=description
    )


@dataclass(frozen=True)
class ChosenTasks:
    """Tasks that are loaded, with the items that were drawn: by task, ascending."""

    groups: tuple[TaskGroup, ...]
    items: Mapping[str, list[int]]
    pass_at: int | None
    seed: int

    @classmethod
    def of(cls, tasks: Sequence[str], settings: EvalSettings | CompareSettings) -> "ChosenTasks":
        """Load tasks and draw their items; see :func:`evaluate_tasks`."""
        max_items, seed = settings.max_items, settings.seed
        for name, least, value in (
            ("items", 1, max_items),
            ("examples", 0, settings.num_shots),
            ("answers", 1, settings.pass_at),
            ("seed", 0, seed),
        ):
            if value is not None and value < least:
                raise TextsError(f"the number of {name} must be at least {least}, got {value}")
        with hushed():
            groups = find_tasks(tasks, tasks_dir=settings.tasks_dir, data=settings.data)
            items: dict[str, list[int]] = {}
            for group in groups:
                for name, task in group.tasks.items():
                    _set_shots(task, settings.num_shots)
                    if name in items:
                        raise TextsError(f"task {name} is named twice, by itself and in a group")
                    items[name] = list(range(len(task.eval_docs)))
                if max_items is not None:
                    items |= draw_items(
                        {name: len(items[name]) for name in group.tasks}, max_items, seed
                    )
        return cls(tuple(groups), items, settings.pass_at, seed)

    @cached_property
    def identity(self) -> str:
        """A hash of lm-eval, definitions, rows, items, examples, and how answers are sampled."""
        found: list[Any] = [self.pass_at, self.seed, versions(LM_EVAL).get(LM_EVAL)]
        for group in self.groups:
            for name, task in group.tasks.items():
                drawn = self.items[name], list(task.eval_docs)  # chance is that of all rows
                solved = list(task.fewshot_docs()) if task.get_config("num_fewshot") else []
                found.append([group.name, name, task.dump_config(), *drawn, solved])
        # Of a function its name: where it lies in memory differs from process to process.
        named = json.dumps(
            found, default=lambda one: getattr(one, "__qualname__", None) or str(one)
        )
        return hash_of([named])

    def evaluate(
        self,
        model: PreTrainedModel | Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: BatchSize = "auto",
        progress: bool | None = None,
        description: str = "tasks",
    ) -> tuple[TaskScores, ...]:
        """Score a model; see :func:`evaluate_tasks`."""

        def adapted(sampling: Mapping[str, Any] | None, word: str) -> TaskModel:
            return TaskModel(
                Decoder.of(model),
                tokenizer,
                batch_size=batch_size,
                sampling=sampling,
                progress=progress,
                description=f"{description}{word}",
            )

        with hushed():
            tasks = {
                name: task
                for group in self.groups
                for name, task in group.tasks.items()
                if self.items[name]
            }
            answered = self._run(adapted(None, ""), tasks)
            generative = {
                name: task for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"
            }
            sampled = []
            for number in range(self.pass_at or 0 if generative else 0):
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed + number)
                    word = f", answer {number + 1} of {self.pass_at}"
                    sampled.append(self._run(adapted(SAMPLING, word), generative))
        return tuple(
            scores for group in self.groups for scores in _scores_of(group, answered, sampled)
        )

    def _run(self, model: TaskModel, tasks: Mapping[str, Any]) -> dict[str, "_Answers"]:
        """Run tasks through lm-eval."""
        from lm_eval.evaluator import evaluate

        for task in tasks.values():
            task.set_fewshot_seed(self.seed)
        try:
            result: Any = evaluate(
                lm=model.as_lm(),
                task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
                samples={name: self.items[name] for name in tasks},
                bootstrap_iters=0,
                log_samples=True,
            )
        except (ShallowerError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the functions of a task file raise
            named = ", ".join(tasks)
            raise TextsError(f"lm-eval cannot run {named}: {one_sentence(error)}") from error
        return {name: _Answers(task, result["samples"][name]) for name, task in tasks.items()}


class _Answers:
    """The scores of a task's items by measure, the main one first.

    ``chance`` is the mean of a guess, or of the answer that is right most often.
    """

    def __init__(self, task: Any, samples: Sequence[Mapping[str, Any]]) -> None:
        from lm_eval.api.metrics import mean

        aggregation, better = task.aggregation(), task.higher_is_better()
        found: dict[str, dict[int, float]] = {}
        for one in samples:
            for metric in one["metrics"]:
                value = one[metric]
                if not isinstance(value, int | float | np.number | np.bool_):
                    continue
                if aggregation.get(metric, mean) is mean and better.get(metric, True):
                    way = one["filter"]
                    name = metric if way == "none" else f"{metric},{way}"
                    found.setdefault(name, {})[one["doc_id"]] = float(value)
        main = next((name for name in found if name.split(",")[0] == "acc_norm"), None)
        self.by_metric = {name: found[name] for name in sorted(found, key=lambda one: one != main)}
        options = [len(one["arguments"]) for one in samples]
        several = getattr(task, "multiple_target", 0) or "acc_mutual_info" in aggregation
        self.chance = None
        if task.OUTPUT_TYPE == "multiple_choice" and not several:
            guess = math.fsum(1 / n for n in options) / len(options)
            self.chance = max(guess, _share_of_one_answer(task, guess))
        self.num_shots = int(task.get_config("num_fewshot") or 0)


@lru_cache(maxsize=128)
def _share_of_one_answer(task: Any, guess: float) -> float:
    """The share of items that are right by always giving the same answer, as yes; 0 where that
    is no more than a guess gets by luck.
    """
    try:
        right = Counter(str(task.doc_to_target(row)) for row in task.eval_docs)
    except Exception:  # rows that are not measured may be of any kind
        return 0.0
    ((_, most),) = right.most_common(1)
    luck = math.sqrt(guess * (1 - guess) / right.total())
    share = most / right.total()
    return share if share > guess + LUCK * luck else 0.0


def _scores_of(
    group: TaskGroup, answered: Mapping[str, _Answers], sampled: Sequence[Mapping[str, _Answers]]
) -> Iterator[TaskScores]:
    """The scores of a group as one task, where its tasks have the same measures."""
    names = [name for name in group.tasks if name in answered]
    kinds = {(tuple(answered[name].by_metric), answered[name].num_shots) for name in names}
    if group.together and len(kinds) == 1:
        yield from _one(group.name, names, answered, sampled)
        return
    for name in names:
        yield from _one(name, [name], answered, sampled)


def _one(
    title: str,
    names: Sequence[str],
    answered: Mapping[str, _Answers],
    sampled: Sequence[Mapping[str, _Answers]],
) -> Iterator[TaskScores]:
    mine = [answered[name] for name in names]
    metrics = list(mine[0].by_metric)
    if not metrics:
        raise TextsError(
            f"task {title} has no measure that is a mean over items, higher being better, so cuts "
            f"cannot be compared by it"
        )

    def joined(metric: str, values: Sequence[Mapping[int, float]], guess: bool) -> TaskScores:
        pairs = [
            (str(item) if len(names) == 1 else f"{name}/{item}", values[place][item])
            for place, name in enumerate(names)
            for item in sorted(values[place])
        ]
        by_item = np.array([value for _, value in pairs], np.float64)
        chance = None
        if guess and all(one.chance is not None for one in mine):
            sizes = [len(one) for one in values]
            chances = [one.chance or 0.0 for one in mine]
            chance = math.fsum(np.multiply(sizes, chances)) / sum(sizes)
        items = tuple(item for item, _ in pairs)
        scores = Scores(by_item, np.ones(len(by_item)))
        return TaskScores(title, metric, items, scores, mine[0].num_shots, chance)

    for metric in metrics:
        guess = metric.split(",")[0] in ("acc", "acc_norm", "acc_bytes")
        yield joined(metric, [one.by_metric[metric] for one in mine], guess)
    if not sampled or names[0] not in sampled[0]:
        return
    every = [[one[name].by_metric[metrics[0]] for one in sampled] for name in names]
    means = [{i: math.fsum(one[i] for one in of) / len(of) for i in of[0]} for of in every]
    yield joined("pass@1", means, False)
    if len(sampled) > 1:
        best = [{i: max(one[i] for one in of) for i in of[0]} for of in every]
        yield joined(f"pass@{len(sampled)}", best, False)


def draw_items(sizes: Mapping[str, int], most: int, seed: int) -> dict[str, list[int]]:
    """Draw items of a group of tasks, as evenly as their sizes allow: by task, ascending.

    Those of a task depend on nothing but its name, its size, its share and the seed; fewer of them
    are among more.
    """
    shares = dict.fromkeys(sizes, 0)
    order = [name for name in sizes if sizes[name]]
    np.random.default_rng(seed).shuffle(order)
    left = most
    while left and (open_tasks := [name for name in order if shares[name] < sizes[name]]):
        for name in open_tasks[:left]:
            shares[name] += 1
        left -= len(open_tasks[:left])
    return {
        name: sorted(
            np.random.default_rng([seed, zlib.crc32(name.encode())])
            .permutation(sizes[name])[:share]
            .tolist()
        )
        for name, share in shares.items()
    }


def _set_shots(task: Any, num_shots: int | None) -> None:
    """The examples before each item: a task whose file says none keeps none, as in lm-eval."""
    written = task.get_config("num_fewshot")
    if written is None or (num_shots is not None and written != 0):
        task.set_config(key="num_fewshot", value=num_shots or 0)

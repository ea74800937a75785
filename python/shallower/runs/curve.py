"""What a model loses over the number of layers that go, by strategy and state."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.source import ModelSource
from ..values.curve import Curve, State
from ..values.recipe import Recipe
from ..values.tokens import BatchSize, Tokens
from .contestants import one_contestant
from .curve_job import PATCH_TOKENS, SIZES, STRATEGIES, CurveJob
from .run_job import MAX_EVAL_TEXTS, MAX_TEXTS, TOP
from .store import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def curve(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str],
    out: str | Path,
    n: Sequence[int] = SIZES,
    strategies: Sequence[str] = STRATEGIES,
    states: Sequence[State] = ("cut", "patched"),
    quick_patch: bool = False,
    patch_tokens: int = PATCH_TOKENS,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    data: str | Path | None = None,
    max_items: int | None = None,
    num_shots: int | None = None,
    pass_at: int | None = None,
    heal: Recipe | None = None,
    heal_steps: int | None = None,
    top: int = TOP,
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    max_texts: int = MAX_TEXTS,
    max_eval_texts: int = MAX_EVAL_TEXTS,
    threads: int | None = None,
    seed: int = 0,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Curve:
    """Measure what a model loses as more and more of its layers go.

    For every size and strategy the cut is measured as it is, patched, and healed: its loss on
    texts that report, and tasks. The model is loaded once and cut in memory; cuts that two
    strategies have in common are measured once; it is as before afterwards. Some of the texts
    fit, some choose, and others report, as in :func:`run`: no figure is of a text that anything
    was chosen by.

    Leaves in ``out`` ``curve.json``, which is written before each next step, ``curve.csv``, and
    the scan where a strategy looks at one. A curve that was cut short goes on when it is called
    again with the same arguments. A cut that cannot be chosen, patched or measured is a point
    that says why.

    Args:
        model: a causal language model of transformers, or the source or the place that it is
            loaded from.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts, any iterable of strings, read once.
        eval_texts: held-out texts, which report. Calibration texts that are among them are left
            out.
        out: the folder to write to.
        n: numbers of layers that go; the whole model is measured in any case.
        strategies: ``recommended``, the verified plan of every size, as by :func:`run`;
            ``similarity``, the most similar block; ``best_plan``, the most similar blocks
            together; ``deepest``, the deepest layers but the last; or any criterion by its name.
        states: of ``cut``, ``patched`` and ``healed``. What is healed is patched first where it
            can be.
        quick_patch: patch by one matrix a block, in seconds, as criteria are compared; by
            default in full, as by :func:`patch`.
        patch_tokens: tokens that a full patch is fitted on, at most.
        tasks: names of tasks to do beside the loss; the main measure of each is kept.
        tasks_dir: a folder of further definitions of tasks.
        data: the folder in which task files find their data; by default that of the variable
            ``SHALLOWER_DATA``.
        max_items: items of a task at most; all by default.
        num_shots: solved examples before each item; as the task says by default.
        pass_at: for tasks that are answered in text also sample so many answers to each item, and
            keep ``pass@K`` of them as a task of its own, ``TASK sampled``.
        heal: settings of the healing of each cut; by default ours in the dtype of the model.
        heal_steps: steps of the healing, of 16 sequences each; 5,000 by default.
        top: proposals of every criterion, of the strategy ``recommended``.
        max_length: tokens of a text at most; a healing has its own, by its recipe.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        max_texts: read the first so many calibration texts only, but for a healing.
        max_eval_texts: read the first so many held-out texts only.
        threads: threads of the Rust core, all by default.
        seed: of whatever is drawn.
        cache: keep what is measured, and use what was measured before. Without it, a curve that
            was cut short begins anew.
        overwrite: replace what is in ``out``.
        progress: a bar with ETA on standard error; by default if that is a terminal.

    Returns:
        The curve, which is in ``curve.json`` too.

    Raises:
        LayersError: a size that the model cannot lose, or a number that is out of range.
        CriterionError: there is no such strategy.
        PatchError: there is no such state.
        RecipeError: ``heal_steps`` without the state ``healed``, or settings that do not fit.
        TextsError: no texts, or too few for three sets; no such task.
        OutputError: ``out`` holds another curve, or cannot be written to.
        ModelError: the model cannot be loaded or run.
        CacheError: what the cache holds is damaged.
        MissingExtraError: the state ``healed`` without peft, or tasks without lm-eval.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> curve = sh.curve(
        ...     model, tokenizer, texts, eval_texts=held_out, out="curves/tiny", n=[1, 2],
        ...     strategies=["similarity", "deepest"], quick_patch=True,
        ... )
        >>> [(point.n, point.strategy, point.state) for point in curve.points[:3]]
        [(0, 'whole', 'cut'), (1, 'similarity', 'cut'), (1, 'similarity', 'patched')]
        >>> curve.line("deepest", "cut")[1].dropped
        (28,)
    """
    job = CurveJob(
        model=one_contestant(model, tokenizer), texts=texts, eval_texts=eval_texts,
        out=Path(out), sizes=n, strategies=strategies, states=states, quick_patch=quick_patch,
        patch_tokens=patch_tokens, tasks=tasks,
        tasks_dir=None if tasks_dir is None else Path(tasks_dir),
        data=None if data is None else Path(data), max_items=max_items,
        num_shots=num_shots, pass_at=pass_at, heal=heal, heal_steps=heal_steps, top=top,
        tokens=Tokens(max_length, batch_size), max_texts=max_texts,
        max_eval_texts=max_eval_texts, threads=threads, seed=seed, overwrite=overwrite,
        cache=open_store(not cache), progress=progress,
    )  # fmt: skip
    return job.run()

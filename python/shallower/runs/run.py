"""The whole way: from a model to the best shallower one, saved."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.source import ModelSource
from ..processes import refuse_several
from ..reporting.figures import HEAT_MAP_FILE
from ..reporting.results import Run
from ..values.files import CHECKPOINT_FOLDER, GAIN_FILE, PLAN_FILE, RESULTS_FILE, SCAN_FILE
from ..values.memory import parse_size
from ..values.recipe import Recipe
from ..values.target import Target
from ..values.tokens import BatchSize, Tokens
from .contestants import one_contestant
from .continuing import PROMPTS
from .run_job import MAX_EVAL_TEXTS, MAX_TEXTS, TOP, RunJob
from .store import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_FILES = (CHECKPOINT_FOLDER, SCAN_FILE, PLAN_FILE, GAIN_FILE, HEAT_MAP_FILE, RESULTS_FILE)
"""What a run leaves, but for the healed model."""


def run(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str] | None = None,
    out: str | Path,
    n: int | None = None,
    fraction: float | None = None,
    params: int | None = None,
    max_loss: float | None = None,
    target_latency: float | None = None,
    target_memory: int | str | None = None,
    device: str | None = None,
    context: int = 2048,
    blocks: int | None = None,
    top: int = TOP,
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    max_texts: int = MAX_TEXTS,
    max_eval_texts: int = MAX_EVAL_TEXTS,
    threads: int | None = None,
    prompts: Sequence[str] = PROMPTS,
    heal: bool | Recipe = False,
    heal_steps: int | None = None,
    seed: int = 0,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    report: Callable[[Run], None] | None = None,
) -> Run:
    """Recommend one shallower model, and make it.

    The layers are compared by a scan; proposals of several criteria are raced by their loss
    after a quick patch; the winner is patched, saved, reloaded by stock
    transformers and, with ``heal``, trained. Some of the texts fit, some choose, and others
    report: no figure in the result is of a text that anything was chosen by.

    What is wanted is told by ``n``, ``fraction``, ``params``, ``max_loss``, ``target_latency`` or
    ``target_memory``; by none of them it is the knee of the curve of losses. Leaves in ``out`` the
    scan, the plan, ``results.json``, which is written before each next step, and ``checkpoint/``;
    with ``heal`` also ``healed/``. A run that was cut short goes on when it is called again with
    the same arguments, unless the cache is off. The model is as before afterwards.

    Args:
        model: a causal language model of transformers, or the source or the place that it is
            loaded from.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts, any iterable of strings, read once. With ``heal`` they are kept
            in memory.
        eval_texts: held-out texts, which report. Calibration texts that are among them are left
            out. By default every fourth of ``texts``.
        out: the folder to write to.
        n: layers that are to go.
        fraction: the share of the layers that is to go, at least.
        params: parameters that are to be left, at most.
        max_loss: nats a token above the whole model that are allowed, after the patch.
        target_latency: the share of the time of a token that is to be left, at most, by the
            forecast of :func:`gain`.
        target_memory: bytes of the weights and of the cache of one text that are to be left, at
            most, as a number or as ``12GB``.
        device: the device of that forecast, as for :func:`gain`; by default the GPU of this machine
            if it is in the table, else ``a100-80``.
        context: tokens of a text before it is continued, of both targets.
        blocks: blocks at most; any number by default.
        top: proposals of every criterion.
        max_length: tokens of a text at most; a healing has its own, by its recipe.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        max_texts: read the first so many calibration texts only, but for a healing.
        max_eval_texts: read the first so many held-out texts only.
        threads: threads of the Rust core, all by default.
        prompts: texts for the models to continue.
        heal: train on the patched cut: True, or the settings. True trains in the dtype of the
            model, float16 in bfloat16.
        heal_steps: steps of the training, of 16 sequences each; 5,000 by default.
        seed: of whatever is drawn.
        cache: keep what is measured, and use what was measured before.
        overwrite: replace what is in ``out``, part by part as the new ones are complete.
        progress: bars with ETA on standard error; by default if that is a terminal.
        report: hears the results before a healing starts, which may take days.

    Returns:
        The results, which are in ``results.json`` too: ``recommended.plan`` and
        ``recommended.loss`` are those of the model in ``checkpoint``.

    Raises:
        PlanError: no cut does what is asked for.
        OutputError: ``out`` holds another run, or cannot be written to.
        LayersError: a size that the model cannot lose, or more than one target.
        RecipeError: ``heal_steps`` without ``heal``, or settings that do not fit.
        TextsError: no texts, or too few for three sets.
        StatesError: no text could be compared.
        ModelError: the model cannot be loaded, run or (for a target) counted, there is no such
            ``device``, or the saved checkpoint is another model;
            then ``results.json`` holds all that is known.
        CacheError: what the cache holds is damaged.
        MissingExtraError: ``heal`` without peft.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.run(model, tokenizer, texts, eval_texts=held_out, out="runs/tiny", n=2)
        >>> len(done.recommended.plan.dropped), done.difference < 1e-4
        (2, True)
        >>> done.recommended.loss.nats <= done.recommended.cut.nats
        True
    """
    refuse_several("runs are")
    memory = parse_size(target_memory) if isinstance(target_memory, str) else target_memory
    target = Target(
        n, fraction, params, max_loss, latency=target_latency, memory=memory, device=device,
        context=context,
    )  # fmt: skip
    job = RunJob(
        model=one_contestant(model, tokenizer), texts=texts, eval_texts=eval_texts,
        target=target, out=Path(out), top=top, blocks=blocks,
        tokens=Tokens(max_length, batch_size), max_texts=max_texts,
        max_eval_texts=max_eval_texts, threads=threads, prompts=prompts, heal=heal,
        heal_steps=heal_steps, seed=seed, overwrite=overwrite, cache=open_store(not cache),
        progress=progress,
    )  # fmt: skip
    return job.run(report)

"""Criteria compared by benchmark, on one model or several, into a folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.source import ModelSource
from ..values.comparison import CriteriaComparison
from ..values.tokens import BatchSize, Tokens
from .comparison_job import MAX_EVAL_TEXTS, MAX_TEXTS, SIZES, ComparisonJob
from .given_models import given_models
from .store import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..judgement.criterion import Criterion


def compare(
    model: "PreTrainedModel | ModelSource | str | Path | Sequence[ModelSource | str | Path]",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: "Iterable[str] | Mapping[str, Iterable[str]]" = (),
    eval_texts: Iterable[str] = (),
    *,
    n: Sequence[int] = SIZES,
    criteria: "Sequence[str | Criterion] | None" = None,
    judge: str = "loss",
    options: str | Path | None = None,
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    max_texts: int = MAX_TEXTS,
    max_eval_texts: int = MAX_EVAL_TEXTS,
    seed: int = 0,
    out: str | Path | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> CriteriaComparison:
    """Compare criteria by what they remove and what that costs.

    The calibration texts are divided into those that fit and those that choose; the held-out
    texts give every loss that is reported, and no criterion sees them. Every choice is
    measured before and after a quick patch (the last matrix of the feed-forward before each
    block, solved anew). Each criterion is charged what it costs by itself, although nothing is
    done twice.

    What was measured is kept in the cache, also of a comparison that was cut short, and is not
    measured again.

    Args:
        model: a causal language model of transformers; or the source or the place that it is
            loaded from; or several such, which are compared one after the other. The failure of
            one of several is recorded, and the others go on.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts; or several such by name, each of which chooses for itself.
        eval_texts: held-out texts. Calibration texts that are among them are left out.
        n: how many layers are to go.
        criteria: names of the table ``shallower.criteria``, or criteria of your own; all by
            default.
        judge: what chooses: ``loss``, the next-token loss; ``kl``, the divergence from the whole
            model's next-token distributions; ``options``, the margin of right options.
        options: a file of JSON lines with ``context``, ``options`` and ``answer``, of the judge
            ``options``; one half chooses, the other one reports.
        max_length: tokens of a text at most.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        max_texts: read the first so many calibration texts only.
        max_eval_texts: read the first so many held-out texts only.
        seed: of whatever is drawn.
        out: a folder for ``comparison.json``, ``comparison.csv`` and the figures.
        cache: keep what is measured, and use what was measured before.
        overwrite: replace what is in ``out``.
        progress: bars with ETA on standard error; by default if that is a terminal.

    Returns:
        A row for every model, calibration text, criterion and ``n``.

    Raises:
        CriterionError: a criterion or judge that does not exist, or is named twice.
        LayersError: a size that the model cannot lose.
        TextsError: too few texts for three sets, or broken ones.
        ModelError: the one model that there is cannot be loaded or run.
        OutputError: ``out`` holds another comparison, or cannot be written to.
        CacheError: what the cache holds is damaged.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.compare(
        ...     model, tokenizer, texts, held_out, n=[2], criteria=["angular", "deepest"]
        ... )
        >>> [(row.criterion, row.n, len(row.dropped)) for row in done.rows]
        [('angular', 2, 2), ('deepest', 2, 2)]
    """
    job = ComparisonJob(
        models=given_models(model, tokenizer), texts=texts, eval_texts=eval_texts, sizes=n,
        criteria=criteria, judge=judge, options=options, tokens=Tokens(max_length, batch_size),
        max_texts=max_texts, max_eval_texts=max_eval_texts, seed=seed,
        out=None if out is None else Path(out),
        overwrite=overwrite, cache=open_store(not cache), progress=progress,
    )  # fmt: skip
    return job.run()

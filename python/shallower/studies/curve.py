"""A curve: a comparison of few criteria on one model, with more texts and full patches."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.source import ModelSource
from ..processes import refuse_several
from ..results.comparison import CriteriaComparison
from ..settings.studies import CurveSettings
from ..store.given_models import given_model
from ..store.store import open_store
from .compare import CompareStudy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def curve(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str],
    out: str | Path | None = None,
    settings: CurveSettings | None = None,
    cache: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> CriteriaComparison:
    """Measure what a model loses as more and more of its layers go.

    A comparison with the settings of a curve: more texts, full patches, and by default the
    criteria ``recommended``, ``angular`` and ``deepest``.

    Args:
        model: as for :func:`compare`, but one.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts.
        eval_texts: held-out texts, the test set.
        out: a folder for ``comparison.json`` and ``comparison.csv``.
        cache: keep what is measured, and reuse cached results.
        overwrite: replace what is in ``out``.
        progress: bars with ETA on standard error; by default if that is a terminal.
        settings: the settings; by default those of :class:`CurveSettings`.
        options: settings by keyword, as ``n=[2, 4]``: any field of :class:`CurveSettings`.

    Returns:
        A row for every state, criterion and ``n``.

    Raises:
        ShallowerError: as :func:`compare`.

    Example:
        >>> curve = sh.curve(
        ...     model, tokenizer, texts, eval_texts=held_out, out="curves/tiny", n=[1, 2],
        ...     criteria=["angular", "deepest"], patch="quick",
        ... )
        >>> [(row.n, row.criterion, row.state) for row in curve.rows[:2]]
        [(1, 'angular', 'cut'), (2, 'angular', 'cut')]
    """
    refuse_several("curves are")
    study = CompareStudy(
        models=(given_model(model, tokenizer),),
        texts=texts,
        eval_texts=eval_texts,
        settings=CurveSettings.of(settings, options),
        out=None if out is None else Path(out),
        overwrite=overwrite,
        store=open_store(not cache),
        progress=progress,
    )
    return study.run()

"""Losses on a test set, batch by batch where every command finds them."""

from dataclasses import replace
from typing import Any

from ..judgement.judges.judge import LossJudge
from ..judgement.trials import recorded, trials_journal
from ..models.source import ModelSource
from ..store.given_models import ModelStore
from ..store.store import Store
from ..values.scores import Scores


def keep_scores(
    scores: Scores,
    judge: LossJudge,
    *,
    source: ModelSource,
    dtype: str,
    vocab_size: int,
    items: str,
    store: Store,
) -> None:
    """Keep the loss of a model that was saved in ``dtype``, for whoever loads it from ``source``.

    It is found by that dtype, and by ``auto`` where this machine would load it so.
    """
    for name in dict.fromkeys((dtype, "auto")):
        given: Any = name
        model = replace(source, dtype=given)
        if str(model.resolved().dtype) != dtype:
            continue
        journal = trials_journal(judge, store=ModelStore.of(model, store), items=items)
        if journal is None:
            return
        for look, some in enumerate(judge.items):
            sums = scores.sums[some]
            journal.append(
                recorded(frozenset(), look, sums=sums, seconds=0.0, vocab_size=vocab_size)
            )

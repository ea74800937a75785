"""The loss of a model as it is now, by whole forwards, kept as a trial of a cut is."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.loss import nats_of
from ..models.decoder import Decoder
from ..values.plan import Plan, gone_by
from ..values.schema import of_type
from ..values.scores import Scores
from .judges.judge import LossJudge
from .trials import TrialJournal, cut_of, look_of, recall, recorded, sums_of


def scores_by_forwards(
    decoder: Decoder,
    judge: LossJudge,
    plan: Plan | None = None,
    *,
    looks: range | None = None,
    journal: TrialJournal | None = None,
    name: str = "loss",
    progress: bool | None = None,
) -> tuple[Scores, int]:
    """Measure the batches that the journal lacks, of a model that is without what a plan drops.

    All of them, or ``looks`` alone. Returns the scores and the size of the vocabulary. Raises
    CacheError, and as :func:`shallower.evaluate_loss`.
    """
    gone, known, sizes = gone_by(plan or ()), dict[int, NDArray[np.float64]](), [0]
    num_layers = len(decoder) if plan is None else plan.num_layers
    started = time.perf_counter()

    def take(record: dict[str, Any]) -> None:
        if cut_of(record, num_layers) == gone:
            look = look_of(record, len(judge.batches))
            known[look] = sums_of(record, len(judge.items[look]))
            sizes.append(of_type(int, record["vocab_size"]))

    def keep(look: int, sums: NDArray[np.float64], size: int) -> None:
        nonlocal started
        took, started = time.perf_counter() - started, time.perf_counter()
        if journal is not None:
            journal.append(recorded(gone, look, sums=sums, seconds=took, vocab_size=size))

    recall(journal, take, "trials")
    sums, size = nats_of(
        decoder, judge.batches, looks, known=known, keep=keep, description=name, progress=progress
    )
    return Scores(sums, judge.weights), size or max(sizes)

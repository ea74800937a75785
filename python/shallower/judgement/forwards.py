"""The loss of a model as it is now, by whole forwards, kept as a trial of a cut is."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.batches import batches_of_texts
from ..evaluation.loss import fitting_tokens, nats_of, out_of_domain_texts
from ..models.decoder import Decoder
from ..texts.sources import OWN_TOKENS
from ..values.hashing import hash_of
from ..values.loss import Loss
from ..values.plan import Plan, gone_by
from ..values.schema import of_type
from ..values.scores import Scores
from ..values.tokens import Tokens
from .judges.judge import LossJudge
from .trials import (
    Journal,
    ResultStore,
    cut_of,
    look_of,
    recall,
    recorded,
    sums_of,
    trials_journal,
)


def scores_by_forwards(
    decoder: Decoder,
    judge: LossJudge,
    plan: Plan | None = None,
    *,
    looks: range | None = None,
    journal: Journal | None = None,
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


def out_of_domain(
    losses: Mapping[str, Loss],
    state: str,
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    plan: Plan | None = None,
    store: ResultStore | None = None,
    progress: bool | None = None,
) -> dict[str, Loss]:
    """Add the loss of a state of a model, without what a plan drops, on our own texts.

    There are none, of any state, where the tokenizer has no words of these texts.
    ``store`` has results of the whole model.
    """
    tokens = replace(tokens, max_length=min(tokens.max_length, OWN_TOKENS))
    texts, decoder = out_of_domain_texts(tokenizer, tokens.max_length), Decoder.of(model)
    if not texts:
        return {}
    batches = batches_of_texts(tokenizer, texts, fitting_tokens(decoder, tokens), count_bytes=False)
    judge, items = LossJudge(batches.numbered), hash_of([texts, asdict(tokens)])
    journal = store and trials_journal(judge, store=store, items=items)
    how: Any = {"journal": journal, "name": "loss out of domain", "progress": progress}
    return {**losses, state: batches.loss(*scores_by_forwards(decoder, judge, plan, **how))}

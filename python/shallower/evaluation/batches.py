"""Batches of a test set, of which any is measured and kept apart, to the bits of the whole.

Every process that measures a part tokenises all texts, so that it has the same batches.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import RejectedSamplesWarning, TextsError
from ..models.source import ModelSource
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..texts.batches import AnyTexts, Batch, TokenBatches, Unpadded, padded, untouched
from ..values.counts import counted
from ..values.entries import ResultStore, TrialJournal
from ..values.plan import Gone, describe_rejections
from ..values.schema import of_type
from ..values.tokens import Tokens


@dataclass(frozen=True)
class AllBatches:
    """All texts, or windows, as batches of token ids, in the order in which they are measured.

    ``settings`` is what a result says beside its losses; ``num_bytes`` (S,) those that are
    predicted of each text, None where they are not counted; ``rejections`` a sentence on texts too
    short.
    """

    batches: Sequence[Unpadded]
    batch_size: int
    fingerprint: str
    settings: Mapping[str, int]
    num_bytes: Mapping[int, int] | None = None
    rejections: str = ""

    @cached_property
    def numbered(self) -> list[Batch]:
        """All batches, padded, with texts that are numbered without those that are rejected."""
        order = {index: place for place, index in enumerate(self.indices(range(len(self.batches))))}
        return [padded([(order[index], ids) for index, ids in batch]) for batch in self.batches]

    @property
    def weights(self) -> NDArray[np.float64]:
        """(S,) the predicted tokens of each text, or window, in their order."""
        ids = sorted((index, len(ids)) for batch in self.batches for index, ids in batch)
        return np.array([length - 1.0 for _, length in ids])

    def loss(self, scores: Scores, vocab_size: int) -> Loss:
        """Give the scores of all texts as a loss."""
        sizes, rejected = self.num_bytes, self.settings["num_rejected"]
        by_text = None
        if sizes is not None:
            by_text = np.array([sizes[one] for one in sorted(sizes)], np.float64)
        return Loss.of_scores(scores, by_text, num_rejected=rejected, vocab_size=vocab_size)

    def perplexity(self, scores: Scores) -> Perplexity:
        """Give the scores of all windows as a perplexity."""
        of = self.settings
        return Perplexity(of["context"], bool(of["bos"]), of["num_rest"], scores)

    def warn_of_rejected(self) -> None:
        """Warn of texts with too few tokens."""
        if self.rejections:
            warnings.warn(self.rejections, RejectedSamplesWarning, stacklevel=4)

    @property
    def num_items(self) -> int:
        """Texts, or windows, in all."""
        return sum(map(len, self.batches))

    def indices(self, batches: range) -> list[int]:
        """The texts, or windows, of some batches, ascending."""
        return sorted(index for batch in batches for index, _ in self.batches[batch])


def batches_of_texts(
    tokenizer: PreTrainedTokenizerBase, texts: AnyTexts, tokens: Tokens, *, count_bytes: bool = True
) -> AllBatches:
    """The batches whose losses :func:`shallower.evaluate_loss` measures; raises as it."""
    found = TokenBatches(
        tokenizer, texts, tokens, min_tokens=2, count_bytes=count_bytes, test_set=True
    )
    batches = [batch for window in found.unpadded() for batch in window]
    if not batches:
        raise nothing_to_predict(found)
    rejected = found.num_rejected, found.num_texts, found.rejections
    return AllBatches(
        batches,
        tokens.texts,
        found.identity.fingerprint,
        {"num_rejected": found.num_rejected},
        found.predicted_bytes or None,
        describe_rejections(*rejected) if found.num_rejected else "",
    )


def batches_of_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: Tokens, *, bos: bool
) -> AllBatches:
    """The batches that :func:`shallower.evaluate_perplexity` measures; raises as it."""
    windows, num_rest = windows_of(tokenizer, text, tokens.max_length, bos=bos)
    size = tokens.texts
    batches = [windows[start : start + size] for start in range(0, len(windows), size)]
    digest = hashlib.sha256()
    for _, ids in windows:
        digest.update(ids.tobytes())
    settings = {"context": tokens.max_length, "bos": int(bos), "num_rest": num_rest}
    return AllBatches(batches, size, digest.hexdigest(), settings)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, text: str, context: int, *, bos: bool
) -> tuple[list[tuple[int, NDArray[np.int64]]], int]:
    """Every window's number and (context,) token ids; how many tokens are beyond them."""
    if context < 2:
        raise TextsError(f"a window must have at least 2 tokens, got {context} (--context)")
    first = []
    if bos:
        if tokenizer.bos_token_id is None:
            raise TextsError(
                "the tokenizer has no beginning-of-text token: measure without one (bos, --bos)"
            )
        first = [int(tokenizer.bos_token_id)]
    with untouched(tokenizer):
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
    ids = list(encoded["input_ids"])
    stride = context - len(first)
    if len(ids) < stride:
        raise TextsError(
            f"the text has {counted(len(ids), 'token')} and fills no window of {context}: take "
            f"shorter ones (context, --context) or a longer text"
        )
    starts = range(0, len(ids) - stride + 1, stride)
    windows = [np.array([*first, *ids[start : start + stride]], np.int64) for start in starts]
    return list(enumerate(windows)), len(ids) - stride * len(windows)


def nothing_to_predict(batches: TokenBatches) -> TextsError:
    """The error of texts of which none has two tokens."""
    if not batches.num_texts:
        return TextsError("there are no texts to predict")
    return TextsError(
        "no text has two tokens, so nothing can be predicted: "
        + describe_rejections(batches.num_rejected, batches.num_texts, batches.rejections)
    )


# Losses that are kept, batch by batch, so that every command finds what another measured
Stores = Callable[[ModelSource], ResultStore]
"""Gives the results of a model that the store has."""


def unkept(_: ModelSource) -> ResultStore:
    """Give results of a model that nobody keeps."""
    return UnsavedResults()


def recorded(
    gone: Gone, look: int, *, sums: NDArray[np.float64], seconds: float, vocab_size: int
) -> dict[str, Any]:
    """Give a trial as its record, what goes as :func:`cut_of` reads it."""
    layers = sorted(one for one in gone if isinstance(one, int))
    experts = sorted(one for one in gone if isinstance(one, tuple))
    found = {"look": look, "sums": sums.tolist(), "seconds": seconds, "vocab_size": vocab_size}
    return {"dropped": layers, **({"experts": experts} if experts else {}), **found}


def layers_of(record: Any, num_layers: int) -> frozenset[int]:
    """Read the layers that a record drops; ValueError for what is none."""
    layers = [of_type(int, layer) for layer in of_type(list, of_type(dict, record)["dropped"])]
    if layers != sorted(set(layers) & set(range(num_layers))):
        raise ValueError(f"layers {layers} of {num_layers}")
    return frozenset(layers)


def cut_of(record: Any, num_layers: int) -> Gone:
    """Read what a record drops; ValueError for what is none."""
    layers = layers_of(record, num_layers)
    pairs = of_type(list, record.get("experts", []))
    experts = ((of_type(int, layer), of_type(int, expert)) for layer, expert in pairs)
    return frozenset([*layers, *experts])


def look_of(record: dict[str, Any], num_looks: int) -> int:
    """Read the batch of a record; ValueError for what is none."""
    index = of_type(int, record["look"])
    if not 0 <= index < num_looks:
        raise ValueError(f"look {index} of {num_looks}")
    return index


def seconds_of(record: dict[str, Any]) -> float:
    """Read how long a record took; ValueError for what is no time."""
    seconds = of_type(float, record["seconds"])
    if not 0 <= seconds < math.inf:
        raise ValueError(f"it took {seconds} seconds")
    return seconds


def sums_of(record: dict[str, Any], num_items: int) -> NDArray[np.float64]:
    """Read the scores of a record, (B,); ValueError for others than are expected."""
    sums = [of_type(float, value) for value in of_type(list, record["sums"])]
    if len(sums) != num_items:
        raise ValueError(f"{len(sums)} scores of {num_items} items")
    if not all(map(math.isfinite, sums)):
        raise ValueError("a score is not finite")
    return np.array(sums)


def cut_journal(
    store: ResultStore, items: str, judged_by: Mapping[str, Any]
) -> TrialJournal | None:
    """Open the records of a model's cuts as they are, on the batches of some items."""
    return store.journal("trials", {"state": "cut", "items": items, **judged_by})


def loss_journal(store: ResultStore, test_set: AllBatches) -> TrialJournal | None:
    """Open the records of losses on a test set, which is identified by its token ids alone."""
    judged_by = {"judge": "loss", "looks": [len(batch) for batch in test_set.batches]}
    return cut_journal(store, test_set.fingerprint, judged_by)


class UnsavedResults:
    """Losses of a model that is saved later, to be found by whoever loads it then."""

    def __init__(self) -> None:
        self._journals: list[tuple[str, Mapping[str, Any], _Records]] = []

    def get(self, _kind: str, _inputs: Mapping[str, Any]) -> None:
        """Find nothing."""

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep nothing but losses."""

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> TrialJournal:
        """Open records in memory."""
        self._journals.append((kind, inputs, records := _Records()))
        return records

    def add(self, test_set: AllBatches, scores: Scores, vocab_size: int) -> None:
        """Add a loss that was measured otherwise, to the same bits."""
        journal = loss_journal(self, test_set)
        assert journal is not None
        for look, batch in enumerate(test_set.numbered):
            sums = scores.sums[batch.samples]
            how: Any = {"sums": sums, "seconds": 0.0, "vocab_size": vocab_size}
            journal.append(recorded(frozenset(), look, **how))

    def keep(self, stores: Stores, source: ModelSource, dtype: str) -> None:
        """Keep the records for the model, now that it is saved in ``dtype`` at ``source``.

        They are found by that dtype, and by ``auto`` where this machine would load it so.
        """
        for name in dict.fromkeys((dtype, "auto")):
            given: Any = name
            model = replace(source, dtype=given)
            if str(model.resolved().dtype) != dtype:
                continue
            store = stores(model)
            for kind, inputs, records in self._journals:
                if (journal := store.journal(kind, inputs)) is not None:
                    for record in records:
                        journal.append(record)


class _Records(list[dict[str, Any]]):
    """Records in memory."""

    def read(self) -> "_Records":
        """Give all records."""
        return self

"""Batches of a test set, of which any can be measured apart, to the bits of the whole.

Every process that measures a part tokenises all texts, so that it has the same batches.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import RejectedSamplesWarning, TextsError
from ..results.loss import Loss
from ..results.perplexity import Perplexity
from ..results.scores import Scores
from ..texts.batches import AnyTexts, Batch, TokenBatches, Unpadded, padded, untouched
from ..values.counts import counted
from ..values.plan import describe_rejections
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

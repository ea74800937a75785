"""Batches of an evaluation, of which any part can be measured apart, to the bits of the whole.

Who measures a part tokenises all texts, so that it has the batches that one process makes.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..memory.streaming import text_steps
from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..progress import track
from ..texts.batches import TokenBatches, Unpadded, padded
from ..values.loss import TextLoss
from ..values.tokens import Tokens
from .loss import TextLosses, nothing_to_predict
from .perplexity import windows_of


@dataclass(frozen=True, slots=True)
class AllBatches:
    """All texts, or windows, as batches of token ids, in the order in which they are measured.

    Attributes:
        batches: all of them.
        batch_size: texts in one forward.
        fingerprint: a hash of all token ids.
        settings: what a result says beside its losses, by its names.
        num_bytes: the bytes of what is predicted of each text; None where they are not counted.
    """

    batches: Sequence[Unpadded]
    batch_size: int
    fingerprint: str
    settings: Mapping[str, int]
    num_bytes: Mapping[int, int] | None = None

    @property
    def num_items(self) -> int:
        """Texts, or windows, in all."""
        return sum(map(len, self.batches))

    def indices(self, batches: range) -> list[int]:
        """The texts, or windows, of some batches, ascending."""
        return sorted(index for batch in batches for index, _ in self.batches[batch])


def batches_of_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: Tokens
) -> AllBatches:
    """The batches whose losses :func:`shallower.evaluate_loss` measures; raises as it."""
    found = TokenBatches(tokenizer, texts, tokens, min_tokens=2, count_bytes=True)
    batches = [batch for window in found.unpadded() for batch in window]
    if not batches:
        raise nothing_to_predict(found)
    fingerprint, rejected = found.identity.fingerprint, found.num_rejected
    settings = {"num_rejected": rejected}
    return AllBatches(batches, tokens.texts, fingerprint, settings, found.predicted_bytes or None)


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


def losses_of(
    decoder: Decoder,
    batches: Sequence[Unpadded],
    *,
    description: str,
    progress: bool | None = None,
) -> tuple[list[TextLoss], int]:
    """Measure batches: the losses of their texts, ascending, and the size of the vocabulary.

    Raises TextsError and ModelError as :func:`shallower.evaluate_loss`.
    """
    losses, found = TextLosses(decoder), []
    total = sum(map(len, batches)) * text_steps(decoder)
    with track(description, total, progress) as advance, evaluating(decoder.model):
        for some in losses.of(([padded(batch)] for batch in batches), advance):
            found += some
    return sorted(found), losses.head.vocab_size

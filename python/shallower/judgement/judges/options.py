"""The right option's margin over the others as a judge."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...errors import TextsError
from ...evaluation.loss import summed_losses
from ...models.head import Head
from ...texts.batches import padded, untouched
from ...texts.options import OptionItem
from ...values.counts import counted
from ...values.tokens import Tokens
from .judge import Judge, looks, require_finite


class OptionsJudge(Judge):
    """The log-likelihood of the best wrong option less that of the right one, in nats.

    The log-likelihood of an option is the sum over its tokens, given the context, whatever its
    length. As lm-eval does, context and option are tokenised as one text, of which the option is
    what the context alone does not have; white space between them belongs to the option, and is a
    space where neither of them has any. Special tokens that the tokenizer puts at the start are
    there; a text that would begin with its option gets the beginning-of-text token, or the
    end-of-text token where there is none.

    A context that is too long beside an option is truncated at its start; options of one item run
    in one forward, and ``chance`` is the mean of 1 / K. Raises TextsError for no items, an option
    without tokens or with more than fit, and a context without any where no token ends a text.
    """

    name = "options"
    unit = "nats"

    def __init__(
        self, items: Sequence[OptionItem], tokenizer: PreTrainedTokenizerBase, *, tokens: Tokens
    ) -> None:
        if not items:
            raise TextsError("there are no items that a cut could be judged on")
        self._answers = [item.answer for item in items]
        self._sizes = [len(item.options) for item in items]
        self.weights = np.ones(len(items))
        self.chance = math.fsum(1 / size for size in self._sizes) / len(items)
        encoded = [_encoded(item, tokenizer, tokens) for item in items]
        at_once = max(1, tokens.texts // max(self._sizes))
        self.batches, self.items = [], []
        for look in looks(len(items), at_once):
            indices = np.arange(look.start, look.stop)
            rows = [(int(index), *row) for index in indices for row in encoded[index]]
            given = np.array([given for *_, given in rows])
            self.batches.append(padded([(index, ids) for index, ids, _ in rows], given))
            self.items.append(indices)

    def measure(self, head: Head, index: int) -> NDArray[np.float64]:
        nats = np.array(summed_losses(head, self.batches[index]).tolist())
        sums = np.empty(len(self.items[index]))
        start = 0
        for place, item in enumerate(self.items[index]):
            of_options = nats[start : start + self._sizes[item]]
            right = of_options[self._answers[item]]
            sums[place] = right - np.delete(of_options, self._answers[item]).min()
            start += self._sizes[item]
        return require_finite(sums, self.items[index], head)

    def accuracy(self, sums: NDArray[np.float64]) -> float:
        """The share of judged items whose right option is the likeliest; a tie counts half."""
        there = sums[np.isfinite(sums)]
        right = np.count_nonzero(there < 0) + np.count_nonzero(there == 0) / 2
        return float(right / len(there)) if len(there) else math.nan


def _encoded(
    item: OptionItem, tokenizer: PreTrainedTokenizerBase, tokens: Tokens
) -> list[tuple[NDArray[np.int64], int]]:
    """The token ids of every option behind its context, and how many of them are given."""
    context = item.context.rstrip()
    between = item.context[len(context) :]
    joined = [context + (between or _space(context, option)) + option for option in item.options]
    given, *wholes = _token_ids(tokenizer, [context, *joined], item)
    start = _start(tokenizer, item, bare=not given)
    encoded = []
    for index, whole in enumerate(wholes):
        ids = whole[len(given) :]
        room = tokens.max_length - len(start) - len(ids)
        if not ids or room < 0 or not (start or room):
            most = tokens.max_length - max(len(start), 1)
            raise TextsError(
                f"{_place(item)}: option {index} has {counted(len(ids), 'token')}, expected 1 to "
                f"{most} beside its context (max_length, --max-length)"
            )
        before = [*start, *given[max(0, len(given) - room) :]]
        encoded.append((np.array([*before, *ids], np.int64), len(before)))
    return encoded


def _space(context: str, option: str) -> str:
    return " " if context and not option[0].isspace() else ""


def _start(tokenizer: PreTrainedTokenizerBase, item: OptionItem, bare: bool) -> list[int]:
    """The special tokens before a context; at least one, if it is ``bare`` of tokens."""
    plain, *_ = _token_ids(tokenizer, ["a"], item)
    with untouched(tokenizer):
        whole = list(tokenizer("a")["input_ids"])
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    start = whole[: next(places, 0)]
    if start or not bare:
        return start
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise TextsError(
        f"{_place(item)}: the context has no tokens, and the tokenizer no token that a text "
        f"begins with: write a context"
    )


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], item: OptionItem
) -> list[list[int]]:
    try:
        with untouched(tokenizer):
            encoded = tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
    except Exception as error:  # tokenizers raises bare ones
        raise TextsError(f"{_place(item)}: cannot be tokenised: {error}") from error
    return [list(ids) for ids in encoded["input_ids"]]


def _place(item: OptionItem) -> str:
    return f"the item in line {item.line}" if item.line else f"the item {item.context[:40]!r}"

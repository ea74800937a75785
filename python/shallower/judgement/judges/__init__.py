"""Judges: what a cut is worth, item by item. ``JUDGES`` is the table of them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ...texts.batches import AnyTexts
from ...texts.options import OptionItem
from ...values.tokens import Tokens
from .judge import Judge, KLJudge, LossJudge, judged_batches
from .options import OptionsJudge

JUDGES: dict[str, type[Judge]] = {judge.name: judge for judge in (LossJudge, KLJudge, OptionsJudge)}
"""Every judge by its name, as ``--judge`` names it."""


def judge_of(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    tokens: Tokens,
    items: Sequence[OptionItem] = (),
) -> Judge:
    """Make a judge of texts; that of ``options`` judges on items.

    A TextsError says that no text has two tokens.
    """
    if name == "options":
        return OptionsJudge(items, tokenizer, tokens=tokens)
    batches = judged_batches(tokenizer, texts, tokens)
    return LossJudge(batches) if name == "loss" else KLJudge(batches)

"""Judges: what a cut is worth, item by item. ``JUDGES`` is the table of them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...texts.batches import AnyTexts
from ...values.tokens import Tokens
from .judge import Judge, KLJudge, LossJudge, SpeechJudge, judged_batches
from .options import OptionsJudge

JUDGES: dict[str, type[Judge]] = {
    judge.name: judge for judge in (LossJudge, KLJudge, OptionsJudge, SpeechJudge)
}
"""Every judge by its name, as ``--judge`` names it."""


def judge_of(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    tokens: Tokens,
    items: Sequence[Any] = (),
) -> Judge:
    """Make a judge of texts; those of ``options`` and ``speech`` judge on items.

    Items of ``options`` are as in a file of them, those of ``speech`` the whole model's answers by
    prompt.
    """
    if name == "options":
        return OptionsJudge(items, tokenizer, tokens=tokens)
    if name == "speech":
        return SpeechJudge(items, tokens=tokens)
    batches = judged_batches(tokenizer, texts, tokens)
    return LossJudge(batches) if name == "loss" else KLJudge(batches)

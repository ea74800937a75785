"""Items of a judge that has its own: options or prompts, a half of which chooses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..settings.studies import Prompts
from ..texts.options import OptionItem, options_fingerprint, read_options
from ..texts.prompts import Prompt, given_prompts, prompts_fingerprint
from ..texts.splits import two_splits

Items = Sequence[OptionItem] | Sequence[Prompt]


def judged_items(
    judge: str, *, options: str | Path | None = None, prompts: Prompts = None, seed: int
) -> tuple[Items, Items]:
    """Read the selection and test items; none of a judge of texts.

    Prompts of the judge ``speech`` are by default our own. Raises TextsError for what is none, and
    for fewer than 8 items.
    """
    if judge == "options" and options is not None:
        return two_splits(read_options(options), seed=seed)
    if judge == "speech":
        named = ("prompts", "prompts, --prompts, --speech")
        return two_splits(given_prompts(prompts), key=_asked, what=named, seed=seed)
    return (), ()


def _asked(prompt: Prompt) -> str:
    """What a prompt asks, whatever was answered."""
    return json.dumps([prompt.text, [*map(dict, prompt.messages)]])


def items_fingerprint(judge: str, items: Any) -> str:
    """SHA-256 of items of a judge, whatever file they are in; that of nothing where it has none."""
    return prompts_fingerprint(items) if judge == "speech" else options_fingerprint(items)

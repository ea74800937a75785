"""Prompts, and answers to them: what a model is let to speak about, and what it said."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError, why
from .batches import untouched
from .sources import numbered_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEECH_PROMPTS = Path(__file__).with_name("speech.jsonl")
"""Prompts of our own that speech is measured on: of four kinds, in turns."""

_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that is continued, or a chat that is answered; with an answer, if it has one.

    Attributes:
        text: what is continued as it is; None for a chat alone.
        messages: of a chat, each with its ``role`` and ``content``; none for a text alone. A
            tokenizer that has a template for chats is given these, any other one the text.
        kind: what it asks for, as ``story``; empty where that is not said.
        answer: what a model said, if it was let to.
        ended: whether the answer ended by itself.
        model: which model said it, if that is known.
        line: where it stands in its file; for errors.
    """

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    kind: str = ""
    answer: str | None = None
    ended: bool = True
    model: str | None = None
    line: int = field(default=0, compare=False)

    def shown(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Give what a person reads of it: the text, or the last message of the chat."""
        return self.messages[-1]["content"] if self.is_chat(tokenizer) else self.text or ""

    def is_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether a model with this tokenizer is given the messages, and not the text."""
        return bool(self.messages) and (has_template(tokenizer) or self.text is None)


def read_prompts(source: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Read a file of prompts, a JSON object a line; the first ``limit`` only.

    The fields are ``prompt``, a string, or ``messages``, a list of objects with ``role`` and
    ``content``, or both; and, where they are known, ``kind``, ``answer``, ``ended`` and ``model``.
    Others are ignored. By default the prompts are :data:`SPEECH_PROMPTS`.

    Raises TextsError, which names the line, where there is no file, no prompt, or what is none.
    """
    if limit is not None and limit < 1:
        raise TextsError(f"the number of prompts must be at least 1, got {limit}")
    source = SPEECH_PROMPTS if source is None else source
    try:
        path = Path(source).expanduser()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise TextsError(f"cannot read prompts from {source}: {why(error, source)}") from error
    if not there:
        raise TextsError(
            f"there is no file of prompts {source}: expected JSON lines with the field `prompt`, "
            f"or `messages`"
        )
    records = islice(numbered_records(path, str(source)), limit)
    prompts = [_prompt(record, number, f"{source}, line {number}") for number, record in records]
    if not prompts:
        raise TextsError(
            f"there are no prompts in {source}: expected a JSON object a line, with the field "
            f"`prompt`, or `messages`"
        )
    return prompts


def given_prompts(
    prompts: "str | Path | Iterable[str | Mapping[str, Any] | Prompt] | None",
) -> list[Prompt]:
    """Take prompts as they are given: a file, or an iterable of texts, objects and prompts.

    An object has the fields of a line of a file; by default the prompts are
    :data:`SPEECH_PROMPTS`. Raises TextsError as :func:`read_prompts`.
    """
    if prompts is None or isinstance(prompts, str | Path):
        return read_prompts(prompts)
    if not isinstance(prompts, Iterable):
        raise TextsError(f"prompts must be a file or an iterable, got {type(prompts).__name__}")
    found = [
        one
        if isinstance(one, Prompt)
        else _prompt({"prompt": one} if isinstance(one, str) else one, 0, f"prompt {index}")
        for index, one in enumerate(prompts)
    ]
    if not found:
        raise TextsError("there are no prompts")
    return found


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of all that prompts say, whatever file they are in."""
    digest = hashlib.sha256()
    for one in prompts:
        said = [one.text, list(map(dict, one.messages)), one.answer, one.ended]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]
) -> list[NDArray[np.int64]]:
    """Tokenise prompts, (P,) int64 each: chats by the tokenizer's template, up to the answer.

    Raises TextsError, which names the prompt, where the tokenizer has no template for a chat that
    is no text, or where it makes no token of a prompt.
    """
    with untouched(tokenizer):
        return [_ids(tokenizer, one, index) for index, one in enumerate(prompts)]


def answer_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> NDArray[np.int64]:
    """Tokenise the answer of a prompt, (A,) int64, with the token that ends it if it ended."""
    assert prompt.answer is not None
    with untouched(tokenizer):
        found: Any = tokenizer(prompt.answer, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if prompt.ended and isinstance(end, int):
        found = [*found, end]
    return np.asarray(found, np.int64)


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer knows how a chat is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def _ids(tokenizer: Any, prompt: Prompt, index: int) -> NDArray[np.int64]:
    place = f"line {prompt.line}" if prompt.line else f"prompt {index}"
    chat = prompt.is_chat(tokenizer)
    if chat and not has_template(tokenizer):
        raise TextsError(
            f"{place} is a chat (`messages`), and the tokenizer has no chat template: write "
            f"`prompt`, a text to be continued, or take a tokenizer that has one"
        )
    try:
        if chat:
            found = tokenizer.apply_chat_template(
                list(map(dict, prompt.messages)),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        else:
            found = tokenizer(prompt.text, return_attention_mask=False, verbose=False)["input_ids"]
    except Exception as error:  # templates raise their own, tokenizers bare ones
        raise TextsError(f"cannot tokenise {place}: {error}") from error
    if not len(found):
        raise TextsError(f"{place} has no token: write a longer prompt")
    return np.asarray(found, np.int64)


def _prompt(record: object, line: int, place: str) -> Prompt:
    if not isinstance(record, dict):
        raise TextsError(
            f"{place}: expected a JSON object with the field `prompt`, or `messages`, got "
            f"{type(record).__name__}"
        )
    text, messages = record.get("prompt"), record.get("messages", ())
    if text is None and not messages:
        raise TextsError(f"{place}: no field `prompt` that holds a string, nor `messages`")
    if text is not None and not (_is_text(text) and text.strip()):
        raise TextsError(f"{place}: the prompt must be a string that is not blank")
    if messages and not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise TextsError(
            f"{place}: messages must be a list of objects with a role ({', '.join(_ROLES)}) and a "
            f"content, both strings"
        )
    kind, answer, model = (record.get(name) for name in ("kind", "answer", "model"))
    for name, value in (("kind", kind), ("answer", answer), ("model", model)):
        if value is not None and not _is_text(value):
            raise TextsError(f"{place}: the field `{name}` must be a string")
    if answer is not None and not answer.strip():
        raise TextsError(f"{place}: the answer is blank")
    ended = record.get("ended", True)
    if not isinstance(ended, bool):
        raise TextsError(f"{place}: the field `ended` must be true or false")
    said = tuple({"role": one["role"], "content": one["content"]} for one in messages)
    return Prompt(text, said, kind or "", answer, ended, model, line)


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and one.get("role") in _ROLES and _is_text(one.get("content"))


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold; JSON may have halves of surrogate pairs."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value

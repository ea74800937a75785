"""Prompts, and the answers that a model generates to them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TextsError, why
from .batches import untouched
from .sources import read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEECH_PROMPTS = Path(__file__).with_name("speech.jsonl")
"""Prompts of our own that speech is measured on: of four kinds, in turns."""

TRAINING_PROMPTS = Path(__file__).with_name("training.json")
"""Topics, and templates for them of other kinds: prompts of our own to train on."""

_ROLES = ("system", "user", "assistant", "tool", "developer")

_ONE_DAY = """\
{%- macro strftime_now(format) -%}
{{ format | replace("%d", "26") | replace("%m", "07") | replace("%Y", "2024") | replace("%y", "24")
| replace("%b", "Jul") | replace("%B", "July") | replace("%a", "Fri") | replace("%A", "Friday")
| replace("%H", "12") | replace("%M", "00") | replace("%S", "00") }}
{%- endmacro %}
"""
"""The day that templates are given: that which Llama 3's names by default."""

_ANSWER = "shallower"
"""An answer in place of any, to see what a template writes behind one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that is continued, or a chat that is answered; with an answer, if it has one.

    A tokenizer with a template for chats is given the ``messages``, any other one the ``text``.
    """

    text: str | None = None  # None for a chat alone
    messages: tuple[Mapping[str, str], ...] = ()  # each with `role` and `content`
    kind: str = ""  # such as `story`
    answer: str | None = None  # of a model
    ended: bool | None = None  # whether it ended by itself
    model: str | None = None  # of the answer, if known
    line: int = field(default=0, compare=False)  # the line in its file, for errors

    def shown(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Give what a person reads of it: the text, or the last message of the chat."""
        return self.messages[-1]["content"] if self.is_chat(tokenizer) else self.text or ""

    def is_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether a model with this tokenizer is given the messages, and not the text."""
        return bool(self.messages) and has_template(tokenizer)


def read_prompts(source: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Read a file of prompts, a JSON object a line; the first ``limit`` only.

    The fields are ``prompt``, a string, or ``messages``, a list of objects with ``role`` and
    ``content``, or both; and, where they are known, ``kind``, ``answer``, ``ended`` and ``model``.
    Others are ignored. By default the prompts are :data:`SPEECH_PROMPTS`. A TextsError names the
    line.
    """
    if limit is not None:
        _check_number(limit)
    source = SPEECH_PROMPTS if source is None else source
    return read_items(
        source, "prompts", fields="the field `prompt`, or `messages`", read=_prompt, limit=limit
    )


def given_prompts(
    prompts: "str | Path | Iterable[str | Mapping[str, Any] | Prompt] | None",
) -> list[Prompt]:
    """Take prompts as they are given: a file, or an iterable of texts, objects and prompts.

    An object has the fields of a line of a file; by default the prompts are :data:`SPEECH_PROMPTS`.
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


def training_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Draw chats of one message, no two alike, each a template and a topic of our own.

    They are of other kinds than the prompts that speech is measured on. The first ones of a larger
    draw are a smaller draw with the same seed.
    """
    _check_number(count)
    made_of = json.loads(TRAINING_PROMPTS.read_text(encoding="utf-8"))
    topics, templates = made_of["topics"], made_of["templates"]
    num_pairs = len(topics) * len(templates)
    if count > num_pairs:
        raise TextsError(f"there are {num_pairs} prompts to train on, got {count}: ask for fewer")
    prompts = []
    for pair in np.random.default_rng(seed).permutation(num_pairs)[:count]:
        template, topic = templates[pair // len(topics)], topics[pair % len(topics)]
        said = {"role": "user", "content": template["text"].replace("{topic}", topic)}
        prompts.append(Prompt(messages=(said,), kind=template["kind"]))
    return prompts


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of all that prompts say, whatever file they are in."""
    digest = hashlib.sha256()
    for one in prompts:
        ended = one.answer is None or bool(one.ended)
        said = [one.text, list(map(dict, one.messages)), one.answer, ended]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]
) -> list[NDArray[np.int64]]:
    """Tokenise prompts, (P,) int64 each, up to where the answer begins.

    Chats are written by the tokenizer's template, on a fixed day, and without thoughts before the
    answer where it allows that. Of a text the token that ends one, which some tokenizers add, is
    left out.
    """
    with untouched(tokenizer):
        return [
            _ids(tokenizer, one, f"line {one.line}" if one.line else f"prompt {index}")
            for index, one in enumerate(prompts)
        ]


def answer_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> NDArray[np.int64]:
    """Tokenise the answer of a prompt, (A,) int64, with its end if it is known to have ended.

    In a chat that is what the template writes behind an answer, else what ends a text, if anything
    does.
    """
    assert prompt.answer is not None
    with untouched(tokenizer):
        place = f"the answer of line {prompt.line}" if prompt.line else "an answer"
        found = _tokenised(tokenizer, prompt.answer, place, special=False)
        end = _end(tokenizer, prompt, place) if prompt.ended else None
    if end is not None and found[-1:] != [end]:
        found.append(end)
    return np.asarray(found, np.int64)


def ends_of_answers(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that end an answer: that of texts, and that of chats, as far as there are any."""
    ends = {tokenizer.eos_token_id}
    if has_template(tokenizer):
        with suppress(TextsError), untouched(tokenizer):  # of a template that wants more than that
            ends.add(_end_of_chats(tokenizer, "a chat"))
    return {one for one in ends if isinstance(one, int)}


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer knows how a chat is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def _ids(tokenizer: Any, prompt: Prompt, place: str) -> NDArray[np.int64]:
    if prompt.is_chat(tokenizer):
        chat = _written(tokenizer, prompt.messages, place, answered=False)
        found = _tokenised(tokenizer, chat, place, special=False)
    elif prompt.text is None:
        raise TextsError(
            f"{place} is a chat (`messages`), and the tokenizer has no chat template: write "
            f"`prompt`, a text to be continued, or take a tokenizer that has one"
        )
    else:
        found = _tokenised(tokenizer, prompt.text, place, special=True)
        own = _tokenised(tokenizer, prompt.text, place, special=False)
        while found[-1:] == [tokenizer.eos_token_id] and found[-len(own) :] != own:
            found.pop()
    if not found:
        raise TextsError(f"{place} has no token: write a longer prompt")
    return np.asarray(found, np.int64)


def _tokenised(tokenizer: Any, text: str, place: str, *, special: bool) -> list[int]:
    """Token ids of a text, with those that the tokenizer puts around it or without."""
    try:
        encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    except Exception as error:  # tokenizers raises bare ones
        raise TextsError(f"cannot tokenise {place}: {why(error)}") from error
    return list(encoded["input_ids"])


def _written(
    tokenizer: Any, messages: Iterable[Mapping[str, str]], place: str, *, answered: bool
) -> str:
    """A chat as the template writes it, up to where the answer begins, or with its answer."""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _ONE_DAY + template
        return tokenizer.apply_chat_template(
            list(map(dict, messages)),
            chat_template=template,
            add_generation_prompt=not answered,
            tokenize=False,
            enable_thinking=False,
        )
    except Exception as error:  # templates raise their own
        raise TextsError(f"the chat template refuses {place}: {why(error)}") from error


def _end(tokenizer: Any, prompt: Prompt, place: str) -> int | None:
    """The token that ends an answer; of chats it is often another one than that of texts."""
    if prompt.is_chat(tokenizer):
        return _end_of_chats(tokenizer, place)
    end: int | None = tokenizer.eos_token_id
    return end


def _end_of_chats(tokenizer: Any, place: str) -> int | None:
    """The token that the template writes behind an answer, else that which ends a text."""
    chat = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER})
    _, answer, behind = _written(tokenizer, chat, place, answered=True).rpartition(_ANSWER)
    added = set(tokenizer.get_added_vocab().values())
    for one in _tokenised(tokenizer, behind, place, special=False) if answer else ():
        if one in added:
            return one
    end: int | None = tokenizer.eos_token_id
    return end


def _check_number(count: int) -> None:
    if count < 1:
        raise TextsError(f"the number of prompts must be at least 1, got {count}")


def _prompt(record: object, line: int, place: str) -> Prompt:
    if not isinstance(record, dict):
        raise TextsError(
            f"{place}: expected a JSON object with the field `prompt`, or `messages`, got "
            f"{type(record).__name__}"
        )
    text = _string(record, "prompt", place, blank=False)
    messages = _messages(record.get("messages"), place)
    if text is None and not messages:
        raise TextsError(f"{place}: no field `prompt` that holds a string, nor `messages`")
    ended = record.get("ended")
    if not isinstance(ended, bool | None):
        raise TextsError(f"{place}: the field `ended` must be true or false")
    return Prompt(
        text,
        messages,
        _string(record, "kind", place) or "",
        _string(record, "answer", place, blank=False),
        ended,
        _string(record, "model", place),
        line,
    )


def _messages(value: object, place: str) -> tuple[Mapping[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise TextsError(f"{place}: messages must be a list, got {type(value).__name__}")
    messages = []
    for number, one in enumerate(value, start=1):
        where = f"{place}, message {number}"
        if not (isinstance(one, dict) and one.get("role") in _ROLES):
            raise TextsError(f"{where}: expected an object with a role ({', '.join(_ROLES)})")
        content = _string(one, "content", where, blank=number < len(value))
        if content is None:
            raise TextsError(f"{where}: no field `content` that holds a string")
        messages.append({"role": one["role"], "content": content})
    if messages and messages[-1]["role"] == "assistant":
        raise TextsError(
            f"{place}: the last message is the assistant's: end with the one that is to be "
            f"answered, and write what was said in the field `answer`"
        )
    return tuple(messages)


def _string(
    record: Mapping[str, object], name: str, place: str, *, blank: bool = True
) -> str | None:
    """The string that a field holds, if it is there, and not blank if it must not be."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise TextsError(
            f"{place}: the field `{name}` must be a string, got {type(value).__name__}"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON may hold them, UTF-8 not
        raise TextsError(
            f"{place}: the field `{name}` holds half of a surrogate pair: write whole characters"
        )
    if not (blank or value.strip()):
        raise TextsError(f"{place}: the field `{name}` is blank: write some text, or leave it out")
    return value

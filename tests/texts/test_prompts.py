"""Prompts come out of files as they are, and become the tokens that a model is to go on from."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from shallower.errors import TextsError
from shallower.texts.prompts import (
    TRAINING_PROMPTS,
    Prompt,
    answer_ids,
    has_template,
    prompt_ids,
    prompts_fingerprint,
    read_prompts,
    training_prompts,
)
from tests.conftest import word_tokenizer

KINDS = ["instruction", "story", "code", "question"]
ASKED = {"role": "user", "content": "w1 w2"}
TEMPLATE = (
    "<s> {% for message in messages %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture
def write(tmp_path):
    """Write a file of lines, each a string or what is to be JSON; gives its path as a string."""

    def written(*lines, name="prompts.jsonl"):
        path = tmp_path / name
        lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return written


@pytest.fixture
def base():
    """A tokenizer without a template that frames every text with two special tokens."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <eos>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)],
    )
    return tokenizer


@pytest.fixture
def chat(base):
    """The same with a template, whose answers end with a token of their own."""
    roles = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    base.add_special_tokens({"additional_special_tokens": roles})
    base.chat_template = TEMPLATE
    return base


def tokens(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def asked(tokenizer, **fields):
    (ids,) = prompt_ids(tokenizer, [Prompt(**fields)])
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    return tokens(tokenizer, ids)


def answered(tokenizer, **fields):
    ids = answer_ids(tokenizer, Prompt(**fields))
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    return tokens(tokenizer, ids)


# Files
def test_what_a_line_says_is_read(write):
    path = write(
        {"prompt": " one\n", "kind": "story", "answer": "two ", "ended": False, "model": "m"},
        "",
        {"messages": [{"role": "system", "content": ""}, {**ASKED, "name": "n"}], "prompt": "ü 😀"},
        {"prompt": "one", "messages": None, "ended": None, "kind": None, "other": 1},
        {"prompt": "one", "messages": []},
    )
    assert read_prompts(path) == [
        Prompt(" one\n", (), "story", "two ", False, "m"),
        Prompt("ü 😀", ({"role": "system", "content": ""}, ASKED)),
        Prompt("one"),
        Prompt("one"),
    ]
    assert [one.line for one in read_prompts(path)] == [1, 3, 4, 5]


def test_the_first_lines_are_read_alone(write):
    path = write({"prompt": "one"}, {"prompt": "two"}, "no JSON")
    assert [one.text for one in read_prompts(path, 2)] == ["one", "two"]
    with pytest.raises(TextsError, match=r"prompts\.jsonl, line 3: not JSON"):
        read_prompts(path, 3)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_number_below_one_is_refused(limit):
    with pytest.raises(TextsError, match=f"number of prompts must be at least 1, got {limit}"):
        read_prompts(limit=limit)
    with pytest.raises(TextsError, match=f"number of prompts must be at least 1, got {limit}"):
        training_prompts(limit)


def test_what_is_no_file_is_refused(tmp_path, write):
    with pytest.raises(TextsError, match=r"there is no file of prompts none\.jsonl: expected"):
        read_prompts("none.jsonl")
    with pytest.raises(TextsError, match=f"{tmp_path} is a folder: expected JSON lines"):
        read_prompts(tmp_path)
    with pytest.raises(TextsError, match=r"cannot read prompts from x+: file name too long"):
        read_prompts("x" * 5000)
    with pytest.raises(TextsError, match=r"there are no prompts in .*: expected a JSON object a"):
        read_prompts(write("", "  "))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "tw', "not JSON"),
        ("[]", "expected a JSON object with the field `prompt`, or `messages`, got list"),
        ({}, "no field `prompt` that holds a string, nor `messages`"),
        ({"prompt": 1}, "the field `prompt` must be a string, got int"),
        ({"prompt": ""}, "the field `prompt` is blank"),
        ({"prompt": "\ud83d"}, "the field `prompt` holds half of a surrogate pair"),
        ({"prompt": "one", "kind": ["story"]}, "the field `kind` must be a string, got list"),
        ({"prompt": "one", "answer": " "}, "the field `answer` is blank"),
        ({"prompt": "one", "ended": 1}, "the field `ended` must be true or false"),
        ({"messages": ASKED}, "messages must be a list, got dict"),
        ({"messages": [ASKED, "w1"]}, r"expected an object with a role \(system, user"),
        ({"messages": [{**ASKED, "role": "bot"}]}, "expected an object with a role"),
        ({"messages": [{"role": "user"}]}, "no field `content` that holds a string"),
        ({"messages": [{**ASKED, "content": [ASKED]}]}, "the field `content` must be a string"),
        ({"messages": [ASKED, {**ASKED, "content": " "}]}, "the field `content` is blank"),
        ({"messages": [ASKED, {**ASKED, "role": "assistant"}]}, "the last message is the assist"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(write, line, said):
    path = write({"prompt": "one"}, line)
    with pytest.raises(TextsError, match=rf"prompts\.jsonl, line 2(, message [12])?: {said}"):
        read_prompts(path)


def test_the_fingerprint_tells_contents_and_no_names(write):
    lines = [
        {"prompt": "w1"},
        {"prompt": "w2"},
        {"prompt": "w1", "messages": [ASKED]},
        {"prompt": "w1", "messages": [{**ASKED, "role": "system"}, ASKED]},
        {"prompt": "w1", "answer": "w2", "ended": True},
        {"prompt": "w1", "answer": "w2", "ended": False},
    ]
    found = [prompts_fingerprint(read_prompts(write(line))) for line in lines]
    found.append(prompts_fingerprint(read_prompts(write(*lines[:2]))))
    found.append(prompts_fingerprint(read_prompts(write(*lines[1::-1]))))
    assert len(set(found)) == len(found)
    assert {len(one) for one in found} == {64}
    other = read_prompts(write("", lines[0], name="other.jsonl"))
    assert prompts_fingerprint(other) == found[0]


# Our own
def test_speech_is_measured_on_four_kinds_in_turns():
    prompts = read_prompts()
    assert [one.kind for one in prompts] == KINDS * 30
    for one in prompts:
        assert one.answer is None
        ((role, content),) = ((said["role"], said["content"]) for said in one.messages)
        assert role == "user"
        assert content == content.strip()
        assert one.text == one.text.strip()
        assert 10 <= len(one.text.split()) <= 30, one.text
        assert not one.text.endswith((".", "!", "?")), one.text
    assert len({one.text for one in prompts}) == 120
    assert len({one.messages[0]["content"] for one in prompts}) == 120
    # No two begin alike, which a model would answer alike.
    for texts in zip(*((one.text, one.messages[0]["content"]) for one in prompts), strict=True):
        assert len({tuple(text.split()[:8]) for text in texts}) == 120


def test_training_is_on_other_kinds_and_a_topic_each():
    made_of = json.loads(TRAINING_PROMPTS.read_text())
    topics, templates = made_of["topics"], made_of["templates"]
    assert len(set(topics)) == len(topics) >= 200
    assert len({one["text"] for one in templates}) == len(templates) >= 40
    assert not {one["kind"] for one in templates} & set(KINDS)
    for one in templates:
        assert one["text"].count("{topic}") == 1
        assert not one["text"].startswith("{topic}")  # topics begin in lower case


def word_runs(text, length=13):
    found = [word.strip(".,:;!?\"'()").lower() for word in text.split()]
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_no_thirteen_words_are_both_measured_and_trained_on():
    measured = set()
    for one in read_prompts():
        measured |= word_runs(one.text) | word_runs(one.messages[0]["content"])
    trained = set()
    for one in training_prompts(num_pairs()):
        trained |= word_runs(one.messages[0]["content"])
    assert len(measured) > 1000
    assert len(trained) > 1000
    assert not measured & trained


def num_pairs():
    made_of = json.loads(TRAINING_PROMPTS.read_text())
    return len(made_of["topics"]) * len(made_of["templates"])


def test_draws_to_train_on_are_by_the_seed_and_grow_at_the_end():
    some, more = training_prompts(20, 3), training_prompts(300, 3)
    assert more[:20] == some
    assert training_prompts(20) == training_prompts(20, seed=0) != some
    assert len({one.kind for one in more}) > 30
    for one in more:
        ((role, content),) = ((said["role"], said["content"]) for said in one.messages)
        assert (one.text, one.answer, role) == (None, None, "user")
        assert "{" not in content


def test_all_pairs_are_drawn_once_and_no_more():
    everything = training_prompts(num_pairs(), 1)
    assert len({one.messages[0]["content"] for one in everything}) == num_pairs()
    with pytest.raises(TextsError, match=f"there are {num_pairs()} prompts to train on, got"):
        training_prompts(num_pairs() + 1)


# Tokens
def test_a_text_is_continued_and_not_ended(base):
    assert asked(base, text="w1 w2") == "<s> w1 w2"
    assert asked(base, text="w1 <eos>") == "<s> w1 <eos>"
    assert not has_template(base)


def test_a_chat_is_written_by_the_template_up_to_the_answer(chat):
    assert has_template(chat)
    expected = "<s> <|user|> w1 w2 <|end|> <|assistant|>"
    assert asked(chat, messages=(ASKED,)) == expected
    assert asked(chat, text="w3", messages=(ASKED,)) == expected
    assert asked(chat, text="w3") == "<s> w3"
    turns = ({"role": "system", "content": "w5"}, ASKED, {**ASKED, "role": "assistant"}, ASKED)
    assert asked(chat, messages=turns) == (
        "<s> <|system|> w5 <|end|> <|user|> w1 w2 <|end|> <|assistant|> w1 w2 <|end|> "
        "<|user|> w1 w2 <|end|> <|assistant|>"
    )


def test_a_tokenizer_without_template_takes_the_text(base):
    assert asked(base, text="w3", messages=(ASKED,)) == "<s> w3"
    said = "is a chat .* no chat template: write `prompt`, a text to be continued, or take"
    with pytest.raises(TextsError, match=f"^prompt 1 {said}"):
        prompt_ids(base, [Prompt("w3"), Prompt(messages=(ASKED,))])
    with pytest.raises(TextsError, match=f"^line 7 {said}"):
        prompt_ids(base, [Prompt(messages=(ASKED,), line=7)])


def test_a_template_that_refuses_is_an_error_of_texts(chat):
    chat.chat_template = "{{ raise_exception('Conversations\nmust be short') }}"
    with pytest.raises(TextsError, match="template refuses prompt 0: Conversations must be short"):
        prompt_ids(chat, [Prompt(messages=(ASKED,))])


def test_a_prompt_without_tokens_is_refused(words):
    with pytest.raises(TextsError, match=r"^line 4 has no token: write a longer prompt"):
        prompt_ids(words, [Prompt("\n", line=4)])


def test_what_cannot_be_tokenised_is_named(words):
    with pytest.raises(TextsError, match=r"^cannot tokenise prompt 1: "):
        prompt_ids(words, [Prompt("w1"), Prompt("\ud83d")])
    with pytest.raises(TextsError, match=r"^cannot tokenise the answer of line 2: "):
        answer_ids(words, Prompt("w1", answer="\ud83d", line=2))


def test_no_template_thinks_where_it_can_be_told(chat):
    chat.chat_template = TEMPLATE + "{% if enable_thinking is false %}w9 {% endif %}"
    assert asked(chat, messages=(ASKED,)).endswith("<|assistant|> w9")


DAYS = {
    "called": "{{ strftime_now('%d %b %Y %B %Y-%m-%d') }}",
    "asked for": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "in a macro": "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}",
}


@pytest.mark.parametrize("template", DAYS.values(), ids=DAYS)
def test_a_template_that_names_the_day_always_names_the_same(chat, template):
    chat.add_tokens(["26", "Jul", "2024", "July", "2024-07-26"])
    chat.chat_template = template + " " + TEMPLATE
    found = asked(chat, messages=(ASKED,)).split(" <s> ")[0]
    assert found in ("26 Jul 2024", "26 Jul 2024 July 2024-07-26")


def test_a_template_is_else_written_as_it_stands():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({one: index for index, one in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    tokenizer.chat_template = "  {% if messages %}\n  {{ strftime_now('on %d') }}{% endif %}\n\n é"
    (ids,) = prompt_ids(tokenizer, [Prompt(messages=(ASKED,))])
    assert tokenizer.decode(ids) == "  on 26\n é"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ strftime_now('on %d') }}", "on 26"
    )
    (plain,) = prompt_ids(tokenizer, [Prompt(messages=(ASKED,))])
    assert plain.tolist() == ids.tolist()


def test_an_answer_ends_as_the_model_ends_it(base):
    assert answered(base, text="w1", answer="w2 w3", ended=True) == "w2 w3 <eos>"
    assert answered(base, text="w1", answer="w2 <eos>", ended=True) == "w2 <eos>"
    for cut_off in ({}, {"ended": None}, {"ended": False}):
        assert answered(base, text="w1", answer="w2 w3", **cut_off) == "w2 w3"
    base.eos_token = None
    assert answered(base, text="w1", answer="w2 w3", ended=True) == "w2 w3"


def test_an_answer_in_a_chat_ends_as_the_template_ends_it(chat):
    assert answered(chat, messages=(ASKED,), answer="w2 w3", ended=True) == "w2 w3 <|end|>"
    assert answered(chat, messages=(ASKED,), answer="w2 w3", ended=False) == "w2 w3"
    assert answered(chat, text="w1", answer="w2 w3", ended=True) == "w2 w3 <eos>"
    chat.chat_template = "{% for message in messages %}{{ message['content'] }} w7 {% endfor %}"
    assert answered(chat, messages=(ASKED,), answer="w2 w3", ended=True) == "w2 w3 <eos>"
    chat.chat_template = "<s> {{ messages[0]['content'] }} <|end|>"
    assert answered(chat, messages=(ASKED,), answer="w2 w3", ended=True) == "w2 w3 <eos>"


def test_tokenising_leaves_the_tokenizer_as_it_was(chat):
    chat.backend_tokenizer.enable_truncation(3)
    chat.backend_tokenizer.enable_padding(length=5)
    before = chat.backend_tokenizer.to_str()
    assert asked(chat, messages=(ASKED,)).split()[-1] == "<|assistant|>"
    assert asked(chat, text="w1 w2 w3 w4 w5 w6") == "<s> w1 w2 w3 w4 w5 w6"
    assert answered(chat, text="w1", answer="w1 w2 w3 w4", ended=True) == "w1 w2 w3 w4 <eos>"
    assert chat.backend_tokenizer.to_str() == before


@pytest.mark.slow
def test_a_real_tokenizer_takes_all_of_ours(smol):
    tokenizer = smol[1]
    prompts = [*read_prompts(), *training_prompts(50)]
    for one, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True):
        assert tokenizer.decode(ids) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            f"Face<|im_end|>\n<|im_start|>user\n{one.messages[0]['content']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert 30 < len(ids) < 300
    said = answer_ids(tokenizer, Prompt(messages=(ASKED,), answer="Yes.", ended=True))
    assert tokenizer.decode(said) == "Yes.<|im_end|>"

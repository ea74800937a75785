"""Answers that a model writes for the patch and the training of its cut."""

import pytest

import shallower as sh
from shallower.texts.prompts import training_prompts
from tests.conftest import tiny_llama
from tests.evaluation.answering import plain_answer
from tests.written import MANY


def test_every_prompt_is_answered_in_its_order(llama, words):
    found = sh.answer_prompts(llama, words, MANY[:5], num_tokens=6, seed=None)
    ends, ids = [words.eos_token_id, 2], words(MANY[:5])["input_ids"]
    assert found == [plain_answer(llama, one, 6, ends=ends) for one in ids]


def test_by_default_they_are_chats_of_our_own(llama, words):
    chats = words.__class__(tokenizer_object=words.backend_tokenizer, eos_token="<eos>")
    chats.chat_template = "{% for one in messages %}w1 {{ one.content }} w2{% endfor %}"
    found = sh.answer_prompts(llama, chats, num_prompts=5, num_tokens=2, seed=3)
    asked = [f"w1 {one.messages[0]['content']} w2" for one in training_prompts(5, 3)]
    assert [list(one.given) for one in found] == [chats(one)["input_ids"] for one in asked]
    likeliest = sh.answer_prompts(llama, chats, num_prompts=5, num_tokens=2, seed=None)
    assert [len(one.given) for one in likeliest] == [
        len(chats(f"w1 {one.messages[0]['content']} w2")["input_ids"])
        for one in training_prompts(5, 0)
    ]
    with pytest.raises(sh.TextsError, match=r"there are \d+ prompts to train on, got 999999: ask"):
        sh.answer_prompts(llama, chats, num_prompts=999_999)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (None, {}, r"no chat template, and prompts of our own are chats: give the beginnings of"),
        (["w1"], {"num_tokens": 0}, r"answers of at most 0 tokens: expected 1 at least \(num_tok"),
        (["w1"], {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ("nowhere.jsonl", {}, "there is no file of prompts nowhere.jsonl"),
    ],
)
def test_what_cannot_be_answered_is_refused(words, prompts, options, message):
    with pytest.raises(sh.TextsError, match=message):
        sh.answer_prompts(tiny_llama(2), words, prompts, **options)


def test_a_model_on_disk_is_not_read_for_each_token(llama, words, tmp_path):
    sh.save_model(llama, words, tmp_path / "stored")
    model, tokenizer = sh.load_model(tmp_path / "stored", device_map="stream")
    with pytest.raises(sh.ModelError, match="the layers are streamed from disk"):
        sh.answer_prompts(model, tokenizer, MANY)

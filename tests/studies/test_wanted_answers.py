"""Answers that a patch or a training wants: which prompts, and who is asked."""

import pytest

import shallower as sh
from shallower.models.decoder import Decoder
from shallower.store.given_models import ModelStore
from shallower.store.store import Store, open_store
from shallower.studies.answers import PATCH_ANSWERS, WantedAnswers, answers_for
from shallower.texts.prompts import Prompt, training_prompts
from tests.conftest import tiny_llama
from tests.written import written as written

TEXTS = ["", "  w1 w2 ", *(f"w{i} w{i + 1} w{i + 2}" for i in range(60))]


def by(wanted, tokenizer, texts=TEXTS, store=None):
    return wanted.by(Decoder.of(tiny_llama()), tokenizer, texts, store=store or off())


def off():
    return ModelStore(Store(None), None, [])


def prompts_of(found, tokenizer):
    return [tokenizer.decode(one.given) for one in found]


@pytest.mark.parametrize(
    ("steps", "count"),
    [(None, PATCH_ANSWERS), (1, 32), (4, 32), (5, 64), (60, 480), (256, 2048), (5000, 2048)],
)
def test_so_many_are_written_for_so_many_steps(steps, count):
    assert answers_for(steps) == count


def test_more_steps_take_the_prompts_of_fewer_and_others():
    few, many = (training_prompts(answers_for(steps), 3) for steps in (4, 60))
    assert few == many[:32]


def test_beginnings_of_texts_are_whole_words_that_are_not_blank(words):
    long = " ".join(f"w{i}" for i in range(97))
    found = by(WantedAnswers(None, 3, 2), words, [*TEXTS[:3], long, "never read"])
    first, second, third = prompts_of(found, words)
    assert (first, second) == ("w1 w2", "w0 w1 w2")
    assert long.startswith(f"{third} ")
    assert 110 < len(third) < 120
    texts = iter(TEXTS)
    by(WantedAnswers(None, 3, 2), words, texts)
    assert next(texts) == "w2 w3 w4"  # as many are read as are begun
    assert prompts_of(by(WantedAnswers(None, 1, 2), words, ["w1" * 99]), words) == ["<unk>"]


def test_without_a_template_and_without_texts_nothing_can_be_asked(words):
    with pytest.raises(sh.TextsError, match=r"no chat template .* and there are no texts .*give"):
        by(WantedAnswers(None, 3, 2), words, ["", " "])


def test_texts_are_not_looked_at_where_prompts_are_given_or_ours_are_chats(chats):
    given = WantedAnswers([Prompt("w5 w6")], 3, 2)
    assert prompts_of(by(given, chats, None), chats) == ["w5 w6"]
    found = by(WantedAnswers(None, 3, 2, seed=1), chats, None)
    asked = [f"w1 {one.messages[0]['content'][:9]} w2" for one in training_prompts(3, 1)]
    assert [list(one.given) for one in found] == [chats(one)["input_ids"] for one in asked]


@pytest.fixture
def chats(words):
    """The tokenizer of words with a template for chats."""
    found = words.__class__(tokenizer_object=words.backend_tokenizer, eos_token="<eos>")
    found.chat_template = "{% for one in messages %}w1 {{ one.content[:9] }} w2{% endfor %}"
    return found


def test_answers_are_drawn_by_the_seed_and_found_again(words, written):
    store = ModelStore(open_store(), {"of": "this model"}, [])
    for seed in (0, 0, 1):
        found = by(WantedAnswers(None, 40, 5, seed), words, store=store)
        model = tiny_llama()
        asked = prompts_of(found, words)
        expected = sh.answer_prompts(model, words, asked, num_tokens=5, seed=seed)
        assert found == expected
    assert written == [32, 8, 40, 40, 32, 8, 40]


def test_what_lies_in_a_file_is_taken(words, written):
    there = [
        Prompt("w1", answer="w2 w3", ended=False, model="a/b"),
        Prompt("w4", answer="w5", ended=True),
    ]
    wanted = WantedAnswers(there[1:], 9)
    assert wanted.are_there
    assert [one.written for one in by(wanted, words)] == [(5, words.eos_token_id)]
    with pytest.raises(sh.TextsError, match="prompt 0 is an answer of a/b, and the uncut model"):
        by(WantedAnswers(there, 9), words)
    assert written == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([Prompt(messages=({"role": "user", "content": "w1"},))], "no chat template: write"),
        ([Prompt("w1", answer="w2"), Prompt("w3")], "prompt 1 has no answer"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_a_check_alone(words, written, prompts, message):
    wanted, decoder = WantedAnswers(prompts, 9, 4), Decoder.of(tiny_llama())
    with pytest.raises(sh.TextsError, match=message):
        wanted.check(decoder, words, TEXTS)
    assert written == []
    WantedAnswers(None, 9, 4).check(decoder, words, TEXTS)
    assert written == []


def test_they_say_in_words_whose_they_are():
    prompts = [Prompt("w1"), Prompt("w2")]
    assert str(WantedAnswers(prompts, 32)) == "to 2 prompts"
    assert str(WantedAnswers(None, 32)) == "to 32 prompts of our own, or beginnings of texts"
    there = WantedAnswers([Prompt("w1", answer="w2")], 32)
    assert str(there) == "1 of a file"
    assert [WantedAnswers(p, 32).num_written for p in (prompts, None)] == [512, 8192]
    assert there.num_written == 0

"""Answers as training sequences, from files of prompts, and among the texts of a patch."""

from fractions import Fraction
from itertools import count, islice
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.patching.states import divide
from shallower.results.speech import Answer
from shallower.texts.batches import tokenise
from shallower.texts.prompts import prompts_fingerprint, read_prompts
from shallower.texts.sequences import (
    answered,
    answers_turns,
    collate,
    mixed,
    mixed_order,
    order,
    read_samples,
    usable_answers,
)
from shallower.values.identity import ModelIdentity
from shallower.values.tokens import Tokens
from tests.conftest import word_tokenizer
from tests.healing.cuts import TEXTS
from tests.written import write_prompts

WORDS = word_tokenizer()
END, PAD = WORDS.eos_token_id, WORDS.pad_token_id


def answer(given, written, ended=True, first=1):
    """An answer whose tokens are numbered from ``first`` on."""
    ids = tuple(range(first, first + given + written))
    return Answer(ids[:given], ids[given:], ended)


ANSWERS = [answer(*lengths, first=10 * i) for i, lengths in enumerate(
    [(3, 5), (2, 9, False), (6, 4), (1, 3, False), (4, 40), (2, 2), (5, 11), (12, 8)]
)]  # fmt: skip


def samples_of(answers, *, packing, share=1.0, num_samples=32, texts=()):
    return read_samples(
        WORDS, texts, max_length=16, packing=packing, num_samples=num_samples, answers=answers,
        share=share,
    )  # fmt: skip


# Sequences
def labelled(answer, max_length, end=None):
    """The tokens of an answer behind its prompt, each with its label."""
    pairs = [(token, -100) for token in answer.given]
    pairs += [(token, token) for token in answer.written]
    if end is not None and not answer.ended:
        pairs.append((end, -100))
    return pairs[:max_length]


def joined_slowly(answers, max_length):
    """The same, each in the first sequence that has room for all of it."""
    rows = []
    for one in answers:
        pairs = labelled(one, max_length, END)
        for row in rows:
            if len(row) + len(pairs) <= max_length:
                row += pairs
                break
        else:
            rows.append(pairs)
    return rows


def assert_rows(samples, expected):
    batch = dict(collate(samples.rows))
    assert len(samples) == len(expected)
    for index, row in enumerate(expected):
        length = len(row)
        ids, labels = (list(values) for values in zip(*row, strict=True))
        assert batch["input_ids"][index, :length].tolist() == ids
        assert batch["labels"][index, :length].tolist() == labels
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert (batch["labels"][index, length:] == -100).all()


def test_of_an_answer_what_was_written_is_predicted():
    samples = samples_of(ANSWERS, packing=False)
    assert_rows(samples, [labelled(one, 16) for one in ANSWERS])
    assert (samples.identity.num_texts, samples.num_text_rows) == (0, 0)
    assert samples.answers.num_answers == len(ANSWERS)
    assert samples.answers.num_tokens == 5 + 9 + 4 + 3 + 12 + 2 + 11 + 4


@given(
    st.lists(
        st.tuples(st.integers(1, 15), st.integers(1, 20), st.booleans()), min_size=1, max_size=30
    )
)
def test_packed_answers_are_whole_and_predicted_alone(lengths):
    answers = [answer(*one, first=7 * index) for index, one in enumerate(lengths)]
    samples = samples_of(answers, packing=True)
    assert_rows(samples, joined_slowly(answers, 16))
    expected = sum(min(16 - len(one.given), len(one.written)) for one in answers)
    assert samples.answers.num_tokens == expected
    labels = dict(collate(samples.rows))["labels"]
    assert (labels >= 0).sum() == expected
    assert (labels >= 0).any(axis=1).all()  # so that no forward has nothing to predict


def test_texts_come_first_and_are_as_they_were_without_answers():
    for packing in (True, False):
        both = samples_of(ANSWERS, packing=packing, share=0.25, num_samples=32, texts=TEXTS)
        alone = read_samples(WORDS, TEXTS, max_length=16, packing=packing, num_samples=24)
        assert both.num_text_rows == len(alone) == 24
        assert both.identity == alone.identity
        for row, expected in zip(both.rows, alone.rows, strict=False):
            assert row.ids.tolist() == expected.ids.tolist()
            assert row.predicted is None
        batch = dict(collate(both.rows[:24]))
        expected = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        expected[:, 0] = -100
        assert np.array_equal(batch["labels"], expected)


def test_no_more_texts_are_needed_than_a_step_takes():
    samples = samples_of(ANSWERS, packing=False, share=0.75, num_samples=16, texts=TEXTS[:4])
    assert samples.num_text_rows == 4
    with pytest.raises(sh.TextsError, match=r"3 texts make 3 texts .* one step takes 4: give more"):
        samples_of(ANSWERS, packing=False, share=0.75, num_samples=16, texts=TEXTS[:3])


def test_the_identity_is_of_the_tokens_and_the_ends():
    def fingerprint(answers):
        return samples_of(answers, packing=False).answers.fingerprint

    one = Answer((1, 2), (3, 4), True)
    known = fingerprint([one])
    assert fingerprint([Answer([1, 2], [3, 4], True)]) == known
    for other in (
        Answer((1,), (2, 3, 4), True), Answer((1, 2), (3, 5), True), Answer((1, 2), (3, 4), False),
    ):  # fmt: skip
        assert fingerprint([other]) != known
    assert fingerprint([one, one]) != known


def test_answers_of_which_nothing_can_be_predicted_are_left_out():
    bad = [Answer((1, 2), (), True), answer(16, 3), Answer((), (1, 2), True)]
    said = (
        r"answers are left out: 3 of 11 samples rejected: sample 0: no token of the answer; "
        r"sample 1: a prompt of 16 tokens; sample 2: no token of the prompt$"
    )
    with pytest.warns(sh.RejectedSamplesWarning, match=said):
        assert usable_answers([*bad, *ANSWERS], 16) == ANSWERS
    for answers, why in ((bad, "3 of 3 samples"), ([], "no answers to learn from; give some")):
        with pytest.raises(sh.TextsError, match=why):
            usable_answers(answers, 16)
    with pytest.raises(sh.TextsError, match="answer 1 is of type str: expected Answer"):
        usable_answers([*ANSWERS[:1], "w1"], 16)


# The order
@pytest.mark.parametrize("share", ["1/10", "1/4", "1/2", "0.3", "5/8", "0.95", "1"])
def test_each_step_has_its_share_of_answers(share):
    exact = Fraction(share)
    turns = answers_turns(160, float(exact))
    assert turns.tolist() == [floor((k + 1) * exact) > floor(k * exact) for k in range(160)]
    for step in turns.reshape(10, 16):
        assert step.sum() in (floor(16 * exact), -floor(-16 * exact))
    assert np.array_equal(
        np.concatenate([answers_turns(1, float(exact), first=k) for k in range(50)]), turns[:50]
    )


def test_each_kind_is_taken_once_before_any_is_taken_again():
    samples = samples_of(ANSWERS, packing=False, share=0.5, num_samples=40, texts=TEXTS)
    taken = mixed_order(samples, 96, share=0.5, seed=3)
    turns = answers_turns(96, 0.5)
    assert np.array_equal(taken >= samples.num_text_rows, turns)
    assert np.array_equal(taken[~turns], order(20, 48, 3))
    assert np.array_equal(taken[turns], 20 + order(len(ANSWERS), 48, 3))
    assert np.array_equal(mixed_order(samples, 64, share=0.5, seed=3), taken[:64])
    assert not np.array_equal(mixed_order(samples, 96, share=0.5, seed=4), taken)


def test_the_order_of_one_kind_is_that_of_all():
    texts = read_samples(WORDS, TEXTS, max_length=16, packing=True, num_samples=40)
    assert np.array_equal(mixed_order(texts, 99, share=None, seed=2), order(40, 99, 2))
    alone = samples_of(ANSWERS, packing=False)
    assert np.array_equal(mixed_order(alone, 99, share=1.0, seed=2), order(len(ANSWERS), 99, 2))


# From files
MODEL = ModelIdentity("SmolLM2-135M", "llama", 30, "bfloat16", "ab" * 32)


def prompts_of(folder, *records):
    return read_prompts(write_prompts(folder / "answers.jsonl", *records))


def test_answers_of_a_file_are_those_of_its_model(tmp_path):
    names = ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m", "models/SMOLLM2-135M/", "ab" * 32, None)
    said = {"prompt": "w1 w2", "answer": "w3 w4", "ended": True}
    records = [{**said, "model": name} for name in names]
    records[1]["ended"] = False
    found = answered(WORDS, prompts_of(tmp_path, *records), model=MODEL)
    whole, short = Answer((1, 2), (3, 4, END), True), Answer((1, 2), (3, 4), False)
    assert found == [whole, short, whole, whole, whole]


@pytest.mark.parametrize("ended", [{}, {"ended": None}])
def test_an_answer_that_may_have_been_cut_off_has_no_end(tmp_path, ended):
    said = {"prompt": "w1 w2", "answer": "w3 w4"}
    prompts = prompts_of(tmp_path, {**said, "ended": True}, {**said, **ended})
    with pytest.warns(UserWarning, match="1 of 2 answers may have been cut off.* write `ended`"):
        whole, other = answered(WORDS, prompts, model=MODEL)
    assert whole == Answer((1, 2), (3, 4, END), True)
    assert other == Answer((1, 2), (3, 4), False)
    cut_off = prompts_of(tmp_path, {**said, "ended": True}, {**said, "ended": False})
    assert prompts_fingerprint(prompts) == prompts_fingerprint(cut_off)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, r"line 2 has no answer: write the field `answer`, or leave it out of all lines"),
        (
            {"answer": "w4", "model": "other/SmolLM2-360M"},
            r"line 2 is an answer of other/SmolLM2-360M, and the uncut model is SmolLM2-135M "
            r"\(abababababab\): give .* `model` if it is the same$",
        ),
    ],
)
def test_no_answer_and_those_of_other_models_are_refused(tmp_path, second, message):
    prompts = prompts_of(tmp_path, {"prompt": "w1", "answer": "w2"}, {"prompt": "w3", **second})
    with pytest.raises(sh.TextsError, match=message):
        answered(WORDS, prompts, model=MODEL)


# For a patch
def is_answer(text):
    """Whether it is an answer of :data:`NUMBERED`, by its first token."""
    return text.ids[0] == PAD


NUMBERED = [Answer((PAD, 1), (i, 3, END), True) for i in range(60)]


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125, 0.75])
def test_texts_and_answers_are_mixed_where_a_patch_fits_and_where_it_holds_out(share):
    endless = (TEXTS[i % len(TEXTS)] for i in count())
    answers = (NUMBERED[i % 60] for i in count())
    found = list(islice(mixed(WORDS, endless, answers, share=share, max_length=16), 640))
    kinds = np.array([is_answer(text) for text in found]).reshape(80, 8)
    held_out, rest = kinds[:, 7], kinds[:, :7].ravel()
    assert held_out.tolist() == answers_turns(80, share).tolist()
    assert rest.tolist() == answers_turns(560, share).tolist()


def test_nothing_is_mixed_in_twice_and_nothing_is_left():
    for texts, answers in ((TEXTS[:40], NUMBERED[:9]), (TEXTS[:9], NUMBERED[:40])):
        found = list(mixed(WORDS, texts, answers, share=0.5, max_length=4))
        of_texts = [text for text in found if not is_answer(text)]
        assert [text.text for text in of_texts] == texts
        for text, expected in zip(of_texts, tokenise(WORDS, texts, 4), strict=True):
            assert np.array_equal(text.ids, expected.ids)
        of_answers = [text.ids.tolist() for text in found if is_answer(text)]
        assert of_answers == [[*one.given, *one.written][:4] for one in answers]
        assert {text.max_length for text in found} == {4}


def test_what_is_mixed_is_what_a_patch_divides():
    """Beside plain texts, too."""
    plain = list(TEXTS[:24])
    found = list(mixed(WORDS, TEXTS[24:60], NUMBERED, share=0.5, max_length=16))
    options = {"tokens": Tokens(16, 4), "num_tokens": 10**6}
    fitted, held_out = divide(WORDS, [*plain, *found], **options)
    assert sum(map(len, fitted)) + sum(map(len, held_out)) == 24 + 36 + 60
    answers = [ids[0] == PAD for batch in held_out for ids in batch.input_ids]
    assert 0 < sum(answers) < len(answers)

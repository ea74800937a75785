"""Patches that are fitted on what the whole model says, beside texts."""

import copy
import json
from fractions import Fraction
from functools import partial
from math import floor

import pytest
import torch

import shallower as sh
from shallower.models.decoder import Decoder
from shallower.patching import descent
from shallower.results.patch import Patch
from shallower.results.speech import Answer
from shallower.texts.sequences import collate, read_samples
from shallower.values.files import PATCH_FILE
from tests.conftest import mostly_slow, write_jsonl
from tests.cutting.card_tools import assert_same_weights
from tests.documents import assert_same, state_of
from tests.examples import sentences
from tests.written import MANY, write_answered, write_prompts
from tests.written import written as written

TEXTS = sentences(32, seed=1)
BLOCK = [range(2, 4)]


pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def learned(learned_six):
    return learned_six


@pytest.fixture
def model(learned):
    return copy.deepcopy(learned)


@pytest.fixture(scope="module")
def said(learned, words):
    """What the model says; not the token of its config that ends a text, which is none of words."""
    found = sh.answer_prompts(learned, words, MANY, num_tokens=12)
    return [one for one in found if one.written[-1] != 2]


def mixed_slowly(texts, answers, share):
    """Texts and answers in turns, those that are held out by turns of their own."""
    kinds, taken, found = [[*texts], [*answers]], [0, 0], []
    while any(kinds):
        held = len(found) % 8 == 7
        k, share = taken[held], Fraction(share)
        kind = floor((k + 1) * share) > floor(k * share)
        found.append(kinds[kind if kinds[kind] else not kind].pop(0))
        taken[held] += 1
    return found


# In Python
@pytest.mark.parametrize("share", mostly_slow([0.25, 1], [0.25]))
def test_it_is_fitted_on_texts_and_answers_in_turns(model, learned, words, said, share):
    """Answers to one token are learned as texts are."""
    said = [Answer(one.ids[:1], one.ids[1:], one.ended) for one in said]
    done = sh.patch(model, words, BLOCK, texts=TEXTS, answers=said, share=share, max_length=16)
    plain = [words.decode([*one.given, *one.written]) for one in said]
    twin = copy.deepcopy(learned)
    expected = sh.patch(
        twin, words, BLOCK, texts=mixed_slowly(TEXTS, plain, share), max_length=16
    )  # fmt: skip
    assert (done.share, expected.share) == (share, None)
    assert (done.num_tokens, done.num_held_out) == (expected.num_tokens, expected.num_held_out)
    assert done.patched == expected.patched < done.cut
    for name, weight in twin.state_dict().items():
        assert (model.state_dict()[name] == weight).all(), name


def test_of_an_answer_what_was_written_is_learned_as_a_healing_learns_it(
    model, learned, words, said, monkeypatch
):
    """The oracle are the labels of a healing, and the model's own loss of them."""
    took, make = [], descent.target_gradients

    def counted(head, cut, whole, *, labels, share):
        took.append((len(cut), int((labels >= 0).sum())))
        return make(head, cut, whole, labels=labels, share=share)

    monkeypatch.setattr(descent, "target_gradients", counted)
    options = {"texts": (), "share": 1, "max_length": 12, "batch_size": 64}
    done = sh.patch(model, words, BLOCK, answers=said, **options)
    samples = read_samples(
        words, (), max_length=12, packing=False, num_samples=99, answers=said, share=1.0
    )
    held, rest = samples.rows[7::8], [row for i, row in enumerate(samples.rows) if i % 8 != 7]
    batch = {name: torch.from_numpy(values) for name, values in collate(held)}
    losses = {"original": learned(**batch).loss.detach()}
    with sh.without_layers(learned, BLOCK):
        losses["cut"] = learned(**batch).loss.detach()
    for name, loss in losses.items():
        assert getattr(done, name) == pytest.approx(float(loss), rel=1e-6), name
    counts = [sum(int(row.predicted.sum()) + 1 for row in rows) for rows in (rest, held)]
    assert [done.num_tokens, done.num_held_out] == counts
    assert {*took} == {(counts[0], sum(int(row.predicted.sum()) for row in rest))}
    assert done.patched < done.cut


def test_answers_that_a_healing_would_leave_out_are_left_out(model, words, said):
    long = [*said, Answer((*range(1, 13),), (3, 4), False)]
    with pytest.warns(sh.RejectedSamplesWarning, match=r"answers are left out.* a prompt of 12"):
        done = sh.patch(model, words, BLOCK, texts=(), answers=long, share=1, max_length=12)
    assert done.num_tokens > 0


def test_the_record_and_the_card_tell_of_answers(model, words, said, tmp_path):
    done = sh.patch(model, words, BLOCK, texts=TEXTS, answers=iter(said), share=0.25)
    sh.save_patched(model, words, tmp_path / "patched", done=done)
    card = (tmp_path / "patched" / "README.md").read_text()
    assert f"| tokens fitted | {done.num_tokens:,}, up to 25 % of the texts answers |" in card
    assert "--texts TEXTS --answers ANSWERS --share 0.25" in card.replace(" \\\n    ", " ")
    assert "`ANSWERS` are prompts,\neach with its answer; of those without one " in card
    record = json.loads((tmp_path / "patched" / PATCH_FILE).read_text())
    assert Patch.from_json(record) == done


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": 0, "answers": ()}, sh.RecipeError, r"got 0 \(share, --share\)"),
        ({"answers": ["w1 w2"]}, sh.TextsError, "answer 0 is of type str: expected Answer"),
        (
            {"answers": [Answer((1,), (2,), False), Answer((1,), (100,), False)]}, sh.TextsError,
            "the answers hold token 100, and the model has 100: they are of another model",
        ),
    ],
    ids=["none", "texts", "unknown"],
)  # fmt: skip
def test_what_cannot_be_fitted_on_is_refused(model, words, said, options, error, message):
    before = state_of(model)
    with pytest.raises(error, match=message):
        sh.patch(model, words, BLOCK, texts=TEXTS, **{"answers": said, **options})
    assert_same(before, state_of(model))


# The command
@pytest.fixture
def given(shallower, folder, learned, words):
    """The command on a model in ``folder``, with texts and prompts beside it."""
    learned.save_pretrained(folder / "whole")
    words.save_pretrained(folder / "whole")
    write_jsonl(folder / "texts.jsonl", TEXTS)
    write_prompts(folder / "prompts.jsonl", *MANY)

    def call(
        out, *options, answers=("prompts.jsonl", "--answer-tokens", 12), layers=("--drop", "2:4")
    ):
        words = ["--texts", "texts.jsonl", *layers, "--dtype", "float32"]
        words += [] if answers is None else ["--answers", *answers]
        return shallower("patch", "whole", *words, "--out", out, *options)

    return call


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_whole_model_answers_once(given, folder, learned, words, written):
    done = given("out", "--share", 0.25, "--json")
    assert done.json["share"] == 0.25
    assert written == [32, 8]
    model = copy.deepcopy(learned)
    said = sh.answer_prompts(model, words, MANY, num_tokens=12)
    sh.patch(model, words, BLOCK, texts=TEXTS, answers=said, share=0.25)
    sh.save_model(model, words, folder / "again")
    assert_same_weights("again", "out")
    del written[:]
    assert "out is already there" in given("out", "--share", 0.25).err
    assert "out exists already" in given("out").error
    assert "out exists already" in given("out", "--share", 0.25, answers=None).error
    assert given("half").status == 0
    assert written == []
    assert weights(folder / "half") != weights(folder / "out")


def test_answers_of_a_file_are_not_written_and_may_be_streamed(
    given, folder, learned, said, words, written
):
    whole = Decoder.of(learned).identity.fingerprint
    write_answered(folder / "answers.jsonl", words, said, model=whole)
    assert given("out", answers=("answers.jsonl",)).status == 0
    assert given("streamed", "--stream", answers=("answers.jsonl",)).status == 0
    assert written == []
    assert weights(folder / "streamed") == weights(folder / "out")


def test_a_model_that_chats_answers_by_default(given, folder, words, written):
    asked = partial(given, "out", "--dry-run", answers=None)
    assert "answers" not in asked().out
    words = copy.deepcopy(words)
    words.chat_template = "{% for one in messages %}w1 {{ one.content[:9] }} w2{% endfor %}"
    words.save_pretrained(folder / "whole")
    tokens = sum(len(words(text)["input_ids"]) for text in TEXTS)
    count = int(tokens / 8 / 4)  # answers of four tokens in an eighth of those of the texts
    assert 1 < count < 64
    assert f"answers: to {count} prompts of our own" in asked("--answer-tokens", 4).out
    assert "answers: to 2 prompts" in asked("--answer-tokens", 4, "--num-tokens", 64).out
    assert "answers" not in asked().out, "256 tokens are more than that"
    assert "answers" not in asked("--no-answers", "--answer-tokens", 4).out
    assert "answers" not in asked("--stream", "--answer-tokens", 4).out
    assert given("out", "--answer-tokens", 4, answers=None).status == 0
    assert sum(written) == count
    assert json.loads((folder / "out" / PATCH_FILE).read_text())["share"] == 0.5


@pytest.mark.parametrize(
    ("options", "answers", "message"),
    [
        (("--stream",), ("prompts.jsonl",), "--answers beside --stream: all layers would be read"),
        ((), ("other.jsonl",), "line 1 is an answer of a/other, and the uncut model is "),
        (("--out", "prompts.jsonl", "--overwrite"), ("prompts.jsonl",), "prompts.jsonl"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    given, folder, written, options, answers, message
):
    write_prompts(folder / "other.jsonl", {"prompt": "w1", "answer": "w2", "model": "a/other"})
    before = {*folder.iterdir()}
    assert message in given("out", *options, answers=answers).error
    assert written == []
    assert {*folder.iterdir()} == before

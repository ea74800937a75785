"""The command `heal` on answers that the uncut model writes, or that lie in a file."""

from dataclasses import replace

import pytest
import torch

import shallower as sh
from tests.conftest import tiny_llama, write_jsonl
from tests.healing.cuts import QUICK, TEXTS
from tests.written import MANY, write_prompts
from tests.written import written as written

SETTINGS = "--dtype float32 --max-length 16 --batch-size 8 --rank 4 --learning-rate 0.01 --packing"
SETTINGS = [*SETTINGS.split(), "--no-attention", "--eval-every", "2", "--steps"]


@pytest.fixture
def given(both, folder):
    """Texts, prompts and the uncut model for a healing in ``folder``, as options."""
    write_jsonl(folder / "texts.jsonl", TEXTS)
    write_prompts(folder / "prompts.jsonl", *MANY)
    return {
        "texts": ("--texts", "texts.jsonl"),
        "answers": ("--answers", "prompts.jsonl", "--answer-tokens", 3),
        "original": ("--original", both[0]),
    }


@pytest.fixture
def heal(shallower, cut, given):
    """Heal the cut in so many steps, with what is given and more."""

    def call(out, *options, steps=2, using=("texts", "answers", "original")):
        words = [word for name in using for word in given[name]]
        return shallower("heal", cut, *words, *SETTINGS, steps, "--out", out, *options)

    return call


def refused(done):
    """The sentence of a healing that was refused, behind its settings if they were printed."""
    (said,) = (line for line in done.said if not line.startswith("warning: "))
    assert (done.status, "Traceback" in done.err) == (2, False)
    return said


def adapters(out):
    return (out / "adapter_model.safetensors").read_bytes()


def said_by(whole, prompts=MANY):
    """What the uncut model says, and its tokenizer."""
    model, tokenizer = sh.load_model(whole, dtype="float32")
    return sh.answer_prompts(model, tokenizer, prompts, num_tokens=3), tokenizer


# Who answers
def test_it_is_trained_on_what_the_uncut_model_says(heal, both, cut, folder, written):
    done = heal("out")
    assert done.status == 0, done.err
    assert "steps of 16 sequences of 16 tokens, packed, 50 % of them answers" in done.out
    said, _ = said_by(both[0])
    tokens = sum(len(one.written) for one in said)
    assert f"trained on 40 answers of {tokens} tokens\n" in done.out
    recipe = replace(QUICK, steps=2, dropout=0.0)  # as the preset small
    record = sh.heal(cut, TEXTS, folder / "again", recipe=recipe, answers=said)
    assert sh.Healing.load(folder / "out").answers == record.answers
    assert adapters(folder / "again") == adapters(folder / "out")
    # The same command is known, and another one is not.
    del written[:]
    again = heal("out")
    assert again.status == 0
    assert "out is already there" in again.err
    for options in (("--share", 0.25), ("--answer-tokens", 2)):
        assert "out exists already" in heal("out", *options).error
    write_prompts(folder / "prompts.jsonl", *MANY[:-1])
    assert "out exists already" in heal("out").error
    assert "out exists already" in heal("out", using=("texts", "original")).error
    assert written == []


def test_a_dry_run_tells_of_answers_and_loads_nothing(
    heal, given, folder, monkeypatch, no_rehearsal
):
    monkeypatch.setattr("shallower.models.loading.load_model", lambda *_, **__: 1 / 0)
    done = heal("out", "--dry-run", "--share", 0.25, "--json").json
    assert (done["answers"], done["share"]) == ("to 40 prompts", 0.25)
    assert "answers: to 40 prompts\n" in heal("out", "--dry-run").out
    given["answers"] = ("--answers",)
    done = heal("out", "--dry-run").out
    assert "answers: to 32 prompts of our own, or beginnings of texts\n" in done
    write_prompts(folder / "answers.jsonl", {"prompt": "w1", "answer": "w2", "ended": True})
    given["answers"] = ("--answers", "answers.jsonl")
    alone = heal("out", "--dry-run", "--share", 1, "--json", using=("answers",)).json
    assert (alone["answers"], alone["share"]) == ("1 of a file", 1.0)
    plain = heal("out", "--dry-run", "--json", using=("texts",)).json
    assert not {"answers", "share"} & {*plain}
    assert {path.suffix for path in folder.iterdir()} == {".jsonl"}


# Refusals


@pytest.mark.parametrize(
    ("using", "options", "message"),
    [
        ("answers original", (), r"name texts to train on (--texts), or answers alone (--answers "),
        ("answers", ("--share", 1), "are written by the uncut model: name it (--original), or giv"),
        (
            "answers original", ("--share", 1, "--from-patch"),
            "name texts to patch on (--texts), or leave out --from-patch",
        ),
        ("texts", ("--answers", "other.jsonl"), "is an answer of a/other, and the uncut model is"),
        ("texts", ("--answers", "short.jsonl", "--original", "twin"), "was made for whole ("),
        ("answers", ("--share", 1, "--original", "."), "it lies in ., which is read: choose ano"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    heal, folder, words, using, options, message, written
):
    if "twin" in options:
        twin = tiny_llama(6)
        torch.nn.init.uniform_(twin.model.norm.weight)
        sh.save_model(twin, words, folder / "twin")
    write_prompts(folder / "other.jsonl", {"prompt": "w1", "answer": "w2", "model": "a/other"})
    write_prompts(folder / "short.jsonl", "w3")
    before = {*folder.iterdir()}
    done = heal("out", *options, using=using.split())
    assert message in refused(done)
    assert written == []
    assert {*folder.iterdir()} == before


def test_several_processes_write_no_answers(heal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--answers are written by one process: give a file that has the" in heal("out").error

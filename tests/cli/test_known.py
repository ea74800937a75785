"""What one command measured, every other finds: no layer is run a second time for it."""

import json

import pytest

from shallower.evaluation import loss as losses
from tests.conftest import write_jsonl
from tests.healing.cuts import documents as learnable

pytestmark = pytest.mark.filterwarnings("default")

TEXTS, TESTED = ("--texts", "texts.jsonl"), ("--texts", "tested.jsonl")
FEW = ("--max-length", 16)
PATCH = ("patch", "model", *TEXTS, "--drop", "2:3", "--eval-texts", "tested.jsonl", *FEW)
PATCH = (*PATCH, "--no-answers", "--out", "out")
PRUNE = ("prune", "model", "--drop", "2:3", "--out", "cut")
HEAL = ("heal", "cut", *TEXTS, "--eval-texts", "tested.jsonl", "--original", "model", *FEW)
HEAL = (*HEAL, "--steps", 6, "--rank", 4, "--learning-rate", 0.01, "--dtype", "float32")
HEAL = (*HEAL, "--batch-size", 8, "--out", "out")
EVAL = ("eval", "model", *TESTED, *FEW, "--dtype", "float32")

SPOKEN = ("--n", 1, "--criteria", "deepest", "--dtype", "float32", "--eval-texts", "tested.jsonl")
COMPARE = ("compare", "model", *TEXTS, *FEW, *SPOKEN, "--out", "compared")
SPEECH = (*EVAL[:2], "--dtype", "float32", *FEW, "--speech", "prompts.jsonl", "--drop", "2:3")

PAIRS = {
    "compare, then eval": ([COMPARE], [(*EVAL, "--drop", "2:3")]),
    "compare with speech, then eval": (
        [(*COMPARE, "--speech", "--prompts", "prompts.jsonl")],
        [SPEECH],
    ),
    "patch, then its checkpoint": ([PATCH], [("eval", "out", *TESTED, *FEW)]),
    "patch, then its model and cut": ([PATCH], [("eval", "model", *TESTED, *FEW, "--drop", "2:3")]),
    "heal, then its checkpoint": ([PRUNE, (*HEAL, "--merge")], [("eval", "out", *EVAL[2:])]),
    "heal, then its uncut model": ([PRUNE, HEAL], [EVAL]),
}


@pytest.fixture
def place(folder, trained, words):
    """A model that a patch has something to gain of, and texts."""
    trained.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    write_jsonl(folder / "texts.jsonl", learnable(128, 0))
    write_jsonl(folder / "tested.jsonl", learnable(12, 1))
    prompts = (json.dumps({"prompt": text}) for text in ("w1 w2", "w5 w7 w11"))
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    return folder


@pytest.fixture
def measured(monkeypatch):
    """The texts whose losses are measured by forwards."""
    seen, plain = [], losses.text_losses

    def noted(head, batch, halving):
        seen.extend(batch.samples.tolist())
        return plain(head, batch, halving)

    monkeypatch.setattr(losses, "text_losses", noted)
    return seen


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("first", "then"), PAIRS.values(), ids=PAIRS)
def test_nothing_is_measured_twice(shallower, layers_run, first, then):
    for command in first:
        done = shallower(*command)
        assert done.status == 0, done.err
    assert layers_run
    for command in then:
        layers_run.clear()
        found = shallower(*command, "--json")
        assert found.status == 0, found.err
        assert layers_run == []
        assert found.json == shallower(*command, "--json", "--no-cache").json
        assert layers_run


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("first", "then", "known"),
    [
        ([("eval", "model", *TESTED, *FEW, "--drop", "2:3")], PATCH, 2),
        ([PRUNE, EVAL], HEAL, 1),
    ],
    ids=["eval, then patch", "eval, then heal"],
)
def test_only_what_is_new_is_measured(shallower, measured, first, then, known):
    """A patch finds the loss of the whole model and of the cut, a healing that of the first."""
    for command in first:
        assert shallower(*command).status == 0
    counts = []
    for more in ((), ("--no-cache", "--overwrite")):
        measured.clear()
        done = shallower(*then, *more)
        assert done.status == 0, done.err
        counts.append(len(measured))
    assert counts[1] - counts[0] == 12 * known

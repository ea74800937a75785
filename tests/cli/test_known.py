"""What one command measured, every other finds: no layer is run a second time for it."""

import json

import pytest

from shallower.evaluation import loss as losses
from shallower.judgement.criteria import similarity
from shallower.judgement.proposals import PROPOSING_TEXTS
from shallower.scanning import model as model_scans
from shallower.texts.splits import three_splits
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


# Scans.
STUDY = ("--eval-texts", "tested.jsonl", *FEW, "--max-texts", 128)
RUN = ("run", "model", *TEXTS, *STUDY, "--n", 1, "--plan-only", "--no-speech", "--out", "run")
SCAN, SCAN_MORE = (
    ("scan", "model", "--texts", f"{number}.jsonl", *FEW, "--out", "scan") for number in (86, 112)
)
TABLE = ("model", *TEXTS, *STUDY, "--judge", "none", "--n", 1, "--out", "table")
COMPARE, CURVE = ("compare", *TABLE), ("curve", *TABLE)


@pytest.fixture
def fitted(place):
    """Files of the calibration texts of studies, by their number."""
    for num_choosing in (16, 96):
        splits = three_splits(learnable(128, 0), learnable(12, 1), num_choosing=num_choosing)
        write_jsonl(place / f"{len(splits.fit)}.jsonl", splits.fit)


@pytest.fixture
def scanned(monkeypatch):
    """The texts whose states are compared by forwards, but those of proposals."""
    seen = []
    for module in (model_scans, similarity):

        def noted(decoder, windows, *args, plain=module.states_of, **options):
            windows = [*windows]
            found = [batch.samples for window in windows for batch in window]
            if sum(map(len, found)) > PROPOSING_TEXTS:
                seen.extend(sample for batch in found for sample in batch.tolist())
            return plain(decoder, windows, *args, **options)

        monkeypatch.setattr(module, "states_of", noted)
    return seen


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize(
    ("first", "then", "count"),
    [
        (SCAN, RUN, 86),
        (SCAN_MORE, COMPARE, 112),
        (CURVE, SCAN, 86),
        (RUN, SCAN, 86),
        (RUN, CURVE, 86),
    ],
    ids=["scan, run", "scan, compare", "curve, scan", "run, scan", "run, curve"],
)
def test_texts_are_scanned_once(shallower, place, scanned, layers_run, first, then, count):
    done = shallower(*first)
    assert done.status == 0, done.err
    assert len(scanned) == count
    layers_run.clear()
    done = shallower(*then)
    assert done.status == 0, done.err
    assert len(scanned) == count
    assert layers_run == [] or then == RUN
    if then == SCAN:
        assert "cached, measured on" in done.err
    (file,) = (place / then[-1]).rglob("*.safetensors")
    content = file.read_bytes()
    assert shallower(*then, "--no-cache", "--overwrite").status == 0
    assert len(scanned) == 2 * count
    assert file.read_bytes() == content

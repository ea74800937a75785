"""The bars of long work: one total for all of a stage, in units that move."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest

import shallower as sh
from shallower import progress
from shallower.healing.training import Throughput
from tests.conftest import mostly_slow
from tests.healing.cuts import HELD_OUT, QUICK, documents, save_cut

PROMPTS = ["w1 w2", "w7 w8 w9"]
TAKEN = {
    "eval_texts": documents(8, 1), "max_length": 16, "cache": False, "prompts": PROMPTS,
}  # fmt: skip
TEXTS = documents(64, 5)
WITHOUT_TOTAL = ("load", "tokenise", "save", "reload")


class Recorded(progress._Lines):
    """The lines of a log about a work, with all that moved it."""

    every = ()

    def __init__(self, description, total):
        super().__init__(description, total)
        self.total, self.reached_by, self.notes = total, [0.0], []
        Recorded.every.append(self)

    def __call__(self, steps, note="", /):
        super().__call__(steps, note)
        self.reached_by.append(self._done)
        self.notes.append(note)


@pytest.fixture
def bars(monkeypatch):
    """All bars that are opened, in order."""
    Recorded.every = []
    monkeypatch.setattr(progress, "_Lines", Recorded)
    return Recorded.every


def assert_moving(bars, names):
    """Every bar has its total from the start, never goes back, and ends there."""
    for bar in bars:
        assert bar.total or bar.description.startswith(WITHOUT_TOTAL), bar.description
        assert all(before <= after + 1e-6 for before, after in pairwise(bar.reached_by))
        if bar.total:
            assert bar.reached_by[-1] == pytest.approx(bar.total, abs=1), bar.description
    found = [bar.description for bar in bars if not bar.description.startswith(WITHOUT_TOTAL)]
    assert found == names


def largest_step(bar):
    """The largest share of a bar at once."""
    return max(after - before for before, after in pairwise(bar.reached_by)) / bar.total


def test_a_curve_has_one_bar_for_all_of_its_points(bars, learned, words, tmp_path):
    sh.curve(
        learned, words, TEXTS, **TAKEN, out=tmp_path / "curve", n=[1, 2, 0], patch_tokens=512,
        top=1, strategies=["recommended", "one_shot"],
    )  # fmt: skip
    assert_moving(
        bars, ["generate, whole model", "read words, whole model", "read by the whole model",
               "loss, whole", "curve, layers run"]
    )  # fmt: skip
    curve = bars[-1]
    assert largest_step(curve) < 0.2
    for begun in ("verify n = 2", "scan", "loss without", "patch, layers run, all", "generate, "):
        assert any(note.startswith(begun) for note in curve.notes), begun


def test_the_bar_of_a_curve_moves_while_a_cut_is_healed(bars, learned, words, tmp_path):
    """The patch before a healing takes its own part of the bar, not that of the healing."""
    sh.curve(
        learned, words, TEXTS, **TAKEN | {"prompts": []}, out=tmp_path / "curve", n=[1],
        strategies=["deepest"], states=["healed"], heal=QUICK,
    )  # fmt: skip
    curve = bars[-1]
    assert_moving(bars[-1:], ["curve, layers run"])
    begun = next(i for i, note in enumerate(curve.notes) if note.startswith("heal, layers run"))
    assert curve.reached_by[begun] < 0.8 * curve.total
    assert len({round(reached) for reached in curve.reached_by[begun:]}) > 6


def test_a_comparison_counts_what_its_cuts_generate(bars, learned, words, tmp_path):
    sh.compare(
        learned, words, TEXTS, **TAKEN, out=tmp_path / "compare", n=[2],
        criteria=["one_shot", "exhaustive"], speech=True,
    )  # fmt: skip
    compared = next(bar for bar in bars if bar.description.startswith("compare on"))
    assert_moving(bars, [bar.description for bar in bars])
    assert any(note.startswith("generate, cut") for note in compared.notes)
    assert largest_step(compared) < 0.3


def test_a_run_has_no_bar_within_another(bars, learned, words, tmp_path):
    sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "run", n=1, top=1)
    names = [bar.description for bar in bars]
    assert_moving(bars, [name for name in names if not name.startswith(WITHOUT_TOTAL)])
    assert "patch, layers run" in names
    assert "generate, patched" in names
    table = bars[names.index("what other sizes cost, layers run")]
    assert table is bars[-1]
    assert largest_step(table) < 0.35


def test_steps_of_a_patch_weigh_what_they_take(bars, learned, words):
    sh.patch(learned, words, [2], texts=TEXTS, max_length=16, num_tokens=512, batch_size=8)
    assert_moving(bars, ["patch, layers run"])
    # Both walks, the solving and the steps are a part each, whatever their number.
    assert largest_step(bars[0]) < 0.4
    assert len(bars[0].reached_by) > 20


@pytest.fixture
def cut(tmp_path, learned, words):
    """The folders of a model that has learned a little, and of the same without a layer."""
    return save_cut(tmp_path, learned, words, [2])


@pytest.mark.parametrize("every", mostly_slow([2, 4], [2]))
def test_a_healing_has_one_bar_for_its_steps_and_losses(bars, cut, tmp_path, every):
    whole, path = cut
    sh.heal(
        path, TEXTS, tmp_path / "healed", recipe=replace(QUICK, eval_every=every),
        eval_texts=HELD_OUT, original=whole,
    )  # fmt: skip
    assert_moving(bars, ["loss, uncut", "heal, layers run"])
    healing = bars[-1]
    assert largest_step(healing) < 0.2
    told = [note.split(", ")[0] for note in healing.notes if note]
    told = [one for one, _ in groupby(told)]  # what is trained is not told as what is measured
    assert told[:4] == ["training", "loss", "training", "step 1"]
    assert told[-3:] == ["step 6", "loss", "step 6"]


def test_a_healing_that_is_resumed_counts_what_was_done(bars, cut, learned, tmp_path, monkeypatch):
    """Its bar begins before the last loss, and counts no loss twice."""

    def heal():
        sh.heal(cut[1], TEXTS, tmp_path / "healed", recipe=QUICK, eval_texts=HELD_OUT)

    with monkeypatch.context() as patched:
        patched.setattr(Throughput, "on_step_begin", interrupted(Throughput.on_step_begin, 5))
        with pytest.raises(KeyboardInterrupt):
            heal()
    stopped = bars[-1].reached_by[-1]
    bars.clear()
    heal()
    assert_moving(bars, ["heal, layers run"])
    one_loss = len(HELD_OUT) * (len(learned.model.layers) - 1)
    assert next(filter(None, bars[-1].reached_by)) == stopped - one_loss


def interrupted(call, at):
    """A callback of the Trainer that is interrupted before a step."""

    def called(self, args, state, control, **kwargs):
        if state.global_step == at - 1:
            raise KeyboardInterrupt
        return call(self, args, state, control, **kwargs)

    return called

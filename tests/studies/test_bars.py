"""The bars of long work: one of the whole, and beside it one of each stage that moves."""

from dataclasses import replace
from itertools import pairwise

import pytest

import shallower as sh
from shallower import progress
from shallower.healing.training import Throughput
from tests.healing.cuts import HELD_OUT, QUICK, documents, save_cut

PROMPTS = ["w1 w2", "w7 w8 w9"]
TAKEN = {
    "eval_texts": documents(8, 1), "max_length": 16, "cache": False, "prompts": PROMPTS,
}  # fmt: skip
TEXTS = documents(64, 5)
WITHOUT_TOTAL = ("load", "tokenise", "save", "reload", "one_shot", "exhaustive")


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


def of_whole(bars, name):
    """The bar of the whole, whose stages are counted one by one."""
    (found,) = [bar for bar in bars if bar.description == name]
    moved = {after - before for before, after in pairwise(found.reached_by)} - {0}
    assert moved == {1} or moved == {1, found.total - found.reached_by[-2]}
    return found


def test_a_curve_has_a_bar_for_all_of_its_points(bars, learned, words, tmp_path):
    sh.curve(
        learned, words, TEXTS, **TAKEN, out=tmp_path / "curve", n=[1, 2, 0], patch_tokens=512,
        top=1, criteria=["recommended", "one_shot"], speech=True,
    )  # fmt: skip
    curve = of_whole(bars, "curve")
    assert curve.total == curve.reached_by[-1] == 2 + 2 * (1 + 2 * 2)
    for begun in ("choose by recommended", "one_shot, n = 1, patched", "load"):
        assert any(note.startswith(begun) for note in curve.notes), begun
    steps = [bar for bar in bars if bar is not curve]
    assert_moving(steps, [bar.description for bar in steps if not ends(bar, WITHOUT_TOTAL)])
    for begun in ("verify n = 2", "scan", "loss without", "patch, layers run", "generate, "):
        assert any(bar.description.startswith(begun) for bar in steps), begun


def ends(bar, names):
    """Whether a bar is of one of the kinds that have no total."""
    return bar.description.startswith(names)


def test_a_run_has_a_bar_of_its_stages_and_says_what_they_took(
    bars, learned, words, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(progress, "SECONDS_TO_BE_SHOWN", 0.0)
    sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "run", n=1, top=1)
    run = of_whole(bars, "run")
    assert run.total == run.reached_by[-1] == 8 + 1 + 3
    names = [bar.description for bar in bars]
    assert {"patch, layers run", "generate, patched", "verify n = 1, layers run"} <= {*names}
    said = capfd.readouterr().err
    for kind in ("race cuts", "patch", "speech of the cut", "save and compare"):
        assert f"% {kind}\n" in said


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


def test_a_healing_moves_within_a_step(bars, cut, tmp_path):
    whole, path = cut
    sh.heal(
        path, TEXTS, tmp_path / "healed", recipe=replace(QUICK, batch_size=4),
        eval_texts=HELD_OUT, original=whole,
    )  # fmt: skip
    losses = ["loss, held out"] * 4  # before the first step, and after every second
    assert_moving(bars, ["loss, uncut", "heal", *losses])
    healing = next(bar for bar in bars if bar.description == "heal")
    assert healing.total == QUICK.steps
    # Four forwards a step, each of several layers that run forward and backward.
    assert largest_step(healing) <= 1 / 4 / healing.total
    assert len({*healing.reached_by}) > 4 * 4 * healing.total
    told = [note.split(", ")[0] for note in healing.notes if note]
    assert told == [f"step {step}" for step in range(1, QUICK.steps + 1)]


def test_a_healing_that_is_resumed_counts_what_was_done(bars, cut, tmp_path, monkeypatch):
    def heal():
        sh.heal(cut[1], TEXTS, tmp_path / "healed", recipe=QUICK, eval_texts=HELD_OUT)

    with monkeypatch.context() as patched:
        patched.setattr(Throughput, "on_step_begin", interrupted(Throughput.on_step_begin, 5))
        with pytest.raises(KeyboardInterrupt):
            heal()
    bars.clear()
    heal()
    healing = next(bar for bar in bars if bar.description == "heal")
    assert next(filter(None, healing.reached_by)) == 4
    assert healing.reached_by[-1] == pytest.approx(healing.total)


def interrupted(call, at):
    """A callback of the Trainer that is interrupted before a step."""

    def called(self, args, state, control, **kwargs):
        if state.global_step == at - 1:
            raise KeyboardInterrupt
        return call(self, args, state, control, **kwargs)

    return called

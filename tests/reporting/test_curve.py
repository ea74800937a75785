"""The tables and the CSV of a curve."""

import csv
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from shallower import OutputError
from shallower.judgement.choosing_size import knee
from shallower.reporting.stories.curve import curve_story
from shallower.reporting.writers.csv import write_curve
from shallower.values.curve import Curve, CurvePoint
from shallower.values.loss import Loss
from shallower.values.scores import Difference, Scores
from shallower.values.task_scores import TaskScores

COUNTS = np.array([40.0, 30, 50, 20])
NOISE = np.array([0.3, -0.2, 0.1, 0.4])


def loss(nats, wobble=0.0):
    by_text = Scores(COUNTS * (nats + NOISE + wobble * NOISE[::-1]), COUNTS)
    return Loss(by_text.mean, by_text.stderr, 140, 4, 0, 50_000, by_text)


def scores(right, chance=0.5):
    values = np.arange(40) < right
    items = tuple(map(str, range(40)))
    return TaskScores("boolq", "acc", items, Scores(values * 1.0, np.ones(40)), 2, chance)


def point(n, strategy, dropped, state, found, right=0):
    tasks = (scores(right),) if right else ()
    why = None if found else "there is no layer before the block"
    return CurvePoint(n, strategy, state, dropped, n / 30, n / 40, found, tasks, 1.0, why)


@pytest.fixture(scope="module")
def curve():
    whole = point(0, "whole", (), "cut", loss(3), 36)
    alone = tuple(range(0, 30, 4))
    splits = {"fit": 80, "choose": 16, "report": 4}
    patch = {"patch": "full", "patch_tokens": 16_384}
    return Curve("a/model", 30, (
        whole,
        point(1, "recommended", (9,), "cut", loss(3.0, 0.1), 35),
        point(1, "block_influence", (9,), "cut", loss(3.0, 0.1), 35),
        point(1, "deepest", (28,), "cut", loss(3.1), 30),
        point(8, "recommended", alone, "cut", loss(3.5), 24),
        point(8, "recommended", alone, "patched", loss(3.3), 30),
        point(8, "block_influence", (1, *range(9, 16)), "cut", loss(3.51, 0.2), 24),
        point(8, "deepest", tuple(range(21, 29)), "cut", loss(21.4, 2), 20),
        point(8, "deepest", tuple(range(21, 29)), "patched", None),
    ), splits, "float32", 256, {}, patch)  # fmt: skip


@pytest.fixture
def shown(printed):
    """A curve as the terminal shows it."""

    def show(curve, width=80):
        return printed(curve_story(curve, drawn=False), width=width)

    return show


def rows(text, title):
    """The cells of the table below a title, by size and strategy."""
    found = {}
    for line in text.split(title)[1].splitlines():
        if line.startswith(("Of ln V", "40 items")):
            break
        cells = re.split(r" {2,}", line.strip())
        if cells[0].isdigit():
            found[int(cells[0]), cells[1]] = cells[2:]
    return found


def test_everything_fits_80_columns(curve, shown):
    text = shown(curve)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = " ".join(text.split())
    for part in ("a/model", "30 layers", "of 4 texts; V = 50,000", "16,384 tokens"):
        assert part in words


def test_losses_have_errors_and_paired_differences(curve, shown):
    found = rows(shown(curve, 120), "Layers less, as cut")
    assert len(found) == 6
    for one in curve.points[1:]:
        if one.state == "cut":
            drop, nats, share, more, *_ = found[one.n, one.strategy]
            assert nats == f"{one.loss.nats:.3f} ± {one.loss.stderr:.3f}"
            assert share == f"{one.loss.nats / math.log(50_000):.2f}"
            lost = one.loss.by_text.sums - curve.whole.loss.by_text.sums
            mean = lost.sum() / COUNTS.sum()
            error = math.sqrt(((lost - mean * COUNTS) ** 2).sum() * 4 / 3) / COUNTS.sum()
            assert more == f"{mean:+.3f} ± {error:.3f}"
            assert drop.startswith("[")


def test_what_is_not_lost_has_no_bar_and_no_minus(curve):
    """Of negative differences one had a full bar: it is negative as a share of a negative most."""
    whole, *_ = curve.points
    better = [point(8, "deepest", (9,), state, loss(nats))
              for state, nats in (("cut", 2.99), ("patched", 2.9))]  # fmt: skip
    story = curve_story(replace(curve, points=(whole, *better)), drawn=False)
    assert [step.share for step in story.steps] == [0, 0, 0]
    assert "the loss is 0.100 ± 0.000 nats a token less than whole" in story.sentence
    worse = replace(better[0], loss=loss(3.2)), replace(better[1], loss=loss(3.1))
    story = curve_story(replace(curve, points=(whole, *worse)), drawn=False)
    assert [step.share for step in story.steps] == pytest.approx([0, 1, 0.5])


def test_ties_are_named(curve, shown):
    text = shown(curve, 300)
    found = rows(text, "Layers less, as cut")
    assert {key: cells[4:] for key, cells in found.items()} == {
        (1, "recommended"): ["best"],
        (1, "block_influence"): ["best"],  # the same layers
        (1, "deepest"): [],
        (8, "recommended"): ["best"],
        (8, "block_influence"): ["tie"],
        (8, "deepest"): [],
    }
    assert "Ties with the whole model: recommended 1, block_influence 1." in text


def test_tasks_are_shown_beside_chance_and_the_whole(curve, shown):
    text = shown(curve, 120)
    assert "boolq, as cut: acc in %, whole model 90.0 ± 4.8" in text
    assert "40 items with 2 solved examples; chance 50.0" in text
    found = rows(text, "boolq, as cut")
    assert found[1, "recommended"][1:] == ["87.5 ± 5.3", "-2.5 ± 2.5", "tie"]
    assert found[8, "recommended"][1:] == ["60.0 ± 7.8", "-30.0 ± 7.3", "at chance"]
    assert found[1, "deepest"][1:] == ["75.0 ± 6.9", "-15.0 ± 5.7"]


@pytest.mark.parametrize(
    ("settings", "long", "short"),
    [
        ({"patch": "quick", "patch_tokens": None}, "quick patch (one matrix a block)",
         "quick patch"),
        ({"patch": "full", "patch_tokens": 16_384}, "full patch on at most 16,384 tokens",
         "full patch"),
    ],
)  # fmt: skip
def test_the_patch_is_named_wherever_its_losses_are(curve, shown, settings, long, short):
    story = curve_story(replace(curve, settings=settings))
    assert f"chosen by recommended, after a {long}, the loss is" in story.sentence
    assert f"8 layers, after a {long}: its perplexity" in story.cost
    assert [step.name for step in story.steps] == ["whole", "cut", short]
    (losses,) = [table for one in story.sections for table in one.tables
                 if table.title == f"Layers less, after a {long}: nats a token"]  # fmt: skip
    assert len(losses.rows) == 2
    for drawing in story.drawings:
        assert f"solid after a {long}" in drawing.text
        legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
        assert f"recommended, {short}" in legend
    text = " ".join(shown(replace(curve, settings=settings)).split())
    assert f"What is patched has a {long}." in text
    assert "What is recommended was chosen by losses after a quick patch." in text


@pytest.mark.parametrize("worse", [3.1, 3.9])
def test_the_headline_is_of_the_knee(curve, worse):
    """As `run` finds it, on the line through the best cuts."""
    lost = {2: 0.05, 4: worse - 3, 8: 1.0}
    best = [point(n, "recommended", tuple(range(n)), "cut", loss(3 + lost[n])) for n in lost]
    more = [point(n, "deepest", tuple(range(9, 9 + n)), "cut", loss(6.0)) for n in lost]
    found = knee({n: Difference(value, 0.0, 4) for n, value in lost.items()})
    points = (curve.points[0], *more, *best)
    said = curve_story(replace(curve, points=points), drawn=False).sentence
    assert said.startswith(f"Without layers [0, {found.n})")


def test_a_loss_above_the_axis_is_seen_as_that(curve):
    drawing = curve_story(curve).drawings[0]
    axes = drawing.figure.axes[0]
    whole = curve.whole.loss.normalized
    top = whole + 2 * (loss(3.51, 0.2).normalized - whole)
    assert axes.get_ylim()[1] == pytest.approx(top)
    worst = max(one.loss.normalized for one in curve.points if one.loss)
    assert worst > 1.9
    (label,) = [text for text in axes.texts if text.get_text() == f"{worst:.3f}"]
    assert label.xy == pytest.approx((8 / 30, top))
    legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert legend.count("value above axis") == 1
    assert "A triangle at the upper edge" in drawing.text
    (line,) = [one for one in axes.lines if one.get_label() == "deepest, cut"]
    assert line.get_ydata()[-1] == worst  # leaves by the upper edge, where it goes


def test_what_failed_is_shown_with_the_reason(curve, shown):
    part = shown(curve).split("What could not be measured")[1]
    assert "8 deepest patched there is no layer before the block" in " ".join(part.split())


def test_the_csv_has_a_line_for_every_point(curve, tmp_path):
    write_curve(curve, tmp_path / "curve.csv")
    found = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert len(found) == len(curve.points)
    for row, one in zip(found, curve.points, strict=True):
        assert (int(row["n"]), row["strategy"], row["state"]) == (one.n, one.strategy, one.state)
        assert row["loss"] == (repr(one.loss.nats) if one.loss else "")
        assert row["boolq"] == (repr(one.tasks[0].mean) if one.tasks else "")
        assert row["failed"] == (one.failed or "")
        assert row["dropped"].split() == [str(layer) for layer in one.dropped]
    assert float(found[1]["lost_stderr"]) == curve.lost(curve.points[1]).stderr
    assert float(found[4]["boolq_difference"]) == pytest.approx(-0.3)


def test_a_csv_that_cannot_be_written_is_refused(curve, tmp_path):
    (tmp_path / "file").write_text("dear")
    with pytest.raises(OutputError, match="cannot write"):
        write_curve(curve, tmp_path / "file" / "curve.csv")

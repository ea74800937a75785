"""The figures of a comparison: the front by its definition, and pictures that can be read."""

import math
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from shallower import MissingExtraError, OutputError
from shallower.reporting.charts.comparison import (
    cost_charts,
    draw_comparison,
    group_charts,
    groups_of,
    loss_charts,
    styles_of,
)
from shallower.reporting.charts.plots import pareto_front
from shallower.values.comparison import CriteriaComparison
from shallower.values.scores import UNKNOWN
from tests.reporting.comparisons import COSTS, compared, comparison, rows_of

FILES = [
    f"{name}.{kind}"
    for name in ("loss_over_dropped", "loss_over_dropped_patched", "regret_over_cost")
    for kind in ("svg", "png")
]


def draw(found, folder):
    """The pictures' paths by name; a warning of matplotlib fails the test."""
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {path.name: path for path in draw_comparison(found, folder)}


@pytest.fixture(scope="module")
def small():
    """One model, six criteria, two sizes."""
    model = compared()
    criteria = ("angular", "cosine", "one_shot", "greedy", "weights", "random")
    return CriteriaComparison((model,), tuple(rows_of(model, criteria=criteria, sizes=(1, 8))))


@pytest.fixture(scope="module")
def drawn(small, tmp_path_factory):
    """Its pictures' paths by name."""
    return draw(small, tmp_path_factory.mktemp("drawn") / "small")


def charts(found):
    """The figures of the first model: losses as cut and patched, and regret over cost."""
    group = groups_of(found)[0]
    return [*loss_charts(group, 0), *cost_charts(group, 0)]


def with_loss(row, loss):
    """A row with another loss of the bare cut."""
    return replace(row, cut=replace(row.cut, loss=replace(row.cut.loss, mean=loss)))


def with_regret(row, regret):
    """A row with another regret of the bare cut."""
    return replace(row, cut=replace(row.cut, regret=replace(row.cut.regret, mean=regret)))


def axes_of(drawing):
    return drawing.figure.axes[0]


# The front
POINTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.integers(0, 6), st.integers(0, 6)),
    min_size=1,
)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    assert front
    for name, (cost, regret) in points.items():
        beaten = [
            other
            for other, (c, r) in points.items()
            if c <= cost and r <= regret and (c < cost or r < regret)
        ]
        assert (name in front) == (not beaten)
    costs = [points[name][0] for name in front]
    regrets = [points[name][1] for name in front]
    assert costs == sorted(costs)
    assert regrets == sorted(regrets, reverse=True)


# The pictures
def test_all_figures_are_drawn_as_svg_and_png(drawn):
    assert list(drawn) == FILES
    folder = drawn[FILES[0]].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES[1::2]:
        pixels = imread(drawn[name])
        assert pixels.shape[1] == (1011 if matplotlib.__version_info__ < (3, 11) else 1012)
        assert (pixels[0, :, :3] > 0.99).all()
        colours = (pixels[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
        for colour in (0x0B66B3, 0xB0377A, 0x7D4FA6, 0xB8500F):
            near = np.abs((colours >> 16) - (colour >> 16)) < 20
            near &= np.abs((colours & 255) - (colour & 255)) < 20
            assert near.sum() > 50


def test_the_same_comparison_gives_the_same_bytes(small, drawn, tmp_path):
    """And leaves the settings of matplotlib as they were."""
    before = dict(matplotlib.rcParams)
    again = draw(small, tmp_path)
    assert dict(matplotlib.rcParams) == before
    for name in FILES:
        assert drawn[name].read_bytes() == again[name].read_bytes()


def test_svgs_say_in_words_what_they_show(drawn):
    for name in FILES[::2]:
        text = drawn[name].read_text()
        ET.fromstring(text)
        assert "nats" in text or "regret" in text
        assert "<dc:date>" not in text
    assert "Loss in nats a token over the share of layers" in drawn[FILES[0]].read_text()
    assert "Mean regret of each criterion" in drawn[FILES[4]].read_text()


def test_every_criterion_is_named_once_in_the_legend():
    for drawing in charts(comparison((compared(),))):
        (legend,) = drawing.figure.legends
        names = {text.get_text() for text in legend.get_texts()}
        assert names - {"value above axis"} == set(COSTS)
        assert len(legend.get_texts()) == len(names)


def test_no_two_criteria_look_alike():
    styles = styles_of([*COSTS])
    assert len(set(styles.values())) == len(styles) == 18
    assert len(set(styles_of([*(f"own_{i}" for i in range(10)), "angular"]).values())) == 11


def test_losses_are_drawn_over_the_share_of_layers(small):
    rows = [row for row in small.rows if row.criterion == "greedy"]
    for drawing, state in zip(charts(small), ("cut", "patched"), strict=False):
        losses = [getattr(row, state).loss for row in rows]
        wanted = [[row.layers_share, one.mean] for row, one in zip(rows, losses, strict=True)]
        drawn = [line.get_xydata() for line in axes_of(drawing).lines]
        assert any(np.array_equal(data, wanted) for data in drawn)
        whole = small.models[0].whole.nats
        assert any(set(line.get_ydata()) == {whole} for line in axes_of(drawing).lines)
        stderrs = {one.stderr for one in losses}
        numbers = [row[-1] for row in drawing.numbers if row[0] == "greedy"]
        assert all(any(f"± {stderr:.3f}" in one for stderr in stderrs) for one in numbers)


def test_losses_above_a_guess_are_triangles():
    model = compared()
    guess = math.log(model.whole.vocab_size)
    rows = rows_of(model, criteria=("angular", "random"), sizes=(1, 8))
    rows = [with_loss(row, 40.0 if row.n == 8 else 4.0) for row in rows]
    rows[-1] = with_loss(rows[-1], math.inf)
    axes = axes_of(charts(CriteriaComparison((model,), tuple(rows)))[0])
    assert axes.get_ylim()[1] == guess
    at_the_edge = [
        line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())
    ]
    assert sum(np.isclose(line.get_ydata(), guess).sum() for line in at_the_edge) == 2


def test_a_cut_that_is_better_than_the_whole_model_is_in_sight():
    rows = rows_of(compared(), criteria=("angular",))
    rows[0] = with_loss(rows[0], 2.5)
    axes = axes_of(charts(CriteriaComparison((compared(),), tuple(rows)))[0])
    assert axes.get_ylim()[0] < 2.5


def test_a_criterion_that_was_never_patched_has_no_line():
    rows = tuple(
        replace(row, patched=None) if row.criterion == "random" else row
        for row in rows_of(compared(), criteria=("angular", "random"))
    )
    patched = charts(CriteriaComparison((compared(),), rows))[1]
    assert {row[0] for row in patched.numbers} == {"angular"}


def test_the_front_is_named():
    found = comparison()
    for group in groups_of(found):
        (drawing,) = cost_charts(group, 0)
        named = {name for text in axes_of(drawing).texts for name in text.get_text().split(", ")}
        front = pareto_front(group.means())
        assert named == set(front)
        assert [row[0] for row in drawing.numbers if row[3] == "yes"] == front[::-1]


def test_points_are_means_over_all_sizes(small):
    axes = axes_of(charts(small)[2])
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    for criterion in ("greedy", "weights"):
        rows = [row for row in small.rows if row.criterion == criterion]
        mean = (
            sum(row.layer_forwards for row in rows) / 2,
            sum(row.patched.regret.mean for row in rows) / 2,
        )
        assert mean in drawn
    assert min(x for x, _ in drawn) == 0
    assert axes.get_xlim()[0] < 0


def test_figures_are_ranked_as_the_headline(small):
    """By the regret after the patch; by that of the judge where another one judges."""
    turned = tuple(with_regret(row, 9 - row.patched.regret.mean) for row in small.rows)
    ranked = ("loss", "after a quick patch", ""), ("kl", "as bare cuts", " of divergence")
    for judge, state, of in ranked:
        group = groups_of(replace(small, rows=turned, judge=judge))[0]
        means = {
            name: sum(row.patched.regret.mean for row in group.of(name))
            for name in group.by_regret()
        }
        assert sorted(means, key=means.get, reverse=judge == "kl") == list(means)
        dots, *_, costs = group_charts(group, 0)
        assert dots.title.startswith(f"What each criterion's choice truly loses {state}")
        assert costs.head[2] == f"regret {state}, nats a token{of}"
        for row in small.rows:
            shown = (row.patched if judge == "loss" else row.cut).difference.mean
            (told,) = [cells[-1] for cells in dots.numbers
                       if cells[:2] == (row.criterion, f"n = {row.n}")]  # fmt: skip
            assert told.startswith(f"{shown:.3f} ± ")


def test_a_criterion_without_all_sizes_has_no_mean(small):
    rows = [r for r in small.rows if (r.criterion, r.n) != ("greedy", 8)]
    drawing = charts(replace(small, rows=tuple(rows)))[2]
    assert "greedy" not in {row[0] for row in drawing.numbers}
    nothing = [
        replace(with_regret(row, math.nan), patched=replace(row.patched, regret=UNKNOWN))
        for row in small.rows
    ]
    assert len(charts(replace(small, rows=tuple(nothing)))) == 2


def test_several_calibration_texts_have_figures_of_their_own(tmp_path, monkeypatch):
    """Of which the words alone are written."""
    place = "shallower.reporting.charts.drawing.render"
    monkeypatch.setattr(place, lambda _figure, _kind, *, title, text: f"{title}: {text}".encode())
    model = compared()
    few = {"criteria": ("angular",), "sizes": (1, 4)}
    rows = (*rows_of(model, **few), *rows_of(model, "wikipedia", **few))
    found = draw(CriteriaComparison((model,), rows), tmp_path)
    more = [f"{name.split('.')[0]}_2.{name.split('.')[1]}" for name in FILES]
    assert list(found) == [*FILES, *more]
    assert "chosen on wikipedia" in found["regret_over_cost_2.svg"].read_text()


@pytest.mark.parametrize("sizes", [(1,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_single_criterion_can_be_drawn_and_names_are_no_formulas(tmp_path, sizes):
    """What stands between dollars would be set as mathematics."""
    model = compared("a$\\frac{b$")
    rows = rows_of(model, criteria=("deepest",), sizes=sizes)
    rows = tuple(replace(row, criterion="own$^{$") for row in rows)
    assert list(draw(CriteriaComparison((model,), rows), tmp_path)) == FILES


def test_nothing_compared_is_nothing_drawn(tmp_path):
    assert draw(CriteriaComparison((), (), failures={"a": "why"}), tmp_path) == {}
    assert draw(CriteriaComparison((compared(),), ()), tmp_path) == {}


def test_a_place_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError):
        draw_comparison(small, tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"shallower\[figures\]"):
        draw_comparison(small, tmp_path)


@pytest.mark.parametrize("criteria", [("angular", "block_influence", "greedy"), ("cka", "cosine")])
def test_few_criteria_have_colours_of_their_own(criteria):
    colours = [colour for colour, _ in styles_of(criteria).values()]
    assert len(set(colours)) == len(criteria)

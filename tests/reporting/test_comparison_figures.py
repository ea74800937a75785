"""The figures of a comparison: the front by its definition, and pictures that can be read."""

import math
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from shallower import MissingExtraError, OutputError
from shallower.reporting.comparison_figures import SETTINGS, draw_comparison
from shallower.reporting.criteria_styles import groups_of, styles_of
from shallower.reporting.loss_figure import losses_figure, spread
from shallower.reporting.regret_figure import pareto_front, regrets_figure
from shallower.values.comparison import CriteriaComparison
from tests.reporting.comparisons import COSTS, compared, comparison, rows_of

FILES = [
    "loss_over_dropped.svg", "loss_over_dropped.png", "regret_over_cost.svg",
    "regret_over_cost.png",
]  # fmt: skip


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
def figures():
    """The figures of one comparison before they are rendered."""
    import matplotlib

    def make(found):
        groups, styles = groups_of(found), styles_of(found)
        with matplotlib.rc_context(SETTINGS):
            return [
                losses_figure(groups, styles), regrets_figure(groups, styles, found.unit),
            ]  # fmt: skip

    return make


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


@given(st.lists(st.floats(0, 1), min_size=1, max_size=18).map(sorted))
def test_names_are_spread_and_stay_in_sight(places):
    step = 0.05
    found = spread(places, step)
    assert len(found) == len(places)
    assert all(b - a >= step - 1e-9 for a, b in pairwise(found))
    assert found[0] >= -1e-9
    assert found[-1] <= 1 + 1e-9
    if all(b - a >= step for a, b in pairwise(places)):
        np.testing.assert_allclose(found, places, atol=1e-9)


def test_too_many_names_are_spread_all_the_same():
    found = spread([0.5] * 30, 0.05)
    assert np.diff(found).min() >= 0.05 - 1e-9


# The pictures
def test_both_figures_are_drawn_as_svg_and_png(small, tmp_path):
    found = draw(small, tmp_path)
    assert list(found) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES[1::2]:
        pixels = imread(found[name])
        assert pixels.shape[1] == 1440
        assert (pixels[0, :, :3] == 1).all()  # white
        colours = (pixels[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
        for colour in (0x0072B2, 0xCC79A7, 0xD55E00, 0xE69F00):
            near = np.abs((colours >> 16) - (colour >> 16)) < 20
            near &= np.abs((colours & 255) - (colour & 255)) < 20
            assert near.sum() > 50


def test_the_same_comparison_gives_the_same_bytes(small, tmp_path):
    first, again = draw(small, tmp_path / "a"), draw(small, tmp_path / "b")
    for name in FILES:
        assert first[name].read_bytes() == again[name].read_bytes()


def test_svgs_say_in_words_what_they_show(small, tmp_path):
    found = draw(small, tmp_path)
    for name in FILES[::2]:
        text = found[name].read_text()
        ET.fromstring(text)
        assert "nats" in text or "regret" in text
        assert "<dc:date>" not in text
    assert "Loss in nats a token over the share of layers" in found[FILES[0]].read_text()
    assert "Mean regret of each criterion" in found[FILES[2]].read_text()


def test_every_criterion_is_named_once_in_the_legend(figures):
    for figure in figures(comparison((compared(),))):
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert set(COSTS) <= set(names)
        assert len(names) == len(set(names))


def test_no_two_criteria_look_alike():
    styles = styles_of(comparison())
    assert len(set(styles.values())) == len(styles) == 18
    row = rows_of(compared())[0]
    own = [replace(row, criterion=f"own_{i}") for i in range(10)]
    styles = styles_of(CriteriaComparison((compared(),), (*own, row)))
    assert len(set(styles.values())) == 11


def test_losses_are_drawn_over_layers_and_parameters(small, figures):
    (cut, cut_by_parameters, patched, _) = figures(small)[0].axes
    rows = [row for row in small.rows if row.criterion == "greedy"]
    for axes, share, loss in (
        (cut, "layers_share", "loss"),
        (cut_by_parameters, "parameters_share", "loss"),
        (patched, "layers_share", "patched"),
    ):
        wanted = [[getattr(row, share), getattr(row, loss)] for row in rows]
        drawn = [line.get_xydata() for line in axes.lines]
        assert any(np.array_equal(data, wanted) for data in drawn)
        whole = small.models[0].whole.nats
        assert any(set(line.get_ydata()) == {whole} for line in axes.lines)
    assert len(cut.containers) == 6  # with bars of error


def test_losses_above_a_guess_are_triangles_that_are_counted(figures):
    model = compared()
    guess = math.log(model.whole.vocab_size)
    rows = rows_of(model, criteria=("angular", "random"), sizes=(1, 8))
    rows = [replace(row, loss=40.0 if row.n == 8 else 4.0) for row in rows]
    rows[-1] = replace(rows[-1], loss=math.inf)
    axes = figures(CriteriaComparison((model,), tuple(rows)))[0].axes[0]
    assert "△ 2 losses above 10.8" in axes.get_title("left")
    assert guess < axes.get_ylim()[1] < guess + 1
    assert any("ln V = 10.80" in text.get_text() for text in axes.texts)
    at_the_edge = [
        line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())
    ]
    assert sum(np.isclose(line.get_ydata(), guess).sum() for line in at_the_edge) == 2


def test_a_cut_that_is_better_than_the_whole_model_is_in_sight(figures):
    rows = rows_of(compared(), criteria=("angular",))
    rows[0] = replace(rows[0], loss=2.5)
    axes = figures(CriteriaComparison((compared(),), tuple(rows)))[0].axes[0]
    assert axes.get_ylim()[0] < 2.5


def test_a_criterion_that_was_never_patched_has_no_line(figures):
    rows = tuple(
        replace(row, patched=None, patched_stderr=None) if row.criterion == "random" else row
        for row in rows_of(compared(), criteria=("angular", "random"))
    )
    patched = figures(CriteriaComparison((compared(),), rows))[0].axes[3]
    assert [text.get_text() for text in patched.texts] == ["angular"]


def names_in(axes, figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}


def test_the_front_is_named_and_no_names_overlap(figures):
    found = comparison()
    figure = figures(found)[1]
    for axes, group in zip(figure.axes, groups_of(found), strict=True):
        names = names_in(axes, figure)
        shown = {name for text in names for name in text.split(", ")}
        assert set(pareto_front(group.means())) <= shown
        boxes = list(names.values())
        for i, box in enumerate(boxes):
            assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:i])
        points = axes.transData.transform(list(group.means().values()))
        for box in boxes:
            assert not any(box.contains(*point) for point in points)


def test_points_are_means_over_all_sizes(small, figures):
    axes = figures(small)[1].axes[0]
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    for criterion in ("greedy", "weights"):
        rows = [row for row in small.rows if row.criterion == criterion]
        mean = (
            sum(row.layer_forwards for row in rows) / 2,
            sum(row.regret for row in rows) / 2,
        )
        assert mean in drawn
    assert min(x for x, _ in drawn) == 0
    assert axes.get_xlim()[0] < 0


def test_a_criterion_without_all_sizes_has_no_mean(small, figures):
    rows = [r for r in small.rows if (r.criterion, r.n) != ("greedy", 8)]
    axes = figures(replace(small, rows=tuple(rows)))[1].axes[0]
    assert not any("greedy" in text.get_text() for text in axes.texts)
    nothing = [replace(row, regret=math.nan) for row in small.rows]
    assert not figures(replace(small, rows=tuple(nothing)))[1].axes[0].lines


def test_several_calibration_texts_are_panels_of_their_own(figures):
    model = compared()
    rows = (*rows_of(model, sizes=(1, 4)), *rows_of(model, "wikipedia", sizes=(1, 4)))
    losses, regrets = figures(CriteriaComparison((model,), rows))
    assert len(losses.axes) == 8
    assert [axes.get_title("left").split(":")[0] for axes in regrets.axes] == [
        "SmolLM2-135M, chosen on c4", "SmolLM2-135M, chosen on wikipedia",
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(1,), (1, 2)])
def test_a_single_criterion_can_be_drawn(tmp_path, sizes):
    rows = rows_of(compared(), criteria=("deepest",), sizes=sizes)
    assert list(draw(CriteriaComparison((compared(),), tuple(rows)), tmp_path)) == FILES


def test_nothing_compared_is_nothing_drawn(tmp_path):
    assert draw(CriteriaComparison((), (), failures={"a": "why"}), tmp_path) == {}
    assert draw(CriteriaComparison((compared(),), ()), tmp_path) == {}


def test_names_are_not_formulas(tmp_path):
    """What stands between dollars would be set as mathematics."""
    model = compared("a$\\frac{b$")
    rows = [replace(row, criterion="own$^{$") for row in rows_of(model, criteria=("deepest",))]
    draw(CriteriaComparison((model,), tuple(rows)), tmp_path)


def test_the_settings_of_matplotlib_are_as_before(small, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(small, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_a_place_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError):
        draw_comparison(small, tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"shallower\[figures\]"):
        draw_comparison(small, tmp_path)

"""The figures of a comparison: the front by its definition, and pictures that can be read."""

import math
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from shallower.reporting.charts.comparison import (
    group_charts,
    groups_of,
    styles_of,
)
from shallower.reporting.charts.plots import pareto_front
from shallower.results.comparison import CriteriaComparison
from shallower.results.scores import UNKNOWN
from tests.reporting.comparisons import COSTS, QUICK, compared, comparison, curve, rows_of

NAMES = [
    "criteria_against_loss", "loss_over_layers", "loss_over_layers_patched", "regret_over_cost",
]  # fmt: skip


def charts(found, place=0):
    """The figures of a model by their names; a warning of matplotlib fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {one.name: one for one in group_charts(groups_of(found)[place], place)}


def one_of(rows, model=None, **more):
    return CriteriaComparison((model or compared(),), tuple(rows), settings=QUICK, **more)


@pytest.fixture(scope="module")
def small():
    """One model, six criteria, two sizes."""
    criteria = ("angular", "cosine", "one_shot", "greedy", "weights", "random")
    return one_of(rows_of(compared(), criteria=criteria, sizes=(1, 8)))


@pytest.fixture(scope="module")
def drawn(small):
    """Its figures by name."""
    return charts(small)


@pytest.fixture(scope="module")
def saved(drawn, tmp_path_factory):
    """The folder of its figures as SVG and PNG."""
    return save(drawn, tmp_path_factory.mktemp("saved"))


def save(drawings, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in drawings.values():
            one.save(folder)
    return folder


def changed(row, **means):
    """A row with another mean of its loss, difference or regret."""
    stands = {name: replace(getattr(row.standing, name), mean=mean) for name, mean in means.items()}
    return replace(row, standing=replace(row.standing, **stands))


def axes_of(drawing):
    return drawing.figure.axes[0]


def legend_of(drawing):
    (legend,) = drawing.figure.legends
    return [text.get_text() for text in legend.get_texts()]


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
def test_all_figures_are_drawn_as_svg_and_png(saved):
    files = {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    assert {path.name for path in saved.iterdir()} == files
    for name in NAMES[1:]:
        pixels = imread(saved / f"{name}.png")
        assert pixels.shape[1] == (1011 if matplotlib.__version_info__ < (3, 11) else 1012)
        assert (pixels[0, :, :3] > 0.99).all()
        colours = (pixels[..., :3] * 255).round().astype(int) @ [1 << 16, 1 << 8, 1]
        for colour in (0x0B66B3, 0xB0377A, 0x7D4FA6, 0xB8500F):
            near = np.abs((colours >> 16) - (colour >> 16)) < 20
            near &= np.abs((colours & 255) - (colour & 255)) < 20
            assert near.sum() > 50


def test_the_same_comparison_gives_the_same_bytes(small, saved, tmp_path):
    """And leaves the settings of matplotlib as they were."""
    before = dict(matplotlib.rcParams)
    save(charts(small), tmp_path)
    assert dict(matplotlib.rcParams) == before
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_every_criterion_is_named_once_in_the_legend():
    drawings = charts(comparison((compared(),)))
    for name in NAMES[1:]:
        names = [one for one in legend_of(drawings[name]) if one != "value above axis"]
        assert set(names) == set(COSTS) - ({"random"} if name == NAMES[3] else set())
        assert len(names) == len(set(names))


def test_no_two_criteria_look_alike():
    styles = styles_of([*COSTS])
    assert len(set(styles.values())) == len(styles) == 18
    assert len(set(styles_of([*(f"own_{i}" for i in range(10)), "angular"]).values())) == 11


@pytest.mark.parametrize(
    "criteria",
    [("angular", "block_influence", "greedy"), ("cka", "cosine"),
     ("recommended", "angular", "deepest"), ("best_plan", "angular", "recommended")],
)  # fmt: skip
def test_few_criteria_have_colours_of_their_own(criteria):
    colours = [colour for colour, _ in styles_of(criteria).values()]
    assert len(set(colours)) == len(criteria)


# What lies where
def test_losses_are_drawn_over_the_share_of_layers(small, drawn):
    whole = small.models[0].whole
    for name, state in zip(NAMES[1:3], ("cut", "patched"), strict=True):
        rows = [row for row in small.rows if (row.criterion, row.state) == ("greedy", state)]
        wanted = [(0.0, whole.normalized)]
        wanted += [(row.layers_share, row.standing.loss.mean / math.log(49152)) for row in rows]
        lines = axes_of(drawn[name]).lines
        assert any(np.allclose(line.get_xydata(), wanted) for line in lines
                   if line.get_xydata().shape == (3, 2))  # fmt: skip
        assert any(set(line.get_ydata()) == {whole.normalized} for line in lines)
        stderrs = [row.standing.loss.stderr / math.log(49152) for row in rows]
        numbers = [row[-1] for row in drawn[name].numbers if row[0] == "greedy"]
        assert [one.split(" ± ")[1] for one in numbers[1:]] == [f"{one:.3f}" for one in stderrs]


def test_losses_above_a_guess_are_triangles():
    rows = rows_of(compared(), criteria=("angular", "random"), sizes=(1, 8))
    rows = [changed(row, loss=40.0 if row.n == 8 else 4.0) for row in rows]
    rows[0] = changed(rows[0], loss=math.inf)
    drawing = charts(one_of(rows))["loss_over_layers"]
    axes = axes_of(drawing)
    assert axes.get_ylim()[1] <= 1
    labels = [text for text in axes.texts if text.get_text() == f"{40 / math.log(49152):.3f}"]
    assert labels
    assert all(one.xy[1] == axes.get_ylim()[1] for one in labels)
    assert legend_of(drawing).count("value above axis") == 1
    assert "A triangle at the upper edge" in drawing.text
    line = next(one for one in axes.lines if one.get_label() == "random, cut")
    assert line.get_ydata()[-1] == 40 / math.log(49152)  # leaves by the upper edge, where it goes


def test_a_cut_that_is_better_than_the_whole_model_is_in_sight():
    rows = rows_of(compared(), criteria=("angular",))
    rows[0] = changed(rows[0], loss=2.5)
    axes = axes_of(charts(one_of(rows))["loss_over_layers"])
    assert axes.get_ylim()[0] < 2.5 / math.log(49152)


def test_states_of_few_criteria_are_in_one_figure_by_their_style():
    drawings = charts(curve())
    assert list(drawings) == [
        "criteria_against_loss", "loss_over_layers", "loss_over_time", "task_0", "task_1",
        "acceptance", "regret_over_cost",
    ]  # fmt: skip
    for name in [*drawings][1:-1]:
        lines = {line.get_label(): line for line in axes_of(drawings[name]).lines}
        styles = {"cut": (4, 2), "full patch": None, "healed": (1.2, 1.6)}
        for criterion in ("angular", "deepest"):
            drawn = [lines[f"{criterion}, {state}"] for state in styles]
            dashes = [line._unscaled_dash_pattern[1] for line in drawn]
            assert dashes == [*styles.values()]
            assert len({line.get_color() for line in drawn}) == 1
    assert axes_of(drawings["task_0"]).texts[0].get_text() == "whole model"


@pytest.mark.parametrize(("factors", "is_one"), [((0.8, 0.8), True), ((0.8, 0.5), False)])
def test_parameters_have_a_figure_where_layers_are_of_several_sizes(factors, is_one):
    rows = [
        replace(one, parameters_share=one.layers_share * factors[one.n > 8]) for one in curve().rows
    ]
    names = charts(replace(curve(), rows=tuple(rows)))
    assert ("loss_over_parameters" not in names) == is_one


def test_a_criterion_that_was_never_patched_has_no_line():
    rows = [
        replace(row, standing=None, failed="no")
        if (row.criterion, row.state) == ("random", "patched") else row
        for row in rows_of(compared(), criteria=[*[*COSTS][:4], "random"])
    ]  # fmt: skip
    patched = charts(one_of(rows))["loss_over_layers_patched"]
    assert {row[0] for row in patched.numbers} == {*[*COSTS][:4]}


# The order
def test_the_front_is_named():
    found = comparison()
    for place, group in enumerate(groups_of(found)):
        drawing = charts(found, place)[f"regret_over_cost{'_2' if place else ''}"]
        named = {name for text in axes_of(drawing).texts for name in text.get_text().split(", ")}
        front = pareto_front(group.means())
        assert named == set(front)
        assert [row[0] for row in drawing.numbers if row[3] == "yes"] == front[::-1]


def test_points_are_means_over_all_sizes(small, drawn):
    axes = axes_of(drawn["regret_over_cost"])
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    for criterion in ("greedy", "weights"):
        rows = [row for row in small.rows if (row.criterion, row.state) == (criterion, "patched")]
        mean = (
            sum(row.layer_forwards for row in rows) / 2,
            sum(row.standing.regret.mean for row in rows) / 2,
        )
        assert mean in points
    assert min(x for x, _ in points) == 0
    assert axes.get_xlim()[0] < 0


def test_figures_are_ranked_as_the_headline(small):
    """By the regret after the patch; by that of the judge where another one judges."""
    regrets = {(row.criterion, row.n): row.standing.regret.mean
               for row in small.rows if row.state == "patched"}  # fmt: skip
    rows = [changed(row, regret=9 - regrets[row.criterion, row.n]) if row.state == "cut" else row
            for row in small.rows]  # fmt: skip
    when = "after a quick patch (one matrix a block)"
    for judge, state, words, of in (
        ("loss", "patched", when, ""), ("kl", "cut", "as bare cuts", " of divergence"),
    ):  # fmt: skip
        found = replace(small, rows=tuple(rows), judge=judge)
        group = groups_of(found)[0]
        means = {name: sum(regrets[name, n] for n in (1, 8)) for name in group.by_regret()}
        assert sorted(means, key=means.get, reverse=judge == "kl") == list(means)
        dots, *_, costs = charts(found).values()
        assert dots.title.startswith(f"What each criterion's choice truly loses {words}")
        assert costs.head[2] == f"regret, nats a token{of}"
        assert costs.title.startswith(f"Mean regret {words} over n = 1, 8, ")
        told = {row[:2]: row[-1] for row in dots.numbers}
        for row in rows:
            if row.state == state:
                shown = f"{row.standing.difference.mean:.3f} ± "
                assert told[row.criterion, f"n = {row.n}"].startswith(shown)


def test_a_criterion_without_all_sizes_has_no_mean(small):
    rows = [row for row in small.rows if (row.criterion, row.n) != ("greedy", 8)]
    drawing = charts(replace(small, rows=tuple(rows)))["regret_over_cost"]
    assert "greedy" not in {row[0] for row in drawing.numbers}
    unknown = [replace(row, standing=replace(row.standing, regret=UNKNOWN)) for row in small.rows]
    assert "regret_over_cost" not in charts(replace(small, rows=tuple(unknown)))


def test_several_calibration_texts_have_figures_of_their_own():
    few = {"criteria": ("angular", "cka"), "sizes": (1, 4)}
    rows = (*rows_of(compared(), **few), *rows_of(compared(), "wikipedia", **few))
    first, second = (charts(one_of(rows), place) for place in (0, 1))
    assert list(second) == [f"{name}_2" for name in first]
    assert "chosen on wikipedia" in second["regret_over_cost_2"].title


@pytest.mark.parametrize("sizes", [(1,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_single_criterion_is_only_a_line_and_names_are_no_formulas(tmp_path, sizes):
    """What stands between dollars would be set as mathematics."""
    model = compared("a$\\frac{b$")
    rows = rows_of(model, criteria=("deepest",), sizes=sizes)
    drawings = charts(one_of([replace(row, criterion="own$^{$") for row in rows], model))
    assert list(drawings) == ["loss_over_layers"]
    assert (save(drawings, tmp_path) / "loss_over_layers.svg").is_file()

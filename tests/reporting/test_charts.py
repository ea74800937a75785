"""Charts and heat maps of a page: marks lie on what they tell, files are the same each time."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from shallower import MissingExtraError
from shallower.reporting.charts.heat_map import heat_maps
from shallower.reporting.charts.plots import Axis, Line, Point, dot_chart, line_chart
from tests.reporting.stories import scan

WORDS = {"title": "title", "text": "text", "x": Axis("x"), "y": Axis("y", is_share=True)}


def line(values, stderr=0.02, name="one"):
    points = tuple(Point(i, y, stderr, f"at {i}") for i, y in enumerate(values))
    return Line(name, points, "blue")


def painted(drawing, folder):
    drawing.save(folder)
    return imread(folder / f"{drawing.name}.png")


def at(pixels, mark, height):
    """The colour of a picture where a mark lies."""
    scale, (x, y, _) = len(pixels) / height, mark
    return pixels[round(y * scale), round(x * scale)]


def test_marks_lie_on_their_points(tmp_path):
    drawing = line_chart("marks", [line([0.2, 0.5, 0.4])], **WORDS)
    pixels = painted(drawing, tmp_path)
    height = drawing.figure.get_figheight() * 72
    assert [text for _, _, text in drawing.marks] == [
        "one, at 0: 20.0 ± 2.0 %", "one, at 1: 50.0 ± 2.0 %", "one, at 2: 40.0 ± 2.0 %",
    ]  # fmt: skip
    for mark in drawing.marks:
        red, _, blue, _ = at(pixels, mark, height)
        assert red < 0.2 < 0.6 < blue
    assert drawing.numbers[1] == ("one", "at 1", "1.000", "50.0 ± 2.0 %")


def test_values_above_the_axis_stand_at_its_edge(tmp_path):
    drawing = line_chart("above", [line([0.2, 9.0, math.nan])], **WORDS, most=1.0)
    painted(drawing, tmp_path)
    axes = drawing.figure.axes[0]
    assert axes.get_ylim()[1] == 1.0
    assert [text.get_text() for text in axes.texts] == ["900.0 %"]
    legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert legend == ["one", "value above axis"]
    assert drawing.marks[1][1] < drawing.marks[0][1]
    assert "900.0 ± 2.0 %" in drawing.marks[1][2]


def test_values_that_leave_the_axis_at_one_place_do_not_lie_on_one_another():
    lines = [line([0.2, 3.0 + i], name=f"line {i}") for i in range(3)]
    drawing = line_chart("above", lines, **WORDS, most=1.0)
    labels = {text.get_text(): text.xyann[1] for text in drawing.figure.axes[0].texts}
    assert labels == {"500.0 %": 0, "400.0 %": -9, "300.0 %": -18}
    inside = line_chart("inside", [line([0.2, 0.4])], **WORDS, most=1.0)
    assert not inside.figure.legends
    assert "triangle" not in inside.text


def test_levels_are_named_where_fewer_points_are():
    levels = ((0.4, "whole model"), (0.25, "chance"))
    drawing = line_chart("levels", [line([0.4, 0.3, 0.24])], **WORDS, references=levels)
    sides = {text.get_text(): text.get_ha() for text in drawing.figure.axes[0].texts}
    assert sides == {"whole model": "right", "chance": "left"}


def test_rows_of_points_are_where_their_marks_are(tmp_path):
    points = tuple(Point(i, 0.1 * i, math.nan, f"row {i}") for i in range(3))
    drawing = dot_chart(
        "rows", ["a", "b", "c"], [Line("only", points, "blue", marker="o")], title="t", text="t",
        x=Axis("x"), reference=(0.0, "none"),
    )  # fmt: skip
    pixels = painted(drawing, tmp_path)
    ys = [y for _, y, _ in drawing.marks]
    assert ys == sorted(ys)
    for mark in drawing.marks:
        red, _, blue, _ = at(pixels, mark, drawing.figure.get_figheight() * 72)
        assert red < 0.2 < 0.6 < blue
    assert drawing.numbers[2] == ("c", "only", "0.200")


def test_cells_of_a_heat_map_hold_the_distances_of_their_blocks(tmp_path):
    scanned = scan(8)
    shares = {n: found.probability for n, found in scanned.bootstrap(50).items()}
    rescaled, raw = heat_maps(scanned, shares)
    mean = scanned.mean("angular")
    for n in range(1, 8):
        row = raw.rows[n - 1]
        assert row == tuple(round(float(mean[s, s + n]), 4) for s in range(8 - n + 1))
    assert rescaled.rows == raw.rows
    assert raw.head[-1] == "share of resamples"
    assert raw.numbers[2] == (
        "3", str(scanned.best_block(3).start), f"{scanned.best_block(3).score:.4f}",
        f"{100 * shares[3]:.0f} %",
    )  # fmt: skip
    pixels = painted(raw, tmp_path)
    (left, bottom, width, height), scale = raw.grid, len(pixels) / (raw.figure.get_figheight() * 72)
    colours = {}
    for n, row in enumerate(raw.rows, 1):
        for start, value in enumerate(row):
            # A quarter of a cell from its corner: the ring is in the middle.
            x = (left + (start + 0.12) * width) * scale
            y = (bottom - (n - 0.88) * height) * scale
            colours[value] = pixels[round(y), round(x), :3]
    values = sorted(colours)
    greens = [colours[value][1] for value in values]
    assert np.corrcoef(values, greens)[0, 1] < -0.95  # yellow, which has most green, is alike
    outside = pixels[round((bottom - 6.5 * height) * scale),
                     round((left + 7.5 * width) * scale), :3]  # fmt: skip
    assert (outside > 0.98).all()


def test_files_are_the_same_each_time(tmp_path):
    for folder in ("one", "two"):
        for drawing in (heat_maps(scan(6))[1], line_chart("line", [line([0.1, 0.3])], **WORDS)):
            drawing.save(tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [f"{name}.{kind}" for name in ("heat_map_raw", "line")
                     for kind in ("png", "svg")]  # fmt: skip
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_model_of_one_layer_has_no_heat_map():
    assert heat_maps(scan(1)) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("shallower.reporting.charts.drawing.find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match=r"figures of a report needs .* 'shallower\[figures\]'"
    ):
        line_chart("line", [line([0.1])], **WORDS)

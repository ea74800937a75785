"""The heat map: its numbers by definition, and a picture that can be read."""

import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from shallower import MetricError, MissingExtraError, analyse_states
from shallower.reporting.charts.heat_map import block_distances, rescale_rows, save_heat_map


def scan_of(num_layers, metrics=("angular",)):
    states = np.random.default_rng(0).standard_normal((6, num_layers + 1, 8))
    return analyse_states(states.cumsum(axis=1), metrics)


def draw(scan, path, title=""):
    """The picture's pixels; a warning of matplotlib fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_heat_map(scan, path, title)
    return imread(path, format="png")


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """The picture of six layers."""
    return draw(scan_of(6), tmp_path_factory.mktemp("six") / "map.png")


@given(st.integers(2, 12))
def test_a_row_holds_the_blocks_of_one_size(num_layers):
    mean = np.random.default_rng(num_layers).random((num_layers + 1, num_layers + 1))
    rows = block_distances(mean)
    assert rows.shape == (num_layers - 1, num_layers)
    for n in range(1, num_layers):
        for start in range(num_layers):
            value = rows[n - 1, start]
            if start + n <= num_layers:
                assert value == mean[start, start + n]
            else:
                assert np.isnan(value)


@given(st.integers(2, 12), st.integers(0, 1000))
def test_rescaled_rows_run_from_zero_to_one(num_layers, seed):
    rows = block_distances(np.random.default_rng(seed).random((num_layers + 1, num_layers + 1)))
    rescaled = rescale_rows(rows)
    assert np.array_equal(np.isnan(rescaled), np.isnan(rows))
    assert np.array_equal(np.nanmin(rescaled, axis=1), np.zeros(len(rows)))
    assert np.array_equal(np.nanmax(rescaled, axis=1), np.ones(len(rows)))
    for row, before in zip(rescaled, rows, strict=True):
        seen = ~np.isnan(before)
        assert np.array_equal(np.argsort(row[seen]), np.argsort(before[seen]))


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, -0.5])
def test_a_row_of_equal_values_becomes_zeros(value):
    rows = np.array([[value, value, value], [value, value, np.nan], [0.0, 0.5, 1.0]])
    expected = [[0, 0, 0], [0, 0, np.nan], [0, 0.5, 1]]
    assert np.array_equal(rescale_rows(rows), expected, equal_nan=True)


def test_the_heat_map_rings_the_best_blocks(six):
    red, green, blue = np.moveaxis(six[..., :3], 2, 0)
    crimson = (red > 0.7) & (green < 0.3) & (blue < 0.4)
    half = crimson.shape[1] // 2
    assert crimson[:, :half].any()
    assert crimson[:, half:].any()


def test_letters_that_the_font_lacks_are_no_warning(tmp_path):
    assert draw(scan_of(4), tmp_path / "map.png", "模型").size


def test_the_same_scan_gives_the_same_picture(six, tmp_path):
    assert np.array_equal(six, draw(scan_of(6), str(tmp_path / "again")))


def test_equal_states_can_be_drawn(tmp_path):
    draw(analyse_states(np.ones((3, 6, 4))), tmp_path / "map.png")


def test_a_scan_without_angles_has_no_heat_map(tmp_path):
    with pytest.raises(MetricError):
        save_heat_map(scan_of(6, ("cosine",)), tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"shallower\[figures\]"):
        save_heat_map(scan_of(6), tmp_path / "map.png")

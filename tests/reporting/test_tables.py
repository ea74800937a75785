"""The tables that a person reads in the terminal."""

import io
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shallower import Block, Plan, RejectedSamplesWarning, analyse_states
from shallower.reporting.tables import plan_table, scan_table
from shallower.values.layers import ranges
from shallower.values.loss import with_error


def printed(table, width=200):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table)
    return console.export_text()


def row_of(text, *words):
    """The one printed line that holds all the words, its spaces made single."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, (words, text)
    return found[0]


def states_of(num_layers, samples=6):
    return np.random.default_rng(1).standard_normal((samples, num_layers + 1, 8)).cumsum(axis=1)


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (0.12344, 0.00126, "0.1234 ± 0.0013"), (0.12344, None, "0.1234"),
        (0.12344, math.nan, "0.1234"), (0.12344, math.inf, "0.1234"),
        (0.12344, 0.0, "0.1234 ± 0.0000"), (0.0, 0.5, "0.0000 ± 0.5000"), (None, None, "–"),
        (None, 0.5, "–"),
    ],
)  # fmt: skip
def test_a_value_is_printed_with_its_error_where_there_is_one(value, stderr, expected):
    assert with_error(value, stderr) == expected


def test_digits_can_be_chosen():
    assert with_error(0.126, 0.014, digits=2) == "0.13 ± 0.01"


@given(st.sets(st.integers(0, 30)))
def test_ranges_name_every_layer_once(layers):
    named = re.findall(r"\[(\d+), (\d+)\)", ranges(sorted(layers)))
    expanded = [layer for start, stop in named for layer in range(int(start), int(stop))]
    assert expanded == sorted(layers)


def test_a_scan_is_a_row_for_every_block_size():
    scan = analyse_states(states_of(6))
    text = printed(scan_table(scan))
    assert "6 layers, 6 samples" in text
    assert "rejected" not in text
    assert "angular" in text
    for n in range(1, 6):
        block = scan.best_block(n)
        row = row_of(text, f"│ {n} ", str(block))
        assert f"{block.score:.4f} ± {block.stderr:.4f}" in row


def test_a_scan_of_one_sample_shows_no_error():
    text = printed(scan_table(analyse_states(states_of(4, samples=1))))
    assert "nan" not in text
    assert text.count("±") == 1


def test_a_scan_table_counts_the_rejected():
    states = states_of(4)
    states[2, 1] = 0
    with pytest.warns(RejectedSamplesWarning):
        scan = analyse_states(states)
    assert "5 samples, 1 rejected" in printed(scan_table(scan))


def test_a_scan_by_cosines_shows_distances():
    scan = analyse_states(states_of(4), ["cosine"])
    text = printed(scan_table(scan))
    block = scan.best_block(2)
    assert "1 - cosine" in text
    assert f"{1 - scan.mean('cosine')[block.start, block.stop]:.4f}" in row_of(text, "│ 2 ")


def test_a_scan_of_two_metrics_is_decided_by_the_angle():
    scan = analyse_states(states_of(4), ["cosine", "angular"])
    text = printed(scan_table(scan))
    assert "cosine" not in text
    assert f"{scan.best_block(1, 'angular').score:.4f}" in row_of(text, "│ 1 ")


def test_a_plan_table_says_what_goes_and_what_stays():
    plan = Plan(12, (Block(2, 4, 0.25, 0.125), Block(7, 8)), "similarity", "angular")
    text = printed(plan_table(plan))
    assert "3 of 12 layers" in text
    assert "angular 0.2500 ± 0.1250" in row_of(text, "drop", "[2, 4)")
    assert "angular" not in row_of(text, "drop", "[7, 8)")
    assert "9 layers" in row_of(text, "keep", "[0, 2) [4, 7) [8, 12)")


def test_a_plan_by_hand_has_no_score():
    text = printed(plan_table(Plan(4, (Block(0, 1),))))
    assert row_of(text, "drop").replace("│", "").split() == ["drop", "[0,", "1)"]

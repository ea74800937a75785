"""Tables of the stages as a person reads them in the terminal."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import Block, Plan, RejectedSamplesWarning, analyse_states
from shallower.reporting.stories import stages
from shallower.reporting.stories.comparison import comparison_story
from shallower.reporting.stories.evaluation import evaluation_parts
from shallower.reporting.stories.stages import (
    candidates_table,
    failed_proposals,
    gain_table,
    plan_table,
    scan_table,
)
from shallower.reporting.story import Number, Section, Story, Table, text_of
from shallower.results.gain import MeasuredGain
from shallower.results.scores import Difference
from shallower.values.counts import with_error
from shallower.values.layers import ranges
from tests.reporting.comparisons import compared, comparison, curve
from tests.reporting.stories import loss, made_run
from tests.results.test_gain import gain
from tests.results.test_verification import GIVEN_UP, LOSER, LOST_EARLY, TIE, WINNER, verified


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


def test_digits_and_signs_can_be_chosen():
    assert with_error(0.126, 0.014, digits=2) == "0.13 ± 0.01"
    assert with_error(-0.0001, 0.0001, digits=2, sign=True) == "+0.00 ± 0.00"
    assert str(Difference(-0.0001, 0.0001, 4)) == "+0.000 ± 0.000"
    assert with_error(0.126, 0.014, digits=2, sign=True) == "+0.13 ± 0.01"


@given(st.sets(st.integers(0, 30)))
def test_ranges_name_every_layer_once(layers):
    named = re.findall(r"\[(\d+), (\d+)\)", ranges(sorted(layers)))
    expanded = [layer for start, stop in named for layer in range(int(start), int(stop))]
    assert expanded == sorted(layers)


# How any table is drawn
def test_columns_that_are_wide_or_have_errors_can_be_cut_down(printed):
    row = ("a", Number.of(1.25, 0.5), Number.of(2.5, 0.25), "page")
    table = Table("title", ("name", "loss", "patch", "more"), (row,), "A note.", 0, ("loss",),
                  ("more",))  # fmt: skip
    lines = [line.rstrip() for line in printed(table).splitlines()]
    assert lines[1:3] == ["title", " name   loss          patch"]
    assert lines[4:] == [" → a   1.250  2.500 ± 0.250", "A note."]


def test_a_column_is_not_folded_small_beside_a_long_one(printed):
    """The costs of criteria were four lines high, though the longest sentence was folded too."""
    criterion = "least angular distance; the nearest share of parameters"
    rows = ("frequency", "tokens N", "one pass, experts twice"), ("layers", criterion, "one pass")
    text = printed(Table("", ("criterion", "what it goes by", "what it costs"), rows), width=80)
    assert row_of(text, "frequency") == "frequency tokens N one pass, experts twice"
    assert len(text.splitlines()) == 5
    both = printed(Table("", ("a", "b"), (("word " * 30, "word " * 40),)), width=80)
    assert len(both.splitlines()) <= 9


def test_layers_are_broken_between_ranges_only(printed):
    layers = ranges(range(0, 40, 2)).replace(", ", ",\xa0")
    text = printed(Table("", ("drop", "n"), ((layers, Number.count(20)),)))
    assert "\xa0" not in text
    assert re.findall(r"\[\d+, \d+\)", text) == re.findall(r"\[\d+, \d+\)", ranges(range(0, 40, 2)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def every_table(run):
    """The main table of every command that has one."""
    curve_of = comparison_story(curve(), drawn=False)
    compared_of = comparison_story(comparison((compared(),)), drawn=False)
    several_of = comparison_story(comparison(), drawn=False)
    return {
        "scan": scan_table(run.scan),
        "race": candidates_table(run.recommended.verified),
        "gain": gain_table(gain()),
        "plan": plan_table(Plan(30, (Block(2, 4, 0.25, 0.125), Block(7, 8)), metric="angular")),
        "curve": next(table for part in curve_of.sections for table in part.tables),
        "compare": next(table for part in compared_of.sections for table in part.tables),
        "several": several_of.sections[0].tables[1],
    }


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize(
    "name",
    ["scan", "race", "gain", "plan", "curve", "compare", "several"],
)
def test_a_narrow_terminal_shows_layers_and_numbers_whole(printed, every_table, name, width):
    table = every_table[name]
    text = printed(replace(table, title="", note=""), width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    cells = [cell for row in table.rows for cell in row]
    for cell in cells:
        if not isinstance(cell, Number) and "\xa0" in cell:
            assert all(one in text for one in re.findall(r"\[\d+, \d+\)", cell))
    known = {part for cell in cells for part in text_of(cell).split()}
    known |= {cell.bare for cell in cells if isinstance(cell, Number)}
    found = re.findall(r"(?<![\[\w.*])[+-]?\d+\.\d+(?![\w)\]])", text)
    assert set(found) <= known


@pytest.mark.parametrize("width", [40, 60, 72, 80, 81, 100, 120])
def test_no_word_of_a_table_is_broken(printed, run, width):
    """Criteria and layers take what room there is, and numbers stay whole."""
    found = run.recommended.verified
    names = [("angular", "taylor_linear"), ("block_influence", "exchange"), ("contiguous",)]
    cuts = [replace(one, proposed_by=by) for one, by in zip(found.candidates, names, strict=True)]
    table = candidates_table(replace(found, candidates=tuple(cuts)))
    text = printed(replace(table, title="", note=""), width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    shown = text.replace(",", " ").split()
    for cut in cuts:
        assert "proposed by" in text or set(cut.proposed_by) <= {*shown}
        assert all(part in text for part in str(ranges(cut.plan.dropped)).split(") "))
    if width >= 80:
        assert {name for cut in cuts for name in cut.proposed_by} <= {*shown}
    assert "winner" in shown


def test_lines_of_an_evaluation_fit_eighty_columns(printed):
    sides = {"base": loss(3.4376, 49_152), "cut": loss(3.9563, 49_152)}
    names = {"base": "SmolLM2-135M-Instruct", "cut": "without [12, 20) [21, 22)"}
    text = printed(*evaluation_parts({"loss": sides}, names))
    assert max(map(len, text.splitlines())) <= 80


def test_what_has_no_room_is_named(printed, every_table):
    text = printed(every_table["compare"], width=40)
    assert "Not shown at this width: " in " ".join(text.split())


def test_rows_that_belong_together_stand_together(printed):
    rows = ((Number.count(1), "a"), (Number.count(1), "b"), (Number.count(2), "c"))
    lines = printed(Table("", ("n", "name"), rows, is_grouped=True)).splitlines()
    assert [bool(line.strip(" ─")) for line in lines] == [True, False, True, True, False, True]


def test_words_are_not_markup(printed):
    text = printed(Table("[red]t", ("[bold]h",), (("[i]c",),), "[u]n"))
    assert all(word in text for word in ("[red]t", "[bold]h", "[i]c", "[u]n"))


def test_a_story_ends_in_its_sentence_within_the_width(printed):
    section = Section("Part", ("word " * 40,), tables=(Table("t", ("a",), (("b",),)),))
    unseen = Section("Settings", ("unseen",))
    text = printed(Story("run", "Title", "All in a sentence.", warnings=("beware",),
                         sections=(unseen, section)))  # fmt: skip
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Title"
    assert lines[-2:] == ["warning: beware", "All in a sentence."]
    assert "unseen" not in text


# Scans and plans
def test_a_scan_is_a_row_for_every_block_size(printed):
    scan = analyse_states(states_of(6))
    text = printed(scan_table(scan))
    assert "6 layers, 6 samples" in text
    assert "rejected" not in text
    assert "angular" in text
    for n in range(1, 6):
        block = scan.best_block(n)
        row = row_of(text, f"{n} {block} ")
        assert row == f"{n} {block} {block.score:.4f} ± {block.stderr:.4f}"


def test_a_scan_of_one_sample_shows_no_error(printed):
    text = printed(scan_table(analyse_states(states_of(4, samples=1))))
    assert text.splitlines()[1].endswith("4 layers, 1 sample")
    assert "nan" not in text
    assert "±" not in text


def test_a_scan_table_counts_the_rejected(printed):
    states = states_of(4)
    states[2, 1] = 0
    with pytest.warns(RejectedSamplesWarning):
        scan = analyse_states(states)
    assert "5 samples, 1 rejected" in printed(scan_table(scan))


def test_a_scan_by_cosines_shows_distances(printed):
    scan = analyse_states(states_of(4), ["cosine"])
    text = printed(scan_table(scan))
    block = scan.best_block(2)
    assert "1 - cosine" in text
    assert f"{1 - scan.mean('cosine')[block.start, block.stop]:.4f}" in row_of(text, "2 [2, 4)")


def test_a_scan_of_two_metrics_is_decided_by_the_angle(printed):
    scan = analyse_states(states_of(4), ["cosine", "angular"])
    text = printed(scan_table(scan))
    assert "cosine" not in text
    assert f"{scan.best_block(1, 'angular').score:.4f}" in row_of(text, "1 [3, 4)")


def test_a_plan_table_says_what_goes_and_what_stays(printed):
    plan = Plan(12, (Block(2, 4, 0.25, 0.125), Block(7, 8)), "similarity", "angular")
    text = printed(plan_table(plan))
    assert "3 of 12 layers" in text
    assert "angular distance 0.2500 ± 0.1250" in row_of(text, "drop", "[2, 4)")
    assert "angular" not in row_of(text, "drop", "[7, 8)")
    shown = " ".join(text.split())
    assert "Distance is not loss: shallower run MODEL --n 3 --plan-only chooses by" in shown
    assert "9 layers" in row_of(text, "keep", "[0, 2) [4, 7)")


def test_a_plan_by_hand_has_no_score(printed):
    assert "Distance" not in printed(plan_table(Plan(4, (Block(0, 1),))))
    assert row_of(printed(plan_table(Plan(4, (Block(0, 1),)))), "drop") == "drop [0, 1)"


# A race, and what a cut saves
def test_a_row_for_every_candidate_in_80_columns(printed):
    found = verified(WINNER, TIE, LOSER, GIVEN_UP, LOST_EARLY)
    text = printed(candidates_table(found))
    assert max(map(len, text.splitlines())) <= 80
    shown = " ".join(text.split())
    assert "after a quick patch" in shown
    assert "9 proposals were judged on up to 48 selection texts" in shown
    for part in ("→ [12, 20)", "48 4.052 ± 0.060", "the winner", "+0.148 ± 0.020 worse"):
        assert part in shown
    assert row_of(text, "[1, 9)", "8", "–", "+0.008 ± 0.020").endswith("a tie")
    assert row_of(text, "[2, 10)", "8", "–", "+0.550 ± 0.020").endswith("worse")
    assert not {"4.060", "4.600"} & set(text.split())  # losses of other texts do not compare
    assert failed_proposals(found) == ["cka: too few texts"]


def test_gains_are_before_after_and_their_ratio(printed):
    text = printed(gain_table(gain()))
    assert max(map(len, text.splitlines())) <= 80
    shown = " ".join(text.split())
    for part in (
        "llama without [8, 16)", "one text of 2,048 tokens in bfloat16", "32 24 0.750",
        "6.74B 5.12B 0.760", "13.5GB 10.2GB 0.760", "524KB 393KB 0.750",
        "A100 SXM 80GB, token 7.00 ms * 5.30 ms 0.757", "100 ms * 75.00 ms",
        "measured here, prefill 3000 ms 1800 ms 0.600 [0.500, 0.750]",
    ):  # fmt: skip
        assert part in shown, part


def test_a_gain_tells_of_its_times_what_is_so(printed):
    """Seconds where they are long, stars where a model does not fit, and what was measured."""
    slow = replace(gain().forecasts[0], prefill_before=115.028, prefill_after=84.4)
    text = printed(gain_table(replace(gain(), forecasts=(slow,))))
    assert "prefill 115.0 s * 84.4 s 0.734" in " ".join(text.split())
    assert "estimates by the roofline; * does not fit into the memory." in text
    here = replace(slow, fits_before=True, device="here", source="the fastest of 7 probes here")
    text = printed(gain_table(replace(gain(), forecasts=(here,))))
    assert "*" not in text
    said = " ".join(text.split())
    assert "Times: estimates by the roofline. This machine: the fastest of 7 probes here. " in said
    assert "Measured: medians of 3 turns;" in said
    text = printed(gain_table(gain(None)))
    assert not any(words in text for words in ("This machine", "measured here"))


def test_a_range_with_1_in_it_is_too_noisy_for_a_ratio(printed):
    noisy = MeasuredGain("a CPU", (3.0, 1.0, 1.0), (0.5, 0.9, 2.3), (1.0, 1.0, 1.0),
                     (0.7, 0.9, 0.8), peak_before=10, peak_after=8)  # fmt: skip
    text = " ".join(printed(gain_table(replace(gain(), measured=noisy))).split())
    assert "measured here, prefill 1000 ms 900 ms too noisy [0.167, 2.300]" in text
    assert "measured here, token 1000 ms 800 ms 0.800 [0.700, 0.900]" in text
    assert "ratio: median, least and greatest of the turns' own" in text


PAIRS = [(0.12341, 0.12344), (1e-9, 2e-9), (0.5, 0.5), (0.5, math.inf)]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_scores_of_experts_that_differ_are_not_written_alike(one, other):
    digits = stages._digits(one, other)
    assert (f"{one:.{digits}f}" == f"{other:.{digits}f}") == (one == other)

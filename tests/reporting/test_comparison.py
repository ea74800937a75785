"""The tables and the CSV of criteria that were compared."""

import csv
import math
import re
from dataclasses import replace

import pytest

from shallower import OutputError
from shallower.reporting.stories.comparison import comparison_story, criteria_table
from shallower.reporting.writers.csv import write_comparison
from shallower.values.comparison import CriteriaComparison
from shallower.values.layers import ranges
from shallower.values.scores import Estimate, Standing
from tests.reporting.comparisons import COSTS, SIZES, compared, comparison, rows_of


def blocks(text):
    """The lines of each table for one n, by model and n, in order."""
    found, model = {}, None
    for line in text.splitlines():
        if match := re.match(r"(\S+): criteria against true loss", line):
            model = match[1]
        if match := re.match(r"n = (\d+):", line):
            found[model, int(match[1])] = lines = []
        elif model and found and line.strip():
            lines.append(line)
    return found


FAILURES = {"no/such-model": "cannot load no/such-model: [Errno 2] it is [not] there"}


@pytest.fixture(scope="module")
def whole():
    return comparison(failures=FAILURES)


@pytest.fixture
def shown(printed):
    """A comparison as the terminal shows it."""

    def show(found, width=80):
        return printed(comparison_story(found, drawn=False), width=width)

    return show


def test_everything_fits_80_columns(whole, shown):
    text = shown(whole)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in whole.rows:
        assert row.criterion in text
        loss = row.cut.loss.mean
        assert f" {loss:.3f} " in text or f" {loss:.2f} " in text
        if row.patched is not None:
            regret = row.patched.regret
            assert f"{regret.mean:.3f} ± {regret.stderr:.3f}" in text


def test_every_model_and_size_is_a_block_sorted_by_regret(whole, shown):
    found = blocks(shown(whole, 300))
    assert list(found) == [(m.name, n) for m in whole.models for n in SIZES]
    for (model, n), lines in found.items():
        rows = [row for row in whole.rows if (row.model, row.n) == (model, n)]
        patched = [row for row in rows if row.patched is not None]
        bare = [row for row in rows if row.patched is None]
        rows = sorted(patched, key=lambda row: row.patched.regret.mean)
        rows += sorted(bare, key=lambda row: row.cut.regret.mean)
        start = next(place for place, line in enumerate(lines) if "─" in line) + 1
        names = [line.split()[0] for line in lines[start:] if line[0] != " "][: len(rows)]
        assert names == [row.criterion for row in rows]


def test_a_row_says_everything(whole, shown):
    found = blocks(shown(whole, 300))
    for row in whole.rows:
        line = next(line for line in found[row.model, row.n] if line.split()[0] == row.criterion)
        for value in (row.cut.loss.mean, row.cut.regret.mean):
            assert f" {value:.{3 if value < 9.9995 else 2}f} " in line
        if row.patched is None:
            assert " – " in line
            assert "best" not in line
            continue
        loss, regret = row.patched.loss, row.patched.regret
        assert f" {loss.mean:.3f} " in line
        assert f"{regret.mean:.3f} ± {regret.stderr:.3f}" in line
        assert ("tie" in line) == (row.patched.tied and regret.mean > 0)
        assert ("best" in line) == (regret.mean == 0)


# By which state cuts are ranked
def turned(**more):
    """Two criteria of which the second is the best as cut, and the first after the patch."""
    pair = [row for row in rows_of(compared(), sizes=(4,)) if row.criterion in ("greedy", "taylor")]
    known = {
        "taylor": {"cut": standing(4.9, (1.3, 0.02), (0.3, 0.04)),
                   "patched": standing(3.9, (0.3, 0.01), (0.0, 0.0))},
        "greedy": {"cut": standing(4.6, (1.0, 0.02), (0.0, 0.0)),
                   "patched": standing(4.1, (0.5, 0.01), (0.2, 0.03))},
    }  # fmt: skip
    rows = tuple(replace(row, **{**known[row.criterion], **more}) for row in pair)
    return CriteriaComparison((compared(),), rows)


def standing(loss, difference, regret):
    return Standing(Estimate(loss, 0.05), Estimate(*difference), Estimate(*regret))


def test_cuts_are_ranked_after_the_patch_where_there_is_one(shown):
    story = comparison_story(turned(), drawn=False)
    assert story.sentence.startswith(
        "With 4 of 30 layers gone, taylor loses least after a quick patch: without layers "
    )
    assert "the loss is 0.30 ± 0.01 nats a token more than whole" in story.sentence
    assert "greedy comes last, 0.20 ± 0.03 nats a token behind." in story.sentence
    assert story.sentence.endswith(
        "As bare cuts the order is another one: greedy loses least, 1.00 ± 0.02 more than whole, "
        "and taylor is 0.30 ± 0.04 nats a token behind."
    )
    assert [strip.name for strip in story.strips] == ["SmolLM2-135M without 4 layers, by taylor"]
    assert [(step.name, step.loss.bare, step.more) for step in story.steps[1:]] == [
        ("n = 4, patched", "3.900", "+0.300 ± 0.010")
    ]
    assert "1.35 times the perplexity of the whole model after a quick patch" in story.cost
    lines = blocks(shown(turned()))["SmolLM2-135M", 4]
    names = [line.split()[0] for line in lines]
    assert names.index("taylor") < names.index("greedy")


def test_what_cannot_be_patched_is_named_beside_the_ranking():
    found = turned()
    (bare,) = rows_of(compared(), criteria=("deepest",), sizes=(4,))
    bare = replace(bare, patched=None, unpatched="there is no layer before the block")
    story = comparison_story(replace(found, rows=(*found.rows, bare)), drawn=False)
    said = (
        "greedy comes last, 0.20 ± 0.03 nats a token behind; the cut of deepest cannot be patched"
    )
    assert said in story.sentence


def test_the_same_order_in_both_states_is_said_with_its_ties():
    found = turned()
    rows = tuple(
        replace(row, cut=replace(row.cut, regret=Estimate(regret, 0.1)))
        for row in found.rows
        for regret in [0.0 if row.criterion == "taylor" else 0.1]
    )
    story = comparison_story(replace(found, rows=rows), drawn=False)
    said = "As bare cuts the same layers cost least; greedy cannot be told from them."
    assert story.sentence.endswith(said)


@pytest.mark.parametrize("judge", ["kl", "options"])
def test_another_judge_ranks_bare_cuts_and_says_so(judge):
    story = comparison_story(replace(turned(), judge=judge, unit="nats"), drawn=False)
    assert f"greedy is best by {judge} as a bare cut: without layers" in story.sentence
    unit = "nats of divergence" if judge == "kl" else "nats"
    assert f"taylor comes last, 0.30 ± 0.04 {unit} behind." in story.sentence
    assert story.sentence.endswith(
        "After a quick patch the order is another one: taylor loses least, 0.30 ± 0.01 more than "
        "whole, and greedy is 0.20 ± 0.03 nats a token behind."
    )
    assert "as a bare cut" in story.cost
    assert story.steps[1].name == "n = 4"


def test_the_judge_of_speech_is_said_in_plain_words(shown):
    found = replace(turned(), judge="speech", unit="nats a token")
    story = comparison_story(found, drawn=False)
    said = "greedy diverges least from the whole model on its own words as a bare cut: without"
    assert said in story.sentence
    assert "taylor comes last, 0.30 ± 0.04 nats a token of divergence behind." in story.sentence
    text = " ".join(shown(found, 300).split())
    assert "Judge: speech, the divergence from the whole model on its own words, nats a" in text
    assert " loss divergence regret " in text


def test_a_cut_that_is_better_than_the_whole_has_no_bar_and_no_minus():
    better = standing(3.5, (-0.092, 0.01), (0.0, 0.0))
    story = comparison_story(turned(cut=better, patched=better), drawn=False)
    assert "the loss is 0.09 ± 0.01 nats a token less than whole" in story.sentence
    assert {step.share for step in story.steps} == {0}


def test_cuts_that_were_not_patched_are_ranked_as_bare_cuts():
    story = comparison_story(turned(patched=None), drawn=False)
    assert "greedy loses least as a bare cut" in story.sentence
    assert story.sentence.endswith("No row says how they compare after a patch.")


@pytest.mark.parametrize("judge", ["loss", "kl"])
def test_a_narrow_terminal_keeps_criteria_and_layers(whole, shown, judge):
    text = shown(replace(whole, judge=judge, models=whole.models[:1]), 40)
    assert max(map(len, text.splitlines())) <= 40
    for lines in blocks(text).values():
        criteria = {line.split()[0] for line in lines}
        assert criteria >= set(COSTS)
        found = re.findall(r"\[\d+, \d+\)", "\n".join(lines))
        assert len(found) >= len(COSTS)
        assert "\n".join(lines).count("[") >= len(COSTS)
    for row in whole.rows:
        if row.model == whole.models[0].name:
            assert all(one in text for one in re.findall(r"\[\d+, \d+\)", ranges(row.dropped)))


def test_layers_are_ranges(shown):
    row = replace(rows_of(compared())[0], dropped=(1, 3, 4, 5, 9))
    text = shown(CriteriaComparison((compared(),), (row,)))
    assert all(f" {one} " in text for one in ("[1, 2)", "[3, 6)", "[9, 10)"))


def test_it_says_what_was_measured_on_what(whole, shown):
    text = " ".join(shown(whole, 300).split())
    assert (
        "The loss of the whole model is 3.592 ± 0.021 nats a token, 0.333 of ln V, on 16,384"
        in text
    )
    assert "16,384 tokens of 64 texts; V = 49,152. It has 30 layers." in text
    assert "Judge: loss, nats a token; texts: 40 calibration, 24 selection, 64 test." in text
    assert "n = 8: 27 % of the layers, 21 % of the parameters" in text


def test_parameters_that_differ_are_a_range(shown):
    rows = rows_of(compared(), sizes=(4,))
    rows[0] = replace(rows[0], parameters_share=0.05)
    assert "5–11 % of the parameters" in shown(CriteriaComparison((compared(),), tuple(rows)))


def test_failures_are_warnings_with_the_reason(whole, shown):
    lines = shown(replace(whole, skipped={"taylor": "has no gradients"}), 300).splitlines()
    (name, why), *_ = FAILURES.items()
    assert f"warning: {name} could not be compared: {why}" in lines
    assert "warning: taylor could not choose: has no gradients" in lines


def test_models_that_all_failed_are_shown(shown):
    text = shown(CriteriaComparison((), (), failures=FAILURES), 300)
    assert "no/such-model could not be compared" in text
    assert text.endswith("No criterion could be compared.\n")


def test_taus_are_sorted_and_only_where_there_are_any(whole, shown):
    one = replace(whole, models=whole.models[:1])
    part = shown(one, 120).split("The order of single layers")[1].split("Kendall")[0]
    found = re.findall(r"^ (\w+) +([+-]\d\.\d\d) *$", part, re.MULTILINE)
    assert {name for name, _ in found} == set(COSTS) - {
        "greedy", "exhaustive", "evolution", "random",
    }  # fmt: skip
    values = [float(value) for _, value in found]
    assert values == sorted(values, reverse=True)
    for name, value in found:
        row = next(row for row in whole.rows if row.criterion == name)
        assert f"{row.tau:+.2f}" == value
    none = tuple(replace(row, tau=None) for row in whole.rows)
    assert "order of single" not in shown(replace(whole, rows=none))


def test_several_calibration_texts_have_parts_of_their_own(shown):
    rows = (*rows_of(compared()), *rows_of(compared(), "wikipedia"))
    text = shown(CriteriaComparison((compared(),), rows))
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"SmolLM2-135M, chosen on (\w+): criteria", text) == ["c4", "wikipedia"]
    assert len(re.findall(r"^n = 1:", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^ angular +[+-]\d\.\d\d *$", text, re.MULTILINE)) == 2


def test_another_judge_has_its_score_beside_the_loss(shown):
    rows = tuple(
        replace(row, score=Estimate(0.1 * row.cut.loss.mean, 0.0123)) for row in rows_of(compared())
    )
    text = shown(CriteriaComparison((compared(),), rows, judge="kl", unit="nats a token"))
    assert "Judge: kl, the divergence from the whole model's next-token" in text
    assert max(map(len, text.splitlines())) <= 80
    for row in rows:
        loss = row.cut.loss.mean
        assert f"{row.score.mean:.3f} ± 0.012" in text
        assert f"{loss:.3f}" in text or f"{loss:.2f}" in text


def test_the_judge_of_options_shows_accuracy_and_chance(shown):
    rows = tuple(replace(row, accuracy=0.437) for row in rows_of(compared()))
    model = replace(compared(), accuracy=0.512, chance=0.25)
    text = shown(CriteriaComparison((model,), rows, judge="options", unit="nats"))
    assert max(map(len, text.splitlines())) <= 80
    assert "Accuracy of the whole model 51.2 %; chance 25.0 %" in text
    assert text.count("43.7 %") == len(rows)


def test_what_is_not_known_is_a_dash_and_comes_last(shown):
    nan = math.nan
    rows = rows_of(compared(), sizes=(4,))
    unknown = standing(nan, (nan, nan), (nan, nan))
    rows[0] = replace(rows[0], cut=unknown, patched=None)
    text = shown(CriteriaComparison((compared(),), tuple(rows)))
    assert "nan" not in text
    lines = blocks(text)["SmolLM2-135M", 4]
    last = next(line for line in reversed(lines) if re.search(r"( s|min)$", line.rstrip()))
    assert last.split()[0] == rows[0].criterion
    assert last.count("–") >= 2


def test_names_are_not_markup(shown):
    row = replace(rows_of(compared())[0], criterion="my[bold]own")
    model = replace(compared(), name="m[red]")
    row = replace(row, model="m[red]")
    text = shown(CriteriaComparison((model,), (row,)))
    assert "my[bold]own" in text
    assert "m[red]:" in text


@pytest.mark.parametrize(
    ("forwards", "seconds", "expected"),
    [
        (0, 0.04, "0 0.0 s"), (999, 9.94, "999 9.9 s"), (1000, 9.96, "1k 10 s"),
        (12_345, 99.4, "12.3k 99 s"), (999_499, 100, "999k 2 min"), (999_500, 5969, "1M 99 min"),
        (4_560_000, 7200, "4.56M 2.0 h"), (2_000_000_000_000, 1e6, "2,000G 277.8 h"),
    ],
)  # fmt: skip
def test_costs_are_read_by_people(shown, forwards, seconds, expected):
    row = replace(rows_of(compared())[0], layer_forwards=forwards, seconds=seconds)
    text = shown(CriteriaComparison((compared(),), (row,)))
    assert re.sub(r" +", " ", text).count(f" {expected}") == 1


def test_the_table_of_criteria_has_their_words(printed):
    text = printed(criteria_table([{"name": "odd", "summary": "Odd first.", "cost": "Nothing."}]))
    assert re.search(r"odd +Odd first\. +Nothing\.", text)


# CSV
def test_every_row_is_a_line_with_all_fields(whole, tmp_path):
    write_comparison(whole, tmp_path / "comparison.csv")
    with (tmp_path / "comparison.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        "model", "texts", "criterion", "n", "dropped", "loss", "stderr", "difference",
        "difference_stderr", "patched", "patched_stderr", "regret", "regret_stderr", "tied", "tau",
        "layers_share", "parameters_share", "seconds", "layer_forwards", "score", "score_stderr",
        "accuracy", "unpatched", "patched_difference", "patched_difference_stderr",
        "patched_regret", "patched_regret_stderr", "patched_tied", "acceptance",
        "acceptance_stderr", "repetition", "repetition_stderr", "experts",
    ]  # fmt: skip
    assert len(found) == len(whole.rows)
    for line, row in zip(found, whole.rows, strict=True):
        assert tuple(map(int, line["dropped"].split())) == row.dropped
        assert float(line["loss"]) == row.cut.loss.mean
        assert line["patched"] == ("" if row.patched is None else repr(row.patched.loss.mean))
        assert line["tied"] == str(row.cut.tied).lower()
        assert line["patched_tied"] == str(bool(row.patched and row.patched.tied)).lower()
        assert (line["model"], line["criterion"], int(line["n"])) == (
            row.model, row.criterion, row.n,
        )  # fmt: skip


def test_what_is_not_finite_is_an_empty_cell(tmp_path):
    unknown = standing(math.nan, (0.1, 0.01), (math.inf, 0.01))
    row = replace(rows_of(compared())[0], cut=unknown, model='a,"b"\nc')
    write_comparison(CriteriaComparison((), (row,)), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert (line["loss"], line["regret"], line["model"]) == ("", "", 'a,"b"\nc')


def test_a_comparison_without_rows_has_a_header(tmp_path):
    write_comparison(CriteriaComparison((), ()), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("model,texts,criterion,n,dropped,loss,")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_a_place_that_cannot_be_written_is_named(whole, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError):
        write_comparison(whole, tmp_path / "file" / "a.csv")

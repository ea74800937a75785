"""The words and tables of a comparison, of many criteria and of few in every state."""

import math
import re
from dataclasses import replace

import pytest

from shallower.judgement.choosing_size import knee
from shallower.reporting.stories.comparison import comparison_story
from shallower.reporting.story import Number
from shallower.results.comparison import CriteriaComparison
from shallower.results.scores import UNKNOWN, Difference, Estimate, Standing
from shallower.values.layers import ranges
from tests.reporting.comparisons import (
    COSTS,
    QUICK,
    UNPATCHED,
    compared,
    comparison,
    curve,
    rows_of,
    standing,
)

FAILURES = {"no/such-model": "cannot load no/such-model: [Errno 2] it is [not] there"}
TITLES = {"cut": "Layers less, as bare cuts", "patched": "Layers less, after a quick patch"}


def tables(story):
    """The tables of a story by their titles, those of one model alone."""
    return {table.title: table for section in story.sections for table in section.tables}


def cells(found, title, **options):
    """The cells of a table as text, by size and criterion, in order."""
    table = tables(comparison_story(found, drawn=False, **options))[title]
    return {
        (int(row[0].text), row[1]): dict(zip(table.head, map(text_of, row), strict=True))
        for row in table.rows
    }


def text_of(cell):
    return cell.text if isinstance(cell, Number) else cell.replace("\xa0", " ")


def one_of(rows, **more):
    return CriteriaComparison((compared(),), tuple(rows), settings=QUICK, **more)


@pytest.fixture(scope="module")
def whole():
    """One model, eighteen criteria, five sizes, two states."""
    return comparison((compared(),), failures=FAILURES)


@pytest.fixture
def shown(printed):
    """A comparison as the terminal shows it."""

    def show(found, width=80):
        return printed(comparison_story(found, drawn=False), width=width)

    return show


# Tables
@pytest.mark.parametrize("name", ["whole", "curve", "kl", "options"])
def test_everything_fits_80_columns(whole, shown, name):
    right = replace(compared(), accuracy=0.512, chance=0.25)
    rows = tuple(replace(row, accuracy=0.437) for row in whole.rows)
    found = {
        "whole": whole, "curve": curve(), "kl": replace(whole, judge="kl"),
        "options": replace(whole, judge="options", unit="nats", models=(right,), rows=rows),
    }[name]  # fmt: skip
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in found.rows:
        assert row.criterion in text
        if row.standing is not None:
            loss = row.standing.loss.mean
            assert f" {loss:.3f} " in text or f" {loss:.2f} " in text
    if name == "options":
        assert "Accuracy of the whole model 51.2 %; chance 25.0 %" in text
        assert text.count("43.7 %") == sum(row.state == "cut" for row in rows if row.standing)


def test_every_state_is_a_table_sorted_by_size_and_regret(whole):
    for state, title in TITLES.items():
        title += "" if state == "cut" else " (one matrix a block)"
        rows = [row for row in whole.rows if row.state == state and row.standing]
        rows.sort(key=lambda row: (row.n, row.standing.regret.mean))
        found = cells(whole, title)
        assert [*found] == [(row.n, row.criterion) for row in rows]
        for row, line in zip(rows, found.values(), strict=True):
            stands = row.standing
            digits = 3 if stands.loss.mean < 9.9995 else 2
            assert line["loss"].startswith(f"{stands.loss.mean:.{digits}f} ± ")
            assert line["of ln V"] == f"{stands.loss.mean / math.log(49152):.2f}"
            more = stands.difference
            assert line["more than whole"] == f"{more.mean:+.3f} ± {more.stderr:.3f}"
            digits = 3 if stands.regret.mean < 9.9995 else 2
            assert line["regret"].startswith(f"{stands.regret.mean:.{digits}f} ± ")
            best = stands.regret.mean == 0
            assert line["verdict"] == ("best" if best else "tie" if stands.tied else "")
            assert line["drop"] == ranges(row.dropped)


def test_what_failed_is_in_a_table_of_its_own_with_the_reason(whole, shown):
    """And is no row of dashes elsewhere."""
    failed = tables(comparison_story(curve(), drawn=False))["What could not be measured"]
    ((n, *rest),) = failed.rows
    assert (n.text, *rest[:2]) == ("20", "deepest", "patched")
    assert rest[2].startswith("no layer could be fitted <script>")
    assert not any(n == 20 for n, _ in cells(curve(), "mmlu, " + _after("patched")))
    assert f"4 random patched {UNPATCHED}" in " ".join(shown(whole).split())
    assert (4, "random") in cells(whole, TITLES["cut"])
    assert (4, "random") not in cells(whole, f"{TITLES['patched']} (one matrix a block)")


def _after(state):
    """The rest of the title of the scores in a state."""
    when = {"cut": "as bare cuts", "patched": "after a full patch on at most 16,384 tokens"}[state]
    return f"{when}: acc in %, whole model 64.0 ± 3.4"


def test_ties_with_the_whole_model_are_named(whole):
    same = standing(3.6, (0.01, 0.01), (0.0, 0.0))
    rows = [replace(row, standing=same) if row.criterion == "greedy" and row.n < 3 else row
            for row in whole.rows]  # fmt: skip
    found = tables(comparison_story(one_of(rows), drawn=False))[TITLES["cut"]]
    assert found.note.endswith("Ties with the whole model: greedy 1, greedy 2.")


def test_tasks_are_shown_beside_chance_and_the_whole():
    found = cells(curve(), f"mmlu, {_after('cut')}")
    assert [*found] == [(n, name) for n in (4, 8, 12, 16) for name in ("angular", "deepest")]
    assert found[4, "deepest"] == {
        "n": "4", "criterion": "deepest", "drop": "[27, 31)", "score": "62.5 ± 3.4",
        "difference": "-1.5 ± 0.9", "verdict": "tie",
    }  # fmt: skip
    assert found[12, "angular"]["verdict"] == "at chance"
    note = tables(comparison_story(curve(), drawn=False))[f"mmlu, {_after('cut')}"].note
    assert note.startswith("200 items with 5 solved examples; chance 25.0; ")


def test_speech_is_shown_in_every_state():
    titles = [
        title for title in tables(comparison_story(curve(), drawn=False)) if "Speech" in title
    ]
    assert len(titles) == 3
    row = curve().rows[0]
    line = cells(curve(), titles[0])[row.n, row.criterion]
    found = row.speech.of("acceptance")
    assert f"{100 * found.mean:.1f} ± {100 * found.stderr:.1f}" in line.values()
    loops = {way: {name: replace(of, sums=2.0 * of.weights) if name == "repetition" else of
                   for name, of in scores.items()}
             for way, scores in row.speech.scores.items()}  # fmt: skip
    rows = [replace(one, speech=replace(one.speech, scores=loops)) if one is row else one
            for one in (row, *curve().rows[1:])]  # fmt: skip
    verdicts = [
        line["verdict"] for line in cells(replace(curve(), rows=tuple(rows)), titles[0]).values()
    ]
    assert verdicts == ["repeats itself", *[""] * 7]


def test_what_is_recommended_says_by_what(whole):
    said = "What is recommended was chosen by losses after a quick patch."
    named = [replace(row, criterion="recommended") for row in rows_of(compared(), sizes=(1,))]
    for found, there in ((whole, False), (one_of(named[:1]), True)):
        story = comparison_story(found, drawn=False)
        assert any(said in section.lines for section in story.sections) == there
    assert story.title == "1 criterion on SmolLM2-135M"


def test_taus_are_sorted_and_only_where_there_are_any(whole, shown):
    part = shown(whole, 120).split("The order of single layers")[1].split("Kendall")[0]
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


def test_another_judge_has_its_score_beside_the_loss_of_bare_cuts(whole, shown):
    rows = tuple(replace(row, score=Estimate(0.1 * row.n, 0.0123)) for row in whole.rows)
    found = replace(whole, rows=rows, judge="kl")
    assert "Judge: kl, the divergence from the whole model's next-token" in shown(found)
    for (n, _), line in cells(found, TITLES["cut"]).items():
        assert line["divergence"] == f"{0.1 * n:.3f} ± 0.012"
        assert line["loss"]
    patched = next(iter(cells(found, f"{TITLES['patched']} (one matrix a block)").values()))
    assert "divergence" not in patched


def test_what_is_not_known_is_a_dash_and_comes_last(whole, shown):
    unknown = Standing(UNKNOWN, UNKNOWN)
    rows = [replace(row, standing=unknown) if row.criterion == "angular" else row
            for row in whole.rows if row.n == 4]  # fmt: skip
    assert "nan" not in shown(one_of(rows))
    found = cells(one_of(rows), TITLES["cut"])
    assert [*found][-1] == (4, "angular")
    line = found[4, "angular"]
    assert [line[name] for name in ("loss", "of ln V", "more than whole", "regret", "verdict")] == [
        "–", "–", "–", "–", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("forwards", "seconds", "expected"),
    [
        (0, 0.04, "0 0.0 s"), (999, 9.94, "999 9.9 s"), (1000, 9.96, "1k 10 s"),
        (12_345, 99.6, "12.3k 2 min"), (999_499, 119, "999k 2 min"), (999_500, 5969, "1M 99 min"),
        (4_560_000, 7200, "4.56M 2.0 h"), (2_000_000_000_000, 1e6, "2,000G 277.8 h"),
    ],
)  # fmt: skip
def test_costs_are_read_by_people(forwards, seconds, expected):
    row = replace(rows_of(compared())[0], layer_forwards=forwards, choice_seconds=seconds)
    (line,) = cells(one_of([row]), TITLES["cut"]).values()
    assert f"{line['layer forwards']} {line['choice']}" == expected


# The sentence: which cut is shown, and by which state cuts are ranked
def turned(**standings):
    """Two criteria of which the second is the best as cut, and the first after the patch."""
    known = {
        ("taylor", "cut"): standing(4.9, (1.3, 0.02), (0.3, 0.04)),
        ("taylor", "patched"): standing(3.9, (0.3, 0.01), (0.0, 0.0)),
        ("greedy", "cut"): standing(4.6, (1.0, 0.02), (0.0, 0.0)),
        ("greedy", "patched"): standing(4.1, (0.5, 0.01), (0.2, 0.03)),
    }
    pair = rows_of(compared(), criteria=("greedy", "taylor"), sizes=(4,))
    rows = [replace(row, standing=standings.get(row.state, known[row.criterion, row.state]))
            for row in pair]  # fmt: skip
    return one_of(rows)


def test_cuts_are_ranked_after_the_patch_where_there_is_one():
    story = comparison_story(turned(), drawn=False)
    assert story.sentence.startswith(
        "With 4 of 30 layers gone, taylor loses least after a quick patch (one matrix a block): "
        "without layers "
    )
    assert "the loss is 0.30 ± 0.01 nats a token more than whole" in story.sentence
    assert "greedy comes last, 0.20 ± 0.03 nats a token behind." in story.sentence
    assert story.sentence.endswith(
        "As bare cuts the order is another one: greedy loses least, 1.00 ± 0.02 more than whole, "
        "and taylor is 0.30 ± 0.04 nats a token behind."
    )
    assert [strip.name for strip in story.strips] == ["SmolLM2-135M without 4 layers, by taylor"]
    assert [(step.name, step.loss.text, step.more, step.chosen) for step in story.steps] == [
        ("whole", "3.592 ± 0.021", "", False),
        ("cut", "4.900 ± 0.050", "+1.300 ± 0.020", False),
        ("quick patch", "3.900 ± 0.050", "+0.300 ± 0.010", True),
    ]
    assert "1.35 times the perplexity of the whole model after a quick patch" in story.cost
    assert story.cost.endswith("As a bare cut its loss is 4.900 ± 0.050 nats a token.")


def test_a_size_without_any_cut_does_not_undo_the_ranking():
    """Nor does a criterion that cannot be patched, which is named."""
    (bare, patched) = rows_of(compared(), criteria=("deepest",), sizes=(4,))
    why = {"standing": None, "failed": UNPATCHED}
    more = (bare, replace(patched, **why), replace(bare, n=9, **why), replace(patched, n=9, **why))
    found = turned()
    story = comparison_story(replace(found, rows=(*found.rows, *more)), drawn=False)
    said = (
        "greedy comes last, 0.20 ± 0.03 nats a token behind; the cut of deepest cannot be patched."
    )
    assert said in story.sentence


def test_the_same_order_in_both_states_is_said_with_its_ties():
    rows = tuple(
        replace(row, standing=replace(row.standing, regret=Estimate(regret, 0.1)))
        if row.state == "cut" else row
        for row in turned().rows
        for regret in [0.0 if row.criterion == "taylor" else 0.1]
    )  # fmt: skip
    story = comparison_story(one_of(rows), drawn=False)
    said = "As bare cuts the same layers cost least; greedy cannot be told from them."
    assert story.sentence.endswith(said)


@pytest.mark.parametrize("judge", ["kl", "options", "speech"])
def test_another_judge_ranks_bare_cuts_and_says_so(shown, judge):
    found = replace(turned(), judge=judge, unit="nats")
    story = comparison_story(found, drawn=False)
    leads = f"is best by {judge}"
    if judge == "speech":
        leads = "diverges least from the whole model on its own words"
        said = "Judge: speech, the divergence from the whole model on its own words, nats"
        assert said in " ".join(shown(found, 300).split())
    assert f"greedy {leads} as a bare cut: without layers" in story.sentence
    unit = "nats" if judge == "options" else "nats of divergence"
    assert f"taylor comes last, 0.30 ± 0.04 {unit} behind." in story.sentence
    assert story.sentence.endswith(
        "After a quick patch (one matrix a block) the order is another one: taylor loses least, "
        "0.30 ± 0.01 more than whole, and greedy is 0.20 ± 0.03 nats a token behind."
    )
    assert "as a bare cut" in story.cost
    assert [step.name for step in story.steps if step.chosen] == ["cut"]


def test_what_is_not_lost_has_no_bar_and_no_minus():
    """Of negative differences one had a full bar: it is negative as a share of a negative most."""
    better = standing(3.5, (-0.092, 0.01), (0.0, 0.0))
    story = comparison_story(turned(cut=better, patched=better), drawn=False)
    assert "the loss is 0.09 ± 0.01 nats a token less than whole" in story.sentence
    assert [step.share for step in story.steps] == [0, 0, 0]
    worse = standing(3.792, (0.2, 0.01), (0.0, 0.0)), standing(3.692, (0.1, 0.01), (0.0, 0.0))
    story = comparison_story(turned(cut=worse[0], patched=worse[1]), drawn=False)
    assert [step.share for step in story.steps] == pytest.approx([0, 1, 0.5])


def test_cuts_that_were_not_patched_are_ranked_as_bare_cuts():
    bare = [row for row in turned().rows if row.state == "cut"]
    story = comparison_story(one_of(bare), drawn=False)
    assert "greedy loses least as a bare cut" in story.sentence
    assert "taylor comes last, 0.30 ± 0.04 nats a token behind." in story.sentence
    assert "patch" not in story.sentence


@pytest.mark.parametrize(
    ("settings", "long", "short"),
    [
        ({"patch": "quick"}, "quick patch (one matrix a block)", "quick patch"),
        ({"patch": "full", "patch_tokens": 16_384}, "full patch on at most 16,384 tokens",
         "full patch"),
    ],
)  # fmt: skip
def test_the_patch_is_named_wherever_its_losses_are(settings, long, short):
    found = replace(curve(sizes=(4, 8)), settings=settings)
    rows = [row for row in found.rows if row.criterion == "angular" and row.state != "healed"]
    story = comparison_story(replace(found, rows=tuple(rows)))
    assert f"chosen by angular, after a {long}, the loss is" in story.sentence
    assert f"after a {long}, 12 % of its layers" in story.cost
    assert [step.name for step in story.steps] == ["whole", "cut", short]
    assert len(tables(story)[f"Layers less, after a {long}"].rows) == 2
    for drawing in story.drawings:
        legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
        assert f"angular, {short}" in legend
    healed = comparison_story(found, drawn=False)
    (differs,) = (one for one in healed.sections if "Why" in one.title)
    assert any(f"What is healed has a {long} first." in line for line in differs.lines)


@pytest.mark.parametrize("worse", [0.1, 0.9])
def test_the_headline_is_of_the_knee(worse):
    """As `run` finds it, on the line through the best cuts."""
    lost = {2: 0.05, 4: worse, 8: 1.0}
    (row, _) = rows_of(compared(), criteria=("greedy",), sizes=(1,))
    best = [replace(row, n=n, dropped=tuple(range(n)),
                    standing=standing(3 + more, (more, 0.0), (0.0, 0.0)))
            for n, more in lost.items()]  # fmt: skip
    others = [replace(one, criterion="deepest", dropped=tuple(range(9, 9 + one.n)),
                      standing=standing(6.0, (3.0, 0.1), (3.0 - lost[one.n], 0.1)))
              for one in best]  # fmt: skip
    found = knee({n: Difference(value, 0.0, 4) for n, value in lost.items()})
    said = comparison_story(one_of([*others, *best]), drawn=False).sentence
    assert said.startswith(f"With {found.n} of 30 layers gone, greedy loses least")
    alone = comparison_story(one_of(best), drawn=False).sentence
    assert alone.startswith(f"Without layers [0, {found.n})")


def test_a_curve_says_up_to_where_its_tasks_hold():
    story = comparison_story(curve(), drawn=False)
    assert story.sentence.startswith("With 8 of 32 layers gone, angular loses least healed after")
    assert "mmlu holds up to 25 % of layers" in story.sentence
    assert "boolq holds up to 50 % of layers" in story.sentence
    assert any("boolq is at chance already" in warning for warning in story.warnings)
    assert [(step.name, step.chosen) for step in story.steps] == [
        ("whole", False), ("cut", False), ("full patch", False), ("healed", True),
    ]  # fmt: skip
    shown = next(row for row in curve().rows if (row.n, row.state) == (8, "healed"))
    assert story.steps[-1].loss.value == shown.standing.loss.mean
    saved = {fact.name: fact.value.value for fact in story.savings}
    assert saved["a token's time, as forecast for an A100"] == shown.time_share


# What could not be compared
def test_failures_are_warnings_with_the_reason(whole, shown):
    found = replace(whole, skipped={"taylor": "has no gradients"}, ended=False)
    lines = shown(found, 300).splitlines()
    (name, why), *_ = FAILURES.items()
    assert f"warning: {name} could not be compared: {why}" in lines
    assert "warning: taylor could not choose: has no gradients" in lines
    warnings = comparison_story(found, drawn=False).warnings
    assert warnings[0].startswith("the comparison is incomplete: 180 rows are measured; the same")
    assert not any("incomplete" in one for one in comparison_story(whole, drawn=False).warnings)


def test_cuts_that_could_not_be_made_are_told():
    failed = [
        replace(row, standing=None, tasks=(), speech=None, failed="no") for row in curve().rows
    ]
    story = comparison_story(replace(curve(), rows=tuple(failed)))
    assert story.sentence == "No criterion could be compared."
    assert not story.drawings

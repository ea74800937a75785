"""The page of several models: what each bears, where they are alike, and who chooses best."""

import json
from dataclasses import replace

import pytest

from shallower.errors import OutputError
from shallower.reporting.charts.comparison import groups_of
from shallower.reporting.charts.models import all_cuts, borne_charts
from shallower.reporting.report import read_story, report
from shallower.reporting.stories.comparison import comparison_story
from shallower.results.comparison import LOSSES, CriteriaComparison, scan_place
from tests.reporting.comparisons import compared, comparison, curve, rows_of, starts
from tests.reporting.stories import scan, write

NAMES = ("Llama-3-8B", "a-model-whose-name-is-rather-long")


def several():
    """Two models, of which only the first was healed, and a third that is broken."""
    first, second = curve(NAMES[0]), compared(NAMES[1], 24, 3.1, 32_000)
    rows = rows_of(second, criteria=("angular", "cosine", "greedy", "evolution", "taylor"))
    models = tuple(replace(model, starts={"c4": starts(model.num_layers)})
                   for model in (*first.models, second))  # fmt: skip
    return replace(
        first,
        models=models,
        rows=(*first.rows, *rows),
        failures={"lost": "there is no room"},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a comparison of several models, with one of the scans, and its page."""
    out = tmp_path_factory.mktemp("several")
    write(out, "comparison.json", several(), command="shallower compare A B --out TABLE")
    (out / "scans").mkdir()
    scan(32, NAMES[0]).save(out / scan_place(NAMES[0], "c4"))
    return out, report(out)


def test_a_page_has_every_model_and_state(made):
    told = json.loads(made[1].with_suffix(".json").read_bytes())
    data = told["data"]
    assert [(one["model"], one["state"]) for one in data["borne"] if one["loss"] == 0.1] == [
        (NAMES[0], "cut"), (NAMES[0], "patched"), (NAMES[0], "healed"), (NAMES[1], "cut"),
        (NAMES[1], "patched"),
    ]  # fmt: skip
    assert "so many layers can go, after a full patch" in told["sentence"]  # the last of both
    of_models = [
        "more_than_whole", "share_borne", "heat_map_1", "starts_over_depth", "regret_by_model",
    ]  # fmt: skip
    assert told["figures"][: len(of_models)] == of_models
    assert len({*told["figures"]}) == len(told["figures"])
    assert {"loss_over_layers", "loss_over_layers_2"} < {*told["figures"]}
    assert "lost could not be compared: there is no room" in told["warnings"]
    assert {*data["regrets"]} == {*NAMES}
    assert made[1].stat().st_size < 10**6


def test_the_first_screen_is_of_no_single_model(made):
    """But for the drawing of its layers, which is named."""
    story = read_story(made[0], drawn=False)
    assert (story.steps, story.cost, story.savings) == ((), "", ())
    assert [strip.name.split()[0] for strip in story.strips] == [*NAMES]
    titles = [section.title for section in story.sections]
    assert titles[:5] == [
        "What each model bears", "Where the layers are alike", "Who chooses best, by model",
        f"{NAMES[0]}: what it loses by each cut", f"{NAMES[1]}: what it loses by each cut",
    ]  # fmt: skip


def test_tables_of_several_models_have_no_empty_column(made):
    """A row for every model, state and size, and a word where a criterion is the best."""
    sections = {section.title: section for section in read_story(made[0], drawn=False).sections}
    shares, best = sections["What each model bears"].tables
    assert [row[:2] for row in shares.rows] == [
        (NAMES[0], "cut"), (NAMES[0], "patched"), (NAMES[0], "healed"), (NAMES[1], "cut"),
        (NAMES[1], "patched"),
    ]  # fmt: skip
    assert len(shares.head) == 2 + len(LOSSES)
    assert len(best.rows) == 3 * 4 + 2 * 5
    (alike,) = sections["Where the layers are alike"].tables
    assert [(row[0], row[1].text, row[2].text) for row in alike.rows][:2] == [
        (NAMES[0], "4", "16"), (NAMES[0], "8", "16"),
    ]  # fmt: skip
    means, *regrets = sections["Who chooses best, by model"].tables
    assert means.head == ("criterion", *NAMES)
    by_name = {row[0]: row[1:] for row in means.rows}
    assert by_name["greedy"][0].text == "–"
    assert by_name["angular"][0].value == 0
    words = [cell.text for table in regrets for row in table.rows for cell in row[1:]]
    assert words.count("best") == sum(len({row.n for row in group.rows if row.standing})
                                      for group in groups_of(several()))  # fmt: skip
    for table in (shares, best, alike, means):
        for place in range(len(table.head)):
            assert any(
                (getattr(row[place], "text", row[place]) or "–") != "–" for row in table.rows
            )


def test_the_best_cut_of_a_size_is_that_of_least_loss():
    for cuts in all_cuts(groups_of(several())):
        rows = [row for row in several().rows if row.standing
                and (row.model, row.state) == (cuts[0][0].model, cuts[0][0].state)]  # fmt: skip
        assert [cut.layers_share for cut, _ in cuts] == sorted({row.layers_share for row in rows})
        for cut, lost in cuts:
            beside = [row for row in rows if row.layers_share == cut.layers_share]
            assert lost.difference.mean == min(row.standing.difference.mean for row in beside)


def test_a_line_ends_where_it_leaves_the_figure():
    chart, _ = borne_charts(groups_of(several()))
    lines = {}
    for name, _, _, lost in chart.numbers:
        lines.setdefault(name, []).append(float(lost.split(" ")[0]))
    most = 2 * max(LOSSES)
    assert all(lost <= most for losses in lines.values() for lost in losses[:-1])
    assert any(losses[-1] > most for losses in lines.values())


@pytest.mark.parametrize("measured", [3, 2])
def test_all_of_them_are_those_that_were_compared(measured):
    """A model without a regret of every size is none of them."""
    one = comparison((compared(),))
    names = ("one", "two", "three")
    models = [replace(one.models[0], name=name) for name in names]
    rows = [replace(row, model=name) for name in names for row in one.rows]
    failing = [("three", 2 if name == "random" else 1, name) for name in one.criteria]
    rows = [replace(row, standing=None, failed="no")
            if (row.model, row.n, row.criterion) in failing and measured == 2 else row
            for row in rows]  # fmt: skip
    rows = [row for row in rows if row.state == "cut"]
    story = comparison_story(replace(one, models=tuple(models), rows=tuple(rows)), drawn=False)
    where = {3: "all of them", 2: "the 2 that are compared"}[measured]
    assert story.sentence.endswith(f" has the least mean regret on {where}.")


def test_texts_that_criteria_saw_have_parts_of_their_own():
    one = comparison((compared(),))
    rows = (*one.rows, *(replace(row, texts="wikipedia") for row in one.rows))
    story = comparison_story(replace(one, rows=rows), drawn=False)
    titles = [section.title for section in story.sections]
    for texts in ("c4", "wikipedia"):
        assert f"SmolLM2-135M, chosen on {texts}: what it loses by each cut" in titles
    assert "SmolLM2-135M, chosen on wikipedia 1 of 30 layers" in story.sentence


def test_a_fast_scan_of_models_says_where_their_layers_are_alike(tmp_path):
    """The judge `none`: no cut is measured, and nothing is said of losses."""
    models = [
        replace(compared(name, 30), whole=None, starts={"c4": starts(30)})
        for name in ("one", "two")
    ]
    found = CriteriaComparison(
        tuple(models), (), judge="none", settings={"n": (4, 8)}, max_length=64,
        splits={"fit": 24},
    )  # fmt: skip
    write(tmp_path, "comparison.json", found)
    (tmp_path / "scans").mkdir()
    for name in ("one", "two"):
        scan(30, name).save(tmp_path / scan_place(name, "c4"))
    story = read_story(tmp_path, drawn=True)
    assert story.title == "The layers of one, two"
    assert story.sentence == ("The 8 layers whose ends are most alike: one [15, 23); two [15, 23).")
    names = [drawing.name for drawing in story.drawings]
    assert names == ["heat_map_1", "heat_map_2", "starts_over_depth"]
    assert [section.title for section in story.sections][:2] == [
        "Where the layers are alike", "Settings",
    ]  # fmt: skip
    facts = {fact.name: fact.value for section in story.sections for fact in section.facts}
    assert facts["sizes"] == "4, 8"
    words = " ".join(line for section in story.sections for line in section.lines)
    assert "test set" not in words
    assert all(cell for fact in facts.items() for cell in fact)
    assert report(tmp_path).is_file()


def test_nothing_is_measured_yet(tmp_path):
    none = replace(several(), rows=(), failures={}, ended=False)
    models = tuple(replace(model, starts={}) for model in none.models)
    story = comparison_story(replace(none, models=models))
    assert story.sentence == "No criterion could be compared."
    assert story.warnings[0].startswith("the comparison is incomplete: 0 rows are measured")
    assert not story.drawings
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(OutputError, match=r"comparison\.json is damaged"):
        read_story(tmp_path, drawn=True)

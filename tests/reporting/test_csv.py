"""The CSV of a comparison: whole models, then a line for every row."""

import csv
import math
from dataclasses import replace

from shallower.reporting.writers.csv import write_comparison
from shallower.results.comparison import CriteriaComparison
from tests.reporting.comparisons import compared, comparison, curve, rows_of, standing


def read_csv(found, path):
    write_comparison(found, path)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


COLUMNS = [
    "model", "texts", "criterion", "n", "state", "dropped", "loss", "stderr", "difference",
    "difference_stderr", "regret", "regret_stderr", "tied", "tau", "layers_share",
    "parameters_share", "time_share", "layer_forwards", "choice_seconds", "seconds", "score",
    "score_stderr", "accuracy", "failed", "experts",
]  # fmt: skip


def test_whole_models_and_rows_are_lines_with_all_digits(tmp_path):
    found = comparison()
    models, lines = found.models, read_csv(found, tmp_path / "comparison.csv")
    assert list(lines[0]) == COLUMNS
    assert len(lines) == 2 + len(found.rows)
    for line, model in zip(lines, models, strict=False):
        assert (line["model"], line["criterion"], line["n"]) == (model.name, "whole", "0")
        assert float(line["loss"]) == model.whole.nats
    for line, row in zip(lines[2:], found.rows, strict=True):
        assert (line["model"], line["criterion"], int(line["n"]), line["state"]) == (
            row.model, row.criterion, row.n, row.state,
        )  # fmt: skip
        assert tuple(map(int, line["dropped"].split())) == row.dropped
        assert line["failed"] == (row.failed or "")
        assert line["loss"] == (repr(row.standing.loss.mean) if row.standing else "")
        assert line["tied"] == (str(row.standing.tied).lower() if row.standing else "")


def test_tasks_and_speech_have_columns_of_their_own(tmp_path):
    found = curve()
    whole, *lines = read_csv(found, tmp_path / "comparison.csv")
    names = ("mmlu", "mmlu_stderr", "mmlu_difference", "mmlu_difference_stderr")
    assert {*names, "boolq", "speech_acceptance", "speech_repetition_stderr"} <= {*whole}
    assert float(whole["mmlu"]) == found.models[0].tasks[0].mean
    for line, row in zip(lines, found.rows, strict=True):
        if row.failed:
            assert {line[name] for name in names} == {line["speech_acceptance"]} == {""}
            continue
        less = row.tasks[0].minus(found.models[0].tasks[0])
        figures = [row.tasks[0].mean, row.tasks[0].stderr, less.mean, less.stderr]
        assert [float(line[name]) for name in names] == figures
        assert float(line["speech_acceptance"]) == row.speech.of("acceptance").mean


def test_what_is_not_finite_is_an_empty_cell(tmp_path):
    unknown = standing(math.nan, (0.1, 0.01), (math.inf, 0.01))
    row = replace(rows_of(compared())[0], standing=unknown, model='a,"b"\nc')
    model = replace(compared(), name=row.model)
    (_, line) = read_csv(CriteriaComparison((model,), (row,)), tmp_path / "a.csv")
    assert (line["loss"], line["regret"], line["model"]) == ("", "", 'a,"b"\nc')


def test_a_comparison_without_rows_has_a_header(tmp_path):
    assert read_csv(CriteriaComparison((), ()), tmp_path / "a.csv") == []
    assert (tmp_path / "a.csv").read_text() == f"{','.join(COLUMNS)}\n"

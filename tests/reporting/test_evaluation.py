"""What an evaluation found, for people and for machines."""

import numpy as np

from shallower.reporting.stories.evaluation import (
    evaluation_json,
    evaluation_parts,
    tasks_table,
)
from shallower.results.perplexity import Perplexity
from shallower.results.scores import Scores
from shallower.results.task_scores import TaskScores


def scores(task, metric, values, chance=None):
    values = np.array(values, np.float64)
    items = tuple(map(str, range(len(values))))
    return TaskScores(task, metric, items, Scores(values, np.ones(len(values))), 5, chance)


BASE = (
    scores("mmlu", "acc", [1] * 9 + [0], 0.25),
    scores("pick", "acc_norm", [1, 0, 1, 0], 0.5),
    scores("pick", "acc", [1, 1, 1, 1], 0.5),
)
CUT = (
    scores("mmlu", "acc", [0] * 9 + [1], 0.25),
    scores("pick", "acc_norm", [1, 0, 1, 0], 0.5),
    scores("pick", "acc", [1, 1, 1, 0], 0.5),
)


def test_a_row_for_every_measure_in_80_columns(printed):
    text = printed(tasks_table({"all layers": BASE, "without [3, 6)": CUT}))
    assert max(map(len, text.splitlines())) <= 80
    shown = " ".join(text.split())
    for part in (
        "90.0 ± 10.0",
        "(10.0 ± 10.0)",
        "(50.0 ± 28.9)",
        "= +0.0 ± 0.0",
        " -80.0 ± 20.0",
        "5-shot",
    ):
        assert part in shown, part


def test_json_pairs_each_measure():
    window = Perplexity(4, False, 1, Scores(np.array([3.0, 6.0]), np.array([3.0, 3.0])))
    values = {
        "perplexity": {"base": window, "cut": window},
        "tasks": {"base": BASE, "cut": CUT},
    }
    plain = evaluation_json(values)
    assert plain["perplexity"]["difference"]["mean"] == 0
    assert [one["metric"] for one in plain["tasks"]] == ["acc", "acc_norm", "acc"]
    assert plain["tasks"][0]["difference"]["mean"] == -0.8
    line, _, lost, table = evaluation_parts(values, {"base": "all layers", "cut": "without [1, 2)"})
    assert line == (
        "all layers: perplexity 4.482 ± 2.241, 2 windows of 4 tokens, stride 4\n  without a "
        "beginning-of-text token; 6 tokens predicted, 1 left over"
    )
    assert "paired by window; a tie" in lost
    assert len(table.rows) == 3

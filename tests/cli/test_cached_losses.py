"""Losses and scores that one command measured are found by every other."""

import json
import random

import pytest

from shallower import Block, ModelSource
from shallower.evaluation import loss as losses
from shallower.settings.stages import EvalSettings
from shallower.store.store import open_store
from shallower.studies.evaluate import EvalJob, measures_of
from tests.conftest import write_jsonl
from tests.documents import documents
from tests.evaluation.task_folders import CHOICE, choices, write_rows, write_tasks

pytestmark = pytest.mark.filterwarnings(
    "default:the cut is not patched", "default:.*samples rejected"
)


@pytest.fixture
def held_out(folder):
    """20 test texts of many lengths, of which one cannot be predicted."""
    texts = documents(20, seed=1)
    texts[7] = "w1"
    return write_jsonl(folder / "held_out.jsonl", texts)


@pytest.mark.usefixtures("undrawn")
def test_eval_runs_nothing_after_a_run_and_says_its_digits(
    shallower, folder, tiny, texts, held_out, layers_run
):
    command = ["run", tiny, "--texts", texts / "texts.jsonl", "--eval-texts", held_out]
    few = ("--max-texts", 12, "--top", 1)
    done = shallower(*command, "--n", "2", *few, "--no-speech", "--out", "out")
    assert done.status == 0, done.err
    results = json.loads((folder / "out" / "results.json").read_text())
    recommended = results["recommended"]
    layers_run.clear()
    shown = shallower("eval", tiny, "--texts", held_out, "--plan", "out", "--json")
    checkpoint = shallower("eval", "out/checkpoint", "--texts", held_out, "--json")
    assert layers_run == []
    state = "cut" if recommended["patched"] is None else "patched"
    whole = {name: one for name, one in results["whole"].items() if name != "by_text"}
    assert {name: shown.json["base"][name] for name in whole} == whole
    assert whole["num_rejected"] == 1
    assert shown.json["cut"]["nats"] == recommended["cut"]
    assert checkpoint.json["base"]["nats"] == recommended[state]
    assert shallower(
        "eval", "out/checkpoint", "--texts", held_out, "--no-cache", "--json"
    ).json == (checkpoint.json)


def test_a_study_finds_what_eval_measured(shallower, tiny, texts, held_out, monkeypatch):
    command = ["eval", tiny, "--texts", held_out, "--drop", "2:5"]
    found = shallower(*command, "--json").json
    monkeypatch.setattr("shallower.judgement.judges.judge.summed_losses", lambda *_: 1 / 0)
    curve = ["curve", tiny, "--texts", texts / "texts.jsonl", "--eval-texts", held_out, "--n", "3"]
    done = shallower(*curve, "--criteria", "deepest", "--states", "cut", "--out", "out", "--json")
    assert done.status == 0, done.err
    (cut,) = done.json["rows"]
    assert done.json["whole"]["nats"] == found["base"]["nats"]
    assert cut["dropped"] == [2, 3, 4]
    assert cut["loss"] == found["cut"]["nats"]


def test_a_cut_that_is_measured_beside_a_cached_model_is_of_the_whole_one(
    shallower, tiny, held_out
):
    for cut in [], ["--drop", "1:3"]:
        assert shallower("eval", tiny, "--texts", held_out, *cut).status == 0
    settings = EvalSettings(texts=str(held_out))
    job = EvalJob(
        source=ModelSource(str(tiny)),
        measures=measures_of(settings, is_shared=False),
        layers=[Block(1, 3)],
        store=open_store(),
    )
    sides = job.known()["loss"]
    assert sides["cut"].model == sides["base"].model
    assert sides["cut"].model.num_layers == 6


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_scores_on_tasks_are_found_by_curve_and_by_eval(
    shallower, folder, tiny, texts, held_out, layers_run, monkeypatch
):
    pytest.importorskip("lm_eval")
    tasks = write_tasks(folder / "tasks", CHOICE)
    write_rows(tasks / "pick.jsonl", choices(8))
    asked = ["--tasks", "pick", "--tasks-dir", tasks, "--max-items", "3", "--json"]
    curve = ["curve", tiny, "--texts", texts / "texts.jsonl", "--eval-texts", held_out, "--n", "3"]
    curve += ["--criteria", "deepest", "--states", "cut", *asked]
    done = shallower(*curve, "--out", "out")
    assert done.status == 0, done.err
    points = [one["tasks"] for one in (*done.json["models"], *done.json["rows"])]
    layers_run.clear()
    found = shallower("eval", tiny, *asked, "--drop", "2:5")
    assert found.status == 0, found.err
    assert layers_run == []
    (main, *_) = (one for one in found.json["tasks"] if one["metric"] == points[0][0]["metric"])
    sides = [main["base"], main["cut"]]
    assert sides == [{name: one[name] for name in sides[0]} for (one,) in points]
    for place, content in (("utils.py", "value = 1"), ("pick.jsonl", None)):
        before = (tasks / place).read_text() if content is None else None
        (tasks / place).write_text(content or before.replace('"answer": 1', '"answer": 0'))
        layers_run.clear()
        assert shallower("eval", tiny, *asked, "--drop", "2:5").status == 0
        assert layers_run, f"{place} was changed"
        (tasks / place).unlink() if before is None else (tasks / place).write_text(before)
    monkeypatch.setenv("SHALLOWER_CACHE", str(folder / "other"))
    assert shallower("eval", tiny, *asked, "--drop", "2:5").json == found.json
    assert layers_run
    monkeypatch.setattr("shallower.evaluation.tasks.ChosenTasks.evaluate", lambda *_, **__: 1 / 0)
    again = shallower(*curve, "--out", "again")
    assert again.status == 0, again.err
    assert [one["tasks"] for one in (*again.json["models"], *again.json["rows"])] == points


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_killed_eval_goes_on_behind_the_batches_that_it_measured(
    shallower, folder, tiny, held_out, monkeypatch, stream
):
    (folder / "long.txt").write_text(" ".join(documents(8, seed=2)))
    both = ["--perplexity", "long.txt", "--context", "16", "--batch-size", "3"]
    command = ["eval", tiny, "--texts", held_out, *both, "--drop", "1:3", "--json"]
    expected = shallower(*command, "--no-cache").json
    plain, left, seen = losses.text_losses, 0, []

    def killed(head, batch, halving):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        seen.append(batch.input_ids.tolist())
        return plain(head, batch, halving)

    monkeypatch.setattr(losses, "text_losses", killed)
    for _ in range(2):
        left = random.Random(len(seen)).randint(2, 5)
        assert shallower(*command, *stream).status == 130
    left = 1000
    found = shallower(*command, *stream).json
    assert {name: found[name] for name in expected} == expected
    windows = -(-expected["perplexity"]["base"]["num_tokens"] // 45)
    assert len(seen) == 2 * (7 + windows)

"""The page of a sweep: numbers of its jobs' files, side by side."""

import json
from dataclasses import replace

import pytest

from shallower.errors import OutputError
from shallower.reporting.charts.sweep import loss_charts, read_found
from shallower.runs.report import read_story, report
from shallower.values.sweep import Sweep, SweepJob
from tests.reporting.comparisons import compared, comparison
from tests.reporting.stories import curve, scan, write

NAMES = ("SmolLM2-135M", "a-model-whose-name-is-rather-long")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two models in its folder: one is compared, scanned and healed, one compared."""
    out = tmp_path_factory.mktemp("swept")
    jobs = [
        SweepJob("compare-0", "compare", NAMES[0], "c4", ("compare",), "done"),
        SweepJob("scan-0", "scan", NAMES[0], "c4", ("scan",), "done"),
        SweepJob("curve-0", "curve", NAMES[0], "c4", ("curve",), "done"),
        SweepJob("compare-1", "compare", NAMES[1], "c4", ("compare",), "done"),
        SweepJob("scan-1", "scan", NAMES[1], "c4", ("scan",), "failed", "there is no room"),
    ]
    for job, model in ((jobs[0], compared()), (jobs[3], compared("long", 24, 3.1, 32_000))):
        write(out / job.folder, "comparison.json", comparison((model,)))
    write(out / jobs[2].folder, "curve.json", curve())
    scan().save(out / jobs[1].folder / "scan.safetensors")
    sweep = Sweep("sweep.yaml", tuple(jobs), (0.1, 0.5), ("cut", "patched", "healed"))
    write(out, "sweep.json", sweep)
    return out, sweep


def test_a_page_has_every_model_and_state(swept):
    out, _ = swept
    page = report(out)
    told = json.loads(page.with_suffix(".json").read_bytes())
    data = told["data"]
    assert [(one["model"], one["state"]) for one in data["borne"] if one["loss"] == 0.1] == [
        (NAMES[0], "cut"), (NAMES[0], "patched"), (NAMES[0], "healed"), (NAMES[1], "cut"),
        (NAMES[1], "patched"),
    ]  # fmt: skip
    assert "can go, after a quick patch: SmolLM2-135M" in told["sentence"]  # the last of both
    assert told["figures"] == [
        "loss_over_layers", "share_borne", "heat_map_1", "starts_over_depth", "regret_by_model",
    ]  # fmt: skip
    assert any("scan-1 failed: there is no room" in one for one in told["warnings"])
    assert any("incomplete: 1 of 5 jobs are not done" in one for one in told["warnings"])
    assert "words" not in json.dumps(data["jobs"])
    assert page.stat().st_size < 10**6


def test_the_best_cut_of_a_size_is_that_of_least_loss(swept):
    out, sweep = swept
    first, second = read_found(out, sweep)
    healed = first.cuts("healed")
    points = [one for of in first.curves for one in of.points if one.state == "healed"]
    assert [cut.share for cut in healed] == sorted({one.layers_share for one in points})
    for cut in healed:
        beside = [one for one in points if one.layers_share == cut.share]
        lost = [first.curves[0].lost(one).mean for one in beside]
        assert cut.lost.mean == min(lost)
    for state in ("cut", "patched"):
        for cut in second.cuts(state):
            rows = [row for row in second.comparison.rows if row.layers_share == cut.share]
            standings = filter(None, (getattr(row, state) for row in rows))
            assert cut.lost.mean == min(one.difference.mean for one in standings)


def test_a_line_ends_where_it_leaves_the_figure(swept):
    out, sweep = swept
    (chart, _) = loss_charts(read_found(out, sweep), replace(sweep, losses=(0.1,)))
    lines = {}
    for name, _, _, lost in chart.numbers:
        lines.setdefault(name, []).append(float(lost.split(" ")[0]))
    assert all(lost <= 0.2 for losses in lines.values() for lost in losses[:-1])
    assert any(losses[-1] > 0.2 for losses in lines.values())


@pytest.mark.parametrize("state", ["done", "failed"])
def test_all_of_them_are_those_that_were_compared(tmp_path, state):
    names = ("one", "two", "three")
    states = ("done", "done", state)
    jobs = [
        SweepJob(f"compare-{name}", "compare", name, "c4", ("compare",), done)
        for name, done in zip(names, states, strict=True)
    ]
    for job in jobs:
        if job.state == "done":
            write(tmp_path / job.folder, "comparison.json", comparison((compared(),)))
    write(tmp_path, "sweep.json", Sweep("sweep.yaml", tuple(jobs), (0.1,), ("cut",)))
    story = read_story(tmp_path, drawn=False)
    where = {"done": "all of them", "failed": "the 2 that are compared"}[state]
    assert story.sentence.endswith(f" has the least mean regret on {where}.")


def test_nothing_is_done_yet(tmp_path):
    job = SweepJob("scan-0", "scan", "m", "t", ("scan",))
    write(tmp_path, "sweep.json", Sweep("sweep.yaml", (job,), (0.1,), ("cut",)))
    story = read_story(tmp_path, drawn=True)
    assert story.sentence == "No job of the sweep is done yet."
    assert not story.drawings
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(OutputError, match=r"sweep\.json is damaged"):
        read_story(tmp_path, drawn=True)

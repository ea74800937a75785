"""What a study would take is said before it: split, memory, disk and time."""

import shutil
import tempfile
import types

import pytest
import torch

import shallower as sh
from shallower import processes
from shallower.errors import ModelError
from shallower.forecasts import speed, work
from shallower.forecasts.speed import Work
from shallower.memory.weights import BESIDE
from shallower.models.source import ModelSource
from shallower.processes import begin
from shallower.values.estimates import Time
from shallower.values.files import SMALL
from tests.conftest import mostly_slow, tiny_llama

STUDIES = {
    "run": ("--n", 2),
    "run --heal": ("--n", 2, "--heal", "--heal-steps", 4),
    "curve": ("--n", "1,2", "--criteria", "recommended,angular,greedy"),
    "compare": ("--n", "1,2"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, words):
    """A model of three layers: what it holds is rehearsed layer by layer."""
    folder = tmp_path_factory.mktemp("three") / "tiny"
    sh.save_model(tiny_llama(3), words, folder)
    return folder


@pytest.fixture
def dry(shallower, tiny, texts):
    """Run the dry run of a study."""

    def call(study, *more, out="out"):
        files = ("--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl")
        words = (study.split()[0], tiny, *files, *STUDIES[study], "--out", out, "--dry-run")
        return shallower(*words, *more)

    return call


@pytest.mark.parametrize("study", mostly_slow(STUDIES, ["run", "compare"]))
def test_a_dry_run_says_split_memory_disk_and_time(dry, folder, study):
    done = dry(study, "--json")
    assert done.status == 0, done.err
    said = done.json
    assert said["split"] == {"texts": {"fit": 16, "choose": 8, "report": 8}} or study == "compare"
    assert sum(next(iter(said["split"].values())).values()) == 32
    assert said["memory"]["peak_bytes"] > 10_000
    assert said["disk"]["free_bytes"] > said["disk"]["bytes"] > 0
    assert 0 < said["time"]["seconds"] < 600
    assert [*folder.iterdir()] == []
    lines = dry(study).out.splitlines()
    assert not any(line.endswith((": True", ": False")) for line in lines)
    for name in ("split: ", "memory: ", "disk: ", "time: at least "):
        assert any(line.startswith(name) for line in lines), name


@pytest.mark.slow
def test_the_disk_is_what_the_checkpoint_takes(dry, shallower, tiny, texts, folder):
    said = dry("run", "--json").json["disk"]["bytes"]
    files = ("--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl")
    assert shallower("run", tiny, *files, "--n", 2, "--no-speech", "--out", "out").status == 0
    weights = (folder / "out" / "checkpoint" / "model.safetensors").stat().st_size
    assert weights <= said < 3 * weights + BESIDE + SMALL  # a page, a card, a tokenizer


@pytest.mark.slow
def test_more_work_takes_longer(dry, monkeypatch):
    each = Work(layers=1e-3, heads=1e-3)
    monkeypatch.setattr(work, "measure_speed", lambda *_args, **_options: each)
    monkeypatch.setattr(work, "worked", lambda: 0.0)

    def seconds(study, *more):
        return dry(study, "--json", *more).json["time"]["seconds"]

    assert seconds("curve", "--n", "1") < seconds("curve", "--n", "1,2")
    assert seconds("curve", "--patch", "quick") < seconds("curve")
    assert seconds("compare", "--criteria", "angular") < seconds("compare")
    assert seconds("run", "--plan-only") < seconds("run") < seconds("run --heal")
    assert seconds("run --heal", "--heal-steps", "8") > seconds("run --heal")
    for study in ("run", "compare"):
        assert seconds(study, "--judge", "speech") > seconds(study)


def test_what_cannot_be_told_is_said_in_words(dry, monkeypatch):
    def refused(*_args, **_options):
        raise ModelError("a layer of it cannot be built")

    monkeypatch.setattr(speed, "build_empty", refused)
    done = dry("run")
    assert done.status == 0
    assert "time: cannot be estimated beforehand: a layer of it cannot be built" in done.out
    assert "memory: " in done.out


def test_weights_that_are_quantised_are_not_timed(dry):
    said = dry("run", "--json", "--dtype", "nf4").json
    assert "nf4" in said["time"]["unknown"]
    assert "nf4" in said["memory"]["unknown"]
    assert said["disk"]["bytes"] > 0


@pytest.mark.parametrize("study", STUDIES)
def test_too_few_texts_are_refused_by_the_dry_run_too(dry, study):
    assert "too few calibration and selection texts" in dry(study, "--max-texts", 11).error


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (42, "40 s"),
        (118, "2 min"),
        (2_500, "40 min"),
        (7_300, "2 hours"),
        (9e5, "10 days"),
    ],
)
def test_a_time_is_rounded(seconds, said):
    assert str(Time(seconds)) == f"about {said} alone"


@pytest.mark.parametrize(
    ("load", "threads", "said"),
    [(0.0, 2, "at least 2 min alone"), (1.0, 1, "at least 2 min alone"),
     (6.0, 2, "at least 2 min alone; load 6: at least 8 min")],
)  # fmt: skip
def test_the_load_is_said_where_it_counts(monkeypatch, load, threads, said):
    """Two processors, which all that runs shares."""
    monkeypatch.setattr(processes, "processors", lambda: 2)
    monkeypatch.setattr(processes.os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    begin(timed=False)
    time = Time(120, "", True, *processes.slowed(threads))
    assert str(time) == said
    assert time.to_json()["seconds_under_load"] == 120 * (4 if load == 6 else 1)


def test_a_time_is_that_of_the_least_disturbed_repeat_of_this_thread(monkeypatch):
    """Whatever others take of a busy machine: a wall clock, or one timing, would count it."""
    taken = iter([9.0, 3.0, 1.0, 2.0, 5.0, 4.0, *[7.0] * 99])
    now = [0.0]
    monkeypatch.setattr(speed.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 100 * now[0])
    repeats = []

    def work():
        now[0] += next(taken)
        repeats.append(now[0])

    assert speed._seconds(work, torch.device("cpu")) == 1.0
    assert len(repeats) == 6, "the first one warms up"


def test_a_forecast_counts_what_a_command_does_before_and_the_loading(monkeypatch, tiny):
    each = Work(layers=2.0, loads=30.0)
    monkeypatch.setattr(work, "measure_speed", lambda *_args, **_options: each)
    begin(timed=False)
    monkeypatch.setattr(work, "worked", lambda: 7.0)
    monkeypatch.setattr(work, "slowed", lambda _: (0.0, 1.0))
    one = work.Counted(ModelSource(tiny, "float32"), Work(layers=5), 8, 32)
    assert work.forecast(one).seconds == 7 + 2 * 5 + 30
    assert str(work.forecast(one)) == "about 50 s alone"


COMMANDS = {
    "scan": "scan {tiny} --texts {texts}/texts.jsonl",
    "eval": "eval {tiny} --texts {texts}/held_out.jsonl --drop 2",
    "eval by what it says": "eval {tiny} --speech {texts}/prompts.jsonl --drop 2",
    "patch": "patch {tiny} --texts {texts}/texts.jsonl --drop 2",
    "heal": "heal cut --texts {texts}/texts.jsonl --dtype float32 --steps 2 --max-length 32",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_long_tells_its_time(shallower, tiny, texts, folder, command):
    (texts / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    sh.prune(tiny, [1], "cut")
    words = COMMANDS[command].format(tiny=tiny, texts=texts).split()
    said = shallower(*words, "--out", "out", "--dry-run", "--json")
    assert said.status == 0, said.err
    assert 0 < said.json["time"]["seconds"] < 600
    if command in ("patch", "heal"):
        assert said.json["disk"]["free_bytes"] > said.json["disk"]["bytes"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["cut"]


def test_temporary_files_are_counted_and_refused_before_a_model_is_loaded(
    shallower, tiny, texts, folder, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "small"))
    usage = shutil.disk_usage
    files = ("--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl")
    calls = {
        "patch": ("--drop", "1"),
        "run": ("--n", 1),
        "curve": ("--n", "1", "--states", "cut,patched", "--criteria", "deepest"),
    }
    (folder / "small").mkdir()

    def refuse(*_args, **_options):
        raise AssertionError("the model is loaded")

    for command, options in calls.items():
        words = (command, tiny, *files, *options, "--out", "out")
        counted = shallower(*words, "--dry-run", "--json").json["temporary"]
        assert 0 < counted["bytes"] < counted["free_bytes"]
        with monkeypatch.context() as full:
            lacks = types.SimpleNamespace(free=counted["bytes"] - 1)
            full.setattr(
                shutil,
                "disk_usage",
                lambda at, lacks=lacks: lacks if "small" in str(at) else usage(at),
            )
            full.setattr(ModelSource, "load", refuse)
            refused = shallower(*words)
        assert refused.status == 2
        assert "of temporary files" in refused.error
        assert "(TMPDIR)" in refused.error
    assert [one.name for one in folder.iterdir()] == ["small"]

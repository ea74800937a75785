"""The command `sweep`: its file, its jobs, and the page of what they find."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest

import shallower as sh
from shallower.errors import SettingsError
from shallower.runs import demo
from shallower.runs import sweep as sweeps
from shallower.runs.sweep import OpenedJobs, SweepRun, run_job
from shallower.runs.sweep_file import read_sweep
from shallower.store import inputs
from tests.cli.documents import documents
from tests.conftest import write_jsonl

ASKED = {
    "models": "[tiny, deeper]",
    "texts": "texts.jsonl",
    "eval_texts": "held_out.jsonl",
    "criteria": "[angular, deepest]",
    "n": "[1, 2]",
    "max_length": "16",
}


def written(**more):
    """A sweep's file in this folder, a key a line."""
    asked = {**ASKED, **more}
    Path("sweep.yaml").write_text("".join(f"{key}: {value}\n" for key, value in asked.items()))
    return "sweep.yaml"


@pytest.fixture
def here(folder, models, texts):
    """What sweeps read: two models, one whose weights are damaged, and texts."""
    for name in ("tiny", "deeper"):
        (folder / name).symlink_to(models / name)
    shutil.copytree(models / "tiny", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"no weights")
    for name in ("texts.jsonl", "held_out.jsonl"):
        shutil.copy(texts / name, folder)
    return folder


def lines_of(shallower, **more):
    """The words of the printed command lines."""
    done = shallower("sweep", written(**more), "--out", "out", "--print-commands")
    assert done.status == 0, done.err
    return [shlex.split(line) for line in done.out.splitlines()]


def numbers(folder):
    """The numbers of the page, and its sentence."""
    story = json.loads((folder / "report.json").read_bytes())
    return story["sentence"], story["facts"], story["data"]


# The file.
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modles": "tiny"}, ": there is no key modles: did you mean models? expected of"),
        ({"models": "tiny\nmodels: tiny"}, ": the key models is there twice"),
        (
            {"models": "[tiny, nowhere]"},
            " (models: nowhere): nowhere: cannot load nowhere",
        ),
        (
            {"models": "[tiny, ./tiny]"},
            " (models): two are called tiny: give one another",
        ),
        ({"models": "\n- tiny\n- model: tiny\n  nmae: x"}, ": there is no key nmae: did you"),
        ({"models": "\n- tiny\n- name: x"}, " (models): expected a name or a place"),
        ({"models": "[]"}, " (models): expected one or more"),
        ({"models": "[tiny"}, ", line 2: expected ',' or ']'"),
        (
            {"texts": "[texts.jsonl, no.jsonl]"},
            " (texts: no): there is no text file no.jsonl",
        ),
        ({"eval_texts": "no.jsonl"}, " (eval_texts): there is no text file no.jsonl"),
        ({"criteria": "[angluar]"}, " (criteria): tiny: unknown criterion 'angluar'"),
        ({"n": "[1, 7]"}, " (n): tiny: cannot drop n = 7 of 6 layers"),
        ({"n": "[0]"}, " (n): n = 0: expected at least 1"),
        ({"states": "[mended]"}, " (states): unknown state 'mended'"),
        ({"heal_steps": "4"}, " (heal_steps): heal_steps without the state healed"),
        (
            {"states": "[healed]", "heal_steps": "0"},
            " (heal_steps): heal_steps = 0: expected",
        ),
        ({"losses": "[0.1, 0]"}, " (losses): expected nats a token above 0"),
        ({"dtype": "float8"}, " (dtype): unknown dtype 'float8'"),
        (
            {"max_length": "0"},
            " (max_length): max_length must be an integer of at least 1",
        ),
        ({"max_texts": "4"}, " (texts: texts): tiny: too few calibration and selection texts"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_is_one_sentence_with_its_key(shallower, changed, message):
    assert f"sweep.yaml{message}" in shallower("sweep", written(**changed), "--out", "out").error
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["", "only words", "- a\n- b"])
def test_a_file_without_keys_is_no_sweep(folder, text):
    (folder / "sweep.yaml").write_text(text)
    with pytest.raises(SettingsError, match="no sweep: expected keys, of models, texts"):
        read_sweep(Path("sweep.yaml"))


def test_a_file_that_is_nested_too_deep_is_refused(folder):
    (folder / "sweep.yaml").write_text("models: " + "[" * 1000)
    with pytest.raises(SettingsError, match=r"cannot read the sweep sweep.yaml: maximum recursion"):
        read_sweep(Path("sweep.yaml"))


def test_places_that_are_read_or_taken_are_not_written_to(here, shallower):
    assert "tiny, which is read" in shallower("sweep", written(), "--out", "tiny/out").error
    (here / "out").mkdir()
    (here / "out" / "sweep.json").write_text("{}")
    assert "out/sweep.json exists already" in shallower("sweep", written(), "--out", "out").error
    with pytest.raises(SettingsError, match="workers = 0"):
        sh.sweep("sweep.yaml", "new", workers=0)


# The jobs.
def test_jobs_share_what_is_dear_and_healings_are_their_own(here):
    write_jsonl(here / "more.jsonl", documents(24, seed=5))
    asked = {"states": "[cut, healed]", "heal_steps": "2", "texts": "[texts.jsonl, more.jsonl]"}
    file = read_sweep(Path(written(**asked)))
    jobs = SweepRun(file, Path("out")).jobs
    kinds = [job.kind for job in jobs if (job.model, job.texts) == ("tiny", "texts")]
    assert kinds == ["compare", "scan", *["curve"] * 4]
    assert len(jobs) == 4 * len(kinds)
    curve = next(job for job in jobs if job.kind == "curve")
    assert "--n 1 --strategies angular --states healed" in curve.command
    assert "--heal-steps 2" in curve.command


def test_a_folder_is_known_by_what_its_job_depends_on_but_the_machine(here, shallower, monkeypatch):
    first = lines_of(shallower)
    monkeypatch.setattr(inputs, "machine", lambda: {"cpu": "another"})
    assert lines_of(shallower) == first
    other = (here / "texts.jsonl").read_text().replace("w1 ", "w2 ")
    (here / "texts.jsonl").write_text(other)
    changed = lines_of(shallower)
    assert not {line[-2] for line in changed} & {line[-2] for line in first}
    assert [line[:2] for line in changed] == [line[:2] for line in first]


@pytest.mark.usefixtures("undrawn")
def test_lines_by_hand_are_the_sweep(here, shallower, monkeypatch):
    lines = lines_of(shallower, models="tiny")
    assert [line[:3] for line in lines] == [
        ["shallower", "compare", "tiny"],
        ["shallower", "scan", "tiny"],
    ]
    assert not (here / "out").exists()
    for words in lines:
        done = shallower(*words[1:])
        assert done.status == 0, done.err
    monkeypatch.setattr(sweeps, "run_job", lambda *_: pytest.fail("all is there"))
    shown = shallower("sweep", "sweep.yaml", "--out", "out", "--dry-run").out
    assert shown.count("is done: ") == 2
    done = shallower("sweep", "sweep.yaml", "--out", "out", "--json")
    assert done.status == 0, done.err
    told = done.json
    assert told["complete"]
    assert [job["state"] for job in told["jobs"]] == ["done", "done"]
    assert {(one["state"], one["loss"]) for one in told["borne"]} == {
        (state, loss) for state in ("cut", "patched") for loss in (0.05, 0.1, 0.2, 0.5)
    }
    assert [start["n"] for start in told["starts"]["tiny"]] == [1, 2, 3, 4, 5]
    rows = json.loads((here / lines[0][-2] / "comparison.json").read_bytes())["rows"]
    cuts = [one for one in told["cuts"] if one["state"] == "cut"]
    assert [cut["share"] for cut in cuts] == [1 / 6, 2 / 6]
    for n, cut in enumerate(cuts, 1):
        assert cut["lost"] == min(row["difference"] for row in rows if row["n"] == n)
    own = [row for row in rows if row["criterion"] == "deepest"]
    mean, bound = told["regrets"]["tiny"]["deepest"]
    assert mean == pytest.approx(sum(row["patched_regret"] for row in own) / 2)
    assert bound == pytest.approx(sum(row["patched_regret_stderr"] for row in own) / 2)
    page = (here / "out" / "report.html").read_text()
    assert "shallower sweep sweep.yaml --out out" in page
    assert str(here) not in page
    before = numbers(here / "out")
    assert shallower("report", "out").status == 0
    assert numbers(here / "out") == before


def test_damaged_results_are_not_done(here, shallower):
    words = lines_of(shallower)[1]
    assert shallower(*words[1:]).status == 0
    (place,) = (here / "out" / "jobs").iterdir()
    (place / "scan.safetensors").write_bytes(b"torn")
    assert "is done" not in shallower("sweep", "sweep.yaml", "--out", "out", "--dry-run").out


# One job.
def job_of(folder, *words):
    return {
        "words": [*words],
        "folder": str(folder),
        "log": "jobs/a/log.txt",
    }


def test_a_job_that_fails_says_its_last_sentence(folder):
    ended = run_job(job_of(folder, "eval", "nowhere", "--texts", "no.jsonl"))
    assert (ended["status"], ended["error"]) == (2, "there is no text file no.jsonl")
    assert "error: there is no text file" in (folder / "jobs/a/log.txt").read_text()
    json.dumps(ended)


def test_a_job_can_be_stopped(folder):
    ended = run_job(job_of(folder, "info"), lambda: True)
    assert (ended["status"], ended["error"]) == (-15, "it was ended by signal 15")


def test_a_job_that_is_at_work_is_waited_for(here, shallower, monkeypatch):
    words = lines_of(shallower)[1]
    assert shallower(*words[1:]).status == 0
    run = SweepRun(read_sweep(here / "sweep.yaml"), Path("out"))
    job = run.jobs[1]
    place = here / "out" / job.folder
    held = place / ".scan.safetensors.partial"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    moved = place.with_name("elsewhere.safetensors")
    (place / "scan.safetensors").rename(moved)

    def finish():
        moved.rename(place / "scan.safetensors")
        os.close(lock)

    def run_job(*_):
        assert (place / "scan.safetensors").exists()
        return {"status": 0, "error": None, "seconds": 0.0}

    monkeypatch.setattr(sweeps, "run_job", run_job)
    Timer(0.3, finish).start()
    outcome = json.loads(OpenedJobs(run._described([job]).described).run(job.name))
    assert run._ended(job, outcome).state == "done"


# All of it, in processes of their own.
def begun(*options):
    command = [sys.executable, "-m", "shallower", "sweep", "sweep.yaml", "--out", "out", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=300):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_goes_on_after_failures_and_kills(here, shallower, models, cache_folder):
    written(models="[tiny, broken, deeper]")
    out = here / "out"
    killed = begun()
    wait_for(lambda: [*out.glob("jobs/compare-tiny-*/log.txt")])
    killed.kill()  # its job is ended
    killed.communicate()
    interrupted = begun("--workers", "2")
    wait_for(lambda: '"done"' in (out / "sweep.json").read_text())
    interrupted.send_signal(signal.SIGINT)
    said = interrupted.communicate()[1]
    assert interrupted.returncode == 130
    assert said.endswith("interrupted: the same command goes on from what is done\n")
    ended = begun("--json")
    told, said = ended.communicate()
    assert ended.returncode == 1, said
    assert "resuming: " in said
    told = json.loads(told)
    failed = {job["name"]: job for job in told["jobs"] if job["state"] == "failed"}
    assert [name.split("-")[:2] for name in failed] == [["compare", "broken"], ["scan", "broken"]]
    for job in failed.values():
        assert job["error"].startswith("cannot load broken: ")
        assert job["error"] in (out / job["log"]).read_text()
        assert job["command"].startswith(f"shallower {job['kind']} broken --texts texts.jsonl ")
    figures = {path.stem for path in (out / "figures").glob("*.svg")}
    assert figures == {
        "loss_over_layers", "share_borne", "heat_map_1", "heat_map_3", "starts_over_depth",
        "regret_by_model",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "the sweep is incomplete: 2 of 6 jobs are not done" in page

    made = {path: path.stat().st_mtime_ns for path in out.glob("jobs/*/log.txt")}
    shutil.copy(models / "twin" / "model.safetensors", here / "broken")
    whole = shallower("sweep", "sweep.yaml", "--out", "out", "--json")
    assert whole.status == 0, whole.err
    assert "resuming: 4 of 6 jobs are done" in whole.err
    kept = [path for path in made if "broken" not in str(path)]
    assert all(path.stat().st_mtime_ns == made[path] for path in kept)

    # The same lines by hand, with a cache of their own, give the same entries and page.
    before, entries = numbers(out), keys(cache_folder)
    lines = shallower("sweep", "sweep.yaml", "--out", "out", "--print-commands").out
    shutil.rmtree(out)
    shutil.rmtree(cache_folder)
    for words in map(shlex.split, lines.splitlines()):
        assert shallower(*words[1:]).status == 0
    again = shallower("sweep", "sweep.yaml", "--out", "out", "--json")
    assert again.status == 0, again.err
    assert "sweep, jobs" not in again.err
    assert numbers(out) == before
    assert keys(cache_folder) <= entries


def keys(cache):
    """The keys of all that was measured."""
    with sqlite3.connect(cache / "store.sqlite") as store:
        return {
            key
            for (key,) in store.execute(
                "SELECT key FROM measurements WHERE kind NOT IN ('hashes', 'output')"
            )
        }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_models_of_which_two_are_real(folder, tiny, passages):
    fitting, held_out = passages
    write_jsonl(folder / "texts.jsonl", fitting[:16])
    write_jsonl(folder / "held_out.jsonl", held_out[:8])
    sh.prune(demo.model_path(), [range(12, 16)], folder / "cut.gguf")
    of = [{"model": str(demo.model_path()), "name": "whole"}, {"model": "cut.gguf", "name": "cut"}]
    written(
        models=json.dumps([*of, str(tiny)]),
        criteria="[angular, block_influence, magnitude, deepest]",
        n="[1, 2, 4]",
        max_length="32",
    )
    done = sh.sweep("sweep.yaml", "out", workers=2)
    assert done.is_complete
    told = json.loads((sh.report("out").with_suffix(".json")).read_bytes())["data"]
    assert [len(told["starts"][name]) for name in ("whole", "cut", "tiny")] == [29, 25, 5]
    lost = {
        (one["model"], one["share"]): one["lost"] for one in told["cuts"] if one["state"] == "cut"
    }
    assert 0 < lost["whole", 1 / 30] < lost["whole", 4 / 30]
    borne = [one for one in told["borne"] if (one["model"], one["state"]) == ("whole", "patched")]
    assert all(0 < one["low"] <= one["share"] <= one["high"] <= 4 / 30 for one in borne)

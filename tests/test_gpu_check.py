"""The check of a GPU, in miniature on the CPU: every step leaves a complete record."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def check(*arguments):
    command = [sys.executable, ROOT / "benches" / "gpu_check.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def numbers(value):
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


def test_a_step_sees_one_gpu_unless_it_is_of_several(monkeypatch):
    """The Trainer of the plain loop would put a copy of the model on each."""
    monkeypatch.syspath_prepend(ROOT / "benches")
    import gpu_check

    seen = "CUDA_VISIBLE_DEVICES"
    monkeypatch.setenv(seen, "2,3")
    assert gpu_check.environment("d", False)[seen] == "2"
    assert gpu_check.environment("i", False)[seen] == "2,3"
    assert gpu_check.environment("i", True)[seen] == ""
    monkeypatch.delenv(seen)
    assert gpu_check.environment("d", False)[seen] == "0"
    assert seen not in gpu_check.environment("i", False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_step_leaves_a_complete_record(tmp_path):
    out = tmp_path / "record.json"
    done = check("--miniature", "--out", out, "--work", tmp_path / "work")
    record = json.loads(out.read_text(), parse_constant=pytest.fail)
    errors = {name: step.get("error") for name, step in record["steps"].items()}
    assert set(errors.values()) == {None}, done.stderr[-4000:]
    assert done.returncode == 0
    assert list(record["steps"]) == list("abcdefghij")
    assert record["card"] is None
    assert record["miniature"]
    assert record["packages"]["torch"]
    for step in record["steps"].values():
        assert step.keys() == {"title", "ok", "date", "commit", "command", "figures", "seconds"}
        assert step["ok"]
        assert all(map(math.isfinite, numbers(step)))
    figures = {name: step["figures"] for name, step in record["steps"].items()}
    assert all(figures.values())
    for found in (*figures["a"].values(), *figures["b"].values()):
        ratio = found.get("throughput_ratio") or found["one_n_over_scan"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert figures["d"]["throughput_ratio"] > 0
    assert figures["i"]["ranks"] == 2
    assert str(tmp_path) not in out.read_text()
    again = check("--miniature", "--only", "f", "--out", out, "--work", tmp_path / "work")
    assert again.returncode == 0, again.stderr[-4000:]


@pytest.mark.slow
def test_a_step_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    out, work = tmp_path / "record.json", tmp_path / "work"
    (work / "7b").mkdir(parents=True)  # where a model should be
    done = check("--miniature", "--only", "c,h", "--out", out, "--work", work)
    assert done.returncode == 1
    steps = json.loads(out.read_text())["steps"]
    assert (steps["c"]["ok"], steps["h"]["ok"]) == (False, True)
    assert "holds no config.json" in steps["c"]["error"]
    assert "(c) patch: FAILED: " in done.stdout
    again = check("--miniature", "--only", "h", "--out", out, "--work", work)
    assert again.returncode == 0
    after = json.loads(out.read_text())["steps"]
    assert after["c"] == steps["c"]


LAUNCHER = """
import signal, subprocess, sys
worker = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
)
signal.signal(signal.SIGTERM, lambda *_: (worker.kill(), worker.wait(), sys.exit(1)))
print(worker.pid, flush=True)
signal.pause()
"""


def test_a_step_that_takes_too_long_leaves_no_worker_behind(monkeypatch):
    """As torchrun starts them, each in a session of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    stop = importlib.import_module("gpu_check").stop
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        worker = int(process.stdout.readline())
        stop(process)
    assert not Path(f"/proc/{worker}").exists()

"""Several processes that heal together: as one does, killed or not."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.commands import Done, in_this_process
from tests.conftest import write_jsonl
from tests.healing.cuts import HELD_OUT, TEXTS

ENVIRONMENT = {
    **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip

TWICE = """
import json, sys
from shallower.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, ended
"""
"""Healings one after the other in the same processes."""

FAILING = """
import os, sys
import shallower as sh
from shallower import cli
from shallower.healing import heal

def fail(*_args, **_options):
    raise sh.ModelError("only the second process fails")

if os.environ["RANK"] == "1":
    heal.add_adapters = fail
cli.main(sys.argv[1:])
"""


def start(*program):
    """Two processes under torchrun."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, program)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill(started):
    """End all at once: torchrun gives every process a session of its own."""
    launcher = psutil.Process(started.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    started.communicate(timeout=30)


def ended(started):
    try:
        out, err = started.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        kill(started)
        raise
    return Done(started.returncode, out, err)


@pytest.fixture(scope="module")
def healing(both, tmp_path_factory):
    """The arguments of a healing with merge, but for its place and its dropout."""
    whole, cut = both
    folder = tmp_path_factory.mktemp("texts")
    texts, held_out = folder / "t.jsonl", folder / "e.jsonl"
    return (
        "heal", cut, "--texts", write_jsonl(texts, TEXTS),
        "--eval-texts", write_jsonl(held_out, HELD_OUT), "--original", whole, "--merge",
        "--dtype", "float32", "--rank", 4, "--max-length", 16, "--steps", 4, "--eval-every", 2,
        "--learning-rate", 0.01,
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(healing, tmp_path_factory):
    """What two processes left that nobody killed, without dropout and with it."""
    folder = tmp_path_factory.mktemp("together")
    script = folder / "twice.py"
    script.write_text(TWICE)
    plain, dropout = (
        [*map(str, healing), "--dropout", share, "--out", str(folder / name)]
        for name, share in (("plain", "0"), ("dropout", "0.2"))
    )
    done = ended(start(script, json.dumps([plain, dropout])))
    assert done.status == 0, done.err
    assert done.out.count("wrote") == 2
    assert done.err == ""
    return folder


def record(path):
    return json.loads((path / "healing.json").read_text())


def nats(path):
    found = record(path)
    losses = [found["original"], *found["held_out"]]
    return [loss["nats"] for loss in losses]


def test_two_processes_heal_as_one_does(together, healing, tmp_path):
    one, two = tmp_path / "one", together / "plain"
    alone = in_this_process(*healing, "--dropout", 0, "--out", one)
    assert alone.status == 0, alone.err
    single, shared = (load_file(path / "model.safetensors") for path in (one, two))
    assert single.keys() == shared.keys()
    for name, value in single.items():
        assert np.abs(value - shared[name]).max() < 2e-4 * max(1, np.abs(value).max())
    # The uncut model and the cut are the same ones, and their texts were shared.
    assert nats(two)[:2] == pytest.approx(nats(one)[:2], abs=1e-6)
    assert nats(two)[2:] == pytest.approx(nats(one)[2:], abs=1e-4)
    assert record(two)["merge"]["difference"] < 1e-5
    assert not list(together.glob(".*"))


def test_two_processes_that_were_killed_end_with_the_same_bits(together, healing, tmp_path):
    command = ("-m", "shallower", *healing, "--dropout", 0.2, "--out", tmp_path / "out")
    started = start(*command)
    began = time.monotonic()
    while not list(tmp_path.glob(".out.partial/folder/training/*/complete")):
        assert started.poll() is None, ended(started).err
        assert time.monotonic() - began < 300
        time.sleep(0.005)
    kill(started)
    assert not (tmp_path / "out").exists()
    done = ended(start(*command))
    assert (done.status, done.err) == (0, "")
    assert done.out.count("wrote") == 1
    for name in ("model.safetensors", "config.json", "README.md", "shallower_plan.json"):
        whole = together / "dropout" / name
        assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes(), name
    one, other = record(tmp_path / "out"), record(together / "dropout")
    for each in (one, other):
        del each["tokens_per_second"]
    assert one == other
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_processes_that_cannot_find_one_another_say_so(healing, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    done = in_this_process(*healing, "--out", tmp_path / "out")
    assert "one of 2 processes, as WORLD_SIZE says, and cannot find the others" in done.err
    assert (done.status, "Start them by torchrun" in done.err) == (2, True)


def test_the_one_process_that_fails_says_why_and_ends_all(healing, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = ended(start(script, *healing, "--out", tmp_path / "out"))
    assert done.status == 1
    said = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert said == ["error: only the second process fails"]
    assert done.err.count("Traceback") == 1, "torchrun has its own"
    assert not (tmp_path / "out").exists()

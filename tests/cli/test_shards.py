"""The commands `scan --shard`, `scan --workers` and `gather`."""

import json
import os
import signal
import subprocess
import time

import pytest

from shallower.runs.shards import NUM_SHARDS
from shallower.scanning.shards import ScannedShard
from tests.commands import SHALLOWER, in_a_process
from tests.conftest import write_jsonl
from tests.documents import documents

SMALL = ["--max-length", 16, "--batch-size", 1]


@pytest.fixture
def many(folder):
    """A file of 80 texts."""
    return write_jsonl(folder / "many.jsonl", documents(80))


@pytest.fixture
def whole(shallower, folder, tiny, many):
    """The bytes of a scan by one process."""
    assert shallower("scan", tiny, "--texts", many, "--out", "whole", *SMALL).status == 0
    return (folder / "whole" / "scan.safetensors").read_bytes()


# By hand.
@pytest.mark.usefixtures("undrawn")
def test_eight_shards_are_gathered_to_the_bytes_of_the_whole(shallower, folder, tiny, many, whole):
    for index in range(8):
        command = ["scan", tiny, "--texts", many, "--out", "shards", *SMALL]
        done = shallower(*command, "--shard", f"{index}/8", "--json").json
        assert done["shard"] == f"{index}/8"
        assert done["batches"] == [10 * index, 10 * index + 10]
        assert (done["num_batches"], done["num_samples"]) == (80, 10)
        assert done["written"] == [f"shards/scan.{index}-of-8.safetensors"]
    done = shallower("gather", "shards", "--out", "gathered", "--json").json
    assert (done["num_samples"], done["written"][0]) == (80, "gathered/scan.safetensors")
    assert (folder / "gathered" / "scan.safetensors").read_bytes() == whole
    jobs = {ScannedShard.load(path).of.job for path in (folder / "shards").iterdir()}
    assert len(jobs) == 1
    assert None not in jobs


@pytest.mark.usefixtures("undrawn")
def test_a_shard_that_is_there_is_not_scanned_again(shallower, folder, tiny, many, monkeypatch):
    command = ["scan", tiny, "--texts", many, "--out", "out", *SMALL, "--shard", "auto"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    first = shallower(*command)
    assert "shard 1/4: batches [20, 40) of 80, 20 samples" in first.out
    place = folder / "out" / "scan.1-of-4.safetensors"
    before = place.stat().st_mtime_ns
    again = shallower(*command)
    assert again.out == first.out
    assert "out/scan.1-of-4.safetensors is already there" in again.err
    assert place.stat().st_mtime_ns == before
    other = shallower(*command, "--metrics", "angular")
    assert "scan.1-of-4.safetensors exists already" in other.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "9/8"], "there is no shard 9/8"),
        (["--shard", "one"], "expected I/N, as 3/64, or auto"),
        (["--shard", "1/8", "--workers", "2"], "a shard is made by one process"),
        (["--shard", "1/8", "--until", "0.99"], "--until is for a scan of one process"),
        (["--workers", "2", "--until", "0.99"], "--until is for a scan of one process"),
    ],
)
def test_shards_that_cannot_be_are_refused(shallower, folder, tiny, jsonl, options, said):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", *options)
    assert said in done.error
    assert not (folder / "out").exists()


def test_gather_refuses_what_is_missing_or_taken(shallower, folder, tiny, jsonl, scans):
    assert "there are no shards in ." in shallower("gather", ".", "--out", "out").error
    command = ["scan", tiny, "--texts", jsonl, "--out", "shards", "--shard"]
    assert shallower(*command, "0/3").status == 0
    done = shallower("gather", "shards", "--out", "out")
    assert done.error == "2 shards of 3 are missing: 1/3, 2/3"
    assert not (folder / "out").exists()
    done = shallower("gather", "shards", "--out", scans / "tiny")
    assert "exists already" in done.error
    assert shallower("plan", "shards/scan.0-of-3.safetensors", "--n", "1", "--out", "p").error


# By workers.
def test_workers_scan_to_the_bytes_of_the_whole(shallower, folder, tiny, many, whole):
    command = ["scan", tiny, "--texts", many, "--out", "out", *SMALL, "--workers", "2"]
    done = shallower(*command, "--json")
    assert done.json["num_samples"] == 80
    assert (folder / "out" / "scan.safetensors").read_bytes() == whole
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"scan.safetensors", "heat_map.png"}
    assert "is already there" in shallower(*command).err


@pytest.mark.slow
def test_a_killed_scan_asks_for_exactly_the_rest(folder, tiny, many, whole):
    out = folder / "out"
    command = ["scan", tiny, "--texts", many, "--out", out, *SMALL, "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([SHALLOWER, *map(str, command)], env=environment)
    while len([*out.glob("scan.*-of-*.safetensors")]) < 5:
        assert started.poll() is None
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    there = [*out.glob("scan.*-of-*.safetensors")]
    assert 5 <= len(there) < NUM_SHARDS
    ended = in_a_process(SHALLOWER, *command, "--json")
    assert ended.status == 0, ended.err
    assert f"goes on: {len(there)} of {NUM_SHARDS} shards were scanned" in ended.err
    assert (out / "scan.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_texts_that_no_worker_can_scan_are_named_and_the_others_are_scanned(
    shallower, folder, tiny, many, whole, monkeypatch
):
    command = ["scan", tiny, "--texts", many, "--out", "out", *SMALL, "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("shallower.runs.scan_shards.OPENER", "tests.runs.counting:PoisonedScan")
        done = shallower(*command)
    assert "the scan is incomplete: 1 of its shards failed 3 times each" in done.error
    assert "shard 7/64 by ValueError: poison" in done.error
    (named,) = json.loads((folder / "out" / "incomplete.json").read_text())
    assert named["shard"] == "7/64"
    assert 0 <= named["texts"][0] < named["texts"][1] <= 80
    assert len(named["errors"]) == 3
    again = shallower(*command, "--json")
    assert again.status == 0
    assert "goes on: 63 of 64 shards were scanned" in again.err
    assert not (folder / "out" / "incomplete.json").exists()
    assert (folder / "out" / "scan.safetensors").read_bytes() == whole

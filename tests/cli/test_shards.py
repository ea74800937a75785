"""The commands `scan --shard`, `scan --workers` and `gather`."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import shallower as sh
from shallower import ModelSource, ProcessesError
from shallower.settings.stages import EvalSettings
from shallower.sharing.eval_work import EvalWork
from shallower.sharing.scan_work import ScanWork
from shallower.sharing.shards import MadeShard
from shallower.sharing.share import open_work
from shallower.sharing.work import NUM_SHARDS, PARTS_FOLDER
from shallower.store.store import Store, open_store
from shallower.studies.evaluate import EvalJob, measures_of
from shallower.studies.scan import ScanJob
from shallower.texts.sources import Texts
from tests.commands import SHALLOWER, in_a_process, in_this_process
from tests.conftest import edited, tiny_llama, write_jsonl
from tests.documents import documents

SMALL = ["--max-length", 16, "--batch-size", 1]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A file of 64 texts."""
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", documents(64))


@pytest.fixture(scope="module")
def whole(many, tiny, kept):
    """The bytes of a scan by one process."""
    out = many.parent / "whole"
    assert in_this_process("scan", tiny, "--texts", many, "--out", out, *SMALL).status == 0
    return (out / "scan.safetensors").read_bytes()


# By hand.
@pytest.mark.usefixtures("undrawn")
def test_shards_are_gathered_to_the_bytes_of_the_whole(shallower, folder, tiny, many, whole):
    for index in range(4):
        command = ["scan", tiny, "--texts", many, "--out", "shards", *SMALL]
        done = shallower(*command, "--shard", f"{index}/4", "--json").json
        assert done["shard"] == f"{index}/4"
        assert done["batches"] == [16 * index, 16 * index + 16]
        assert (done["num_batches"], done["num_samples"]) == (64, 16)
        assert done["written"] == [f"shards/scan.{index}-of-4.json"]
    for _ in range(2):  # the same is written again
        done = shallower("gather", "shards", "--out", "gathered", "--json").json
        assert (done["num_samples"], done["written"][0]) == (64, "gathered/scan.safetensors")
        assert (folder / "gathered" / "scan.safetensors").read_bytes() == whole
    sh.gather([folder / "shards"]).save(folder / "scan")
    assert (folder / "scan").read_bytes() == whole
    (folder / "gathered" / "scan.safetensors").write_bytes(b"another")
    refused = shallower("gather", "shards", "--out", "gathered")
    assert "gathered/scan.safetensors exists already" in refused.error
    jobs = {MadeShard.load(path).job for path in (folder / "shards").iterdir()}
    assert len(jobs) == 1
    assert None not in jobs


@pytest.mark.usefixtures("undrawn")
def test_shards_are_of_weights_and_not_of_a_folder(shallower, folder, words, tiny, many, whole):
    """A copy by another name, without a cache, is the same model; an edited one is not."""
    shutil.copytree(tiny, folder / "copy")
    sh.save_model(edited(tiny_llama()), words, folder / "edited")
    for index, model in ((0, tiny), (1, "copy")):
        command = ["scan", model, "--texts", many, "--out", "shards", *SMALL, "--no-cache"]
        assert shallower(*command, "--shard", f"{index}/2").status == 0
    assert shallower("gather", "shards", "--out", "out").status == 0
    assert (folder / "out" / "scan.safetensors").read_bytes() == whole
    command = ["scan", "edited", *command[2:], "--shard", "1/2"]
    assert "scan.1-of-2.json exists already" in shallower(*command).error
    assert shallower(*command, "--overwrite").status == 0
    assert "their weights differ" in shallower("gather", "shards", "--out", "other").error
    assert not (folder / "other").exists()


# By workers.
@pytest.mark.usefixtures("undrawn")
def test_workers_without_a_cache_go_on_with_their_own_shards(
    shallower, folder, tiny, many, whole, cache_folder, monkeypatch
):
    command = ["scan", tiny, "--texts", many, "--out", "out", *SMALL, "--no-cache"]
    stores = [path for path in cache_folder.rglob("*") if path.suffix == ".sqlite"]
    before = {path: path.read_bytes() for path in stores}
    with monkeypatch.context() as patch:
        patch.setattr("shallower.sharing.share.OPENER", "tests.studies.poisoned:poisoned")
        done = shallower(*command, "--workers", "1")
    assert "the scan is incomplete: 1 of its shards failed 3 times each" in done.error
    done = shallower(*command, "--workers", "1")
    assert "resuming: 63 of 64 shards are done" in done.err
    assert (folder / "out" / "scan.safetensors").read_bytes() == whole
    assert {path.name for path in (folder / "out").iterdir()} == {
        "scan.safetensors",
        "heat_map.png",
    }
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("no_cache", [True, False])
@pytest.mark.parametrize("kind", ["scan", "eval"])
@pytest.mark.parametrize("changed", ["model", "texts"])
def test_workers_open_nothing_but_what_the_driver_has(folder, tiny, many, kind, changed, no_cache):
    shutil.copytree(tiny, folder / "model")
    many = Path(shutil.copy(many, folder))
    store, texts = open_store(no_cache), Texts(str(many))
    source = ModelSource(folder / "model", "float32")
    if kind == "scan":
        work = ScanWork(ScanJob(source=source, texts=texts, out=folder, store=store), workers=1)
    else:
        measures = measures_of(EvalSettings(texts=str(many)), is_shared=True)
        job = EvalJob(source=source, measures=measures, store=store)
        work = EvalWork(job, workers=1)
    described = json.loads(json.dumps(work.described()))
    assert open_work(described).run("0/64")
    place = {"model": folder / "model" / "model.safetensors", "texts": many}[changed]
    with place.open("ab") as file:
        file.write(b'{"text": "w1 w2"}\n')
    with pytest.raises(ProcessesError, match=r"on this node is not that of the driver"):
        open_work(described)


def test_parts_are_held_against_workers_of_a_later_command_and_none_is_lost(
    folder, tiny, many, monkeypatch
):
    def scan():
        job = ScanJob(source=ModelSource(tiny), texts=Texts(str(many)), out=folder / "out")
        return ScanWork(job, workers=1)

    monkeypatch.setattr(ScanJob, "job", "of files that are known")
    with (work := scan()).held():
        work.ready("a", {"common": {"dtype": "float32"}, "texts": {}})
    with (work := scan()).held():
        message = "an earlier worker and b differ in dtype .float32 and bfloat16"
        with pytest.raises(ProcessesError, match=message):
            work.ready("b", {"common": {"dtype": "bfloat16"}, "texts": {}})
        with pytest.raises(sh.OutputError, match=r"has not kept all .*: free its disk"):
            work.finish()


def test_workers_scan_to_the_bytes_of_the_whole(shallower, folder, tiny, many, whole):
    command = ["scan", tiny, "--texts", many, "--out", "out", *SMALL, "--workers", "2"]
    done = shallower(*command, "--json")
    assert done.json["num_samples"] == 64
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
    while num_parts(out) < 5:
        assert started.poll() is None
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    there = num_parts(out)
    assert 5 <= there < NUM_SHARDS
    ended = in_a_process(SHALLOWER, *command, "--json")
    assert ended.status == 0, ended.err
    assert f"resuming: {there} of {NUM_SHARDS} shards are done" in ended.err
    assert (out / "scan.safetensors").read_bytes() == whole


def num_parts(out):
    """The parts that are kept in a folder, beside what all workers have in common."""
    return sum(usage[1] for usage in Store(out / PARTS_FOLDER).usage()) - 1

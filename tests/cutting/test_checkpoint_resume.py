"""A cut that was stopped goes on; damaged checkpoints and full disks are refused."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import shallower as sh
from shallower import ModelError, OutputError, ShallowerError
from shallower.cutting import checkpoint
from shallower.processes import partial_folder
from tests.conftest import mostly_slow
from tests.cutting.checkpoints import (
    DROPPED,
    assert_refused,
    cut_on_disk,
    edit_json,
    read_json,
    stored,
)
from tests.cutting.mixtures import mixture
from tests.folders import full_disk, tree
from tests.scanning.ticks import ticks_beside
from tests.values.damage import damaged


def test_progress_is_told_and_can_stop_the_copy(source, tmp_path):
    heard = []

    def stop(done, total):
        heard.append((done, total))
        if len(heard) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sh.prune(source, DROPPED, out, max_shard_size=10_000, progress=stop)
    assert not out.exists()
    shards = (partial_folder(out) / "folder").glob("model-*.safetensors")
    kept = {path.name: path.stat().st_ino for path in shards}
    heard.clear()
    sh.prune(source, DROPPED, out, max_shard_size=10_000, progress=lambda *args: heard.append(args))
    assert kept
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == heard[-1][1] == sum(len(t.content) for t in stored(out).values())


@pytest.mark.parametrize("progress", [None, False])
def test_a_cut_that_was_stopped_says_where_it_goes_on(source, tmp_path, capfd, progress):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.prune(source, DROPPED, tmp_path / "cut", max_shard_size=10_000, progress=stop)
    there = len(list((partial_folder(tmp_path / "cut") / "folder").glob("model-*.safetensors")))
    sh.prune(source, DROPPED, tmp_path / "cut", max_shard_size=10_000, progress=progress)
    said = capfd.readouterr().err
    of = len(list((tmp_path / "cut").glob("model-*.safetensors"))) + 1  # and their index
    shown = f"resuming: {there} of {of} files of weights are there\n"
    assert (shown in said) == (progress is None)
    assert ("resuming" in said) == (progress is None)


def test_other_threads_run_while_bytes_are_copied(source, tmp_path):
    job = checkpoint.prepare(source, DROPPED, max_shard_size=1000).job
    assert ticks_beside(lambda: job.write(tmp_path)) >= 1


def killed_while_it_cuts(source, out, *, patience, seconds, **cut):
    """Whether a cut in a process of its own was killed, a while after it told of so much work."""
    reading, writing = os.pipe()

    def tell(_done, _total):
        os.write(writing, b".")
        time.sleep(0.001)

    child = os.fork()
    if not child:
        with suppress(BaseException):
            sh.prune(source, out=out, progress=tell, **cut)
        os._exit(0)
    os.close(writing)
    told = 0
    while told < patience and os.read(reading, 1):
        told += 1
    if told == patience:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    return status == -signal.SIGKILL


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A random Mixtral of 8 layers with 6 experts each."""
    folder = tmp_path_factory.mktemp("mixed") / "mixture"
    mixture("mixtral").save_pretrained(folder)
    return folder


CUTS = {
    "source": {"what": DROPPED, "max_shard_size": 4000},
    "mixed": {
        "what": [2],
        "experts": {layer: [1, 4] for layer in range(8) if layer != 2},
        "max_shard_size": 8000,
    },
}


@pytest.mark.filterwarnings("ignore:.* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "seed"), mostly_slow(itertools.product(CUTS, (0, 1)), [("source", 0)])
)
def test_killed_at_any_moment_it_goes_on_and_nothing_is_half_there(name, seed, tmp_path, request):
    source, cut = request.getfixturevalue(name), CUTS[name]
    chance = random.Random(seed)
    out, whole = tmp_path / "cut", tmp_path / "whole"
    sh.prune(source, out=whole, **cut)
    kills = 0
    for attempt in range(1, 200, 2):
        patience, seconds = attempt + chance.randrange(5), chance.random() * 0.004
        kills += killed_while_it_cuts(source, out, patience=patience, seconds=seconds, **cut)
        if out.exists():
            break
    assert kills >= 5
    assert tree(out) == tree(whole)


def test_work_of_another_cut_is_discarded(source, tmp_path):
    out = tmp_path / "cut"

    def stop(done, total):
        if done > total / 2:
            raise InterruptedError

    with pytest.raises(OutputError):
        sh.prune(source, DROPPED, out, max_shard_size=4000, progress=stop)
    assert list((partial_folder(out) / "folder").glob("model-*.safetensors"))
    sh.prune(source, [0], out, max_shard_size=9000)
    sh.prune(source, [0], tmp_path / "whole", max_shard_size=9000)
    assert tree(out) == tree(tmp_path / "whole")


def test_one_process_at_a_time(source, tmp_path):
    out = tmp_path / "cut"

    def nested(done, total):
        with pytest.raises(OutputError, match="is writing it"):
            sh.prune(source, DROPPED, out)

    sh.prune(source, DROPPED, out, progress=nested)


# Damaged and hostile checkpoints.
def drop_tensor(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys() if n != name}  # noqa: SIM118
        save_file(tensors, path, {"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    del index["weight_map"][name]
    edit_json(folder / "model.safetensors.index.json", **index)


HARM = {
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "other weights": (
        lambda f: edit_json(f / "config.json", transformers_weights="x.safetensors"),
        "transformers_weights",
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=7),
        "lacks .*layers.6",
    ),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=5), "also has .*5"),
    "absurdly many layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**12),
        "counts 1000000000000 layers",
    ),
    "lacks a tensor": (
        lambda f: drop_tensor(f, "model.layers.2.mlp.up_proj.weight"),
        "layer 2 lacks the tensor mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_or_hostile_checkpoint_is_refused(copied, tmp_path, harm):
    do, words = HARM[harm]
    do(copied)
    (tmp_path / "out").mkdir()
    assert_refused(ModelError, words, copied, tmp_path / "out" / "cut")


@settings(max_examples=settings.default.max_examples // 2)
@given(st.data())
def test_a_checkpoint_damaged_anyhow_is_refused_or_cut(source, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("damaged")
    folder = shutil.copytree(source, place / "source")
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    path.write_text(json.dumps(data.draw(damaged(read_json(path)))))
    try:
        cut_on_disk(folder, DROPPED, place / "cut")
    except ShallowerError:
        assert not (place / "cut").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(ModelError, "none", tmp_path / "none", tmp_path / "cut")


# Whole or not at all.


@pytest.mark.parametrize("size", [0, "5 bananas", True, "99999999TB"])
def test_sizes_that_are_none_are_refused(source, tmp_path, size):
    assert_refused(OutputError, "size", source, tmp_path / "cut", max_shard_size=size)


def test_a_full_disk_is_told_and_the_work_goes_on(source, tmp_path):
    out = tmp_path / "cut"
    with full_disk(12_000), pytest.raises(OutputError, match="do the same again to go on"):
        sh.prune(source, DROPPED, out, max_shard_size=10_000)
    assert not out.exists()
    assert partial_folder(out).is_dir()
    sh.prune(source, DROPPED, out, max_shard_size=10_000)
    sh.prune(source, DROPPED, tmp_path / "whole", max_shard_size=10_000)
    assert tree(out) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]

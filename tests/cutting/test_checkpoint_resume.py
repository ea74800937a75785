"""A cut that was stopped goes on."""

import itertools
import os
import random
import signal
import time
from contextlib import suppress

import pytest

import shallower as sh
from shallower import OutputError
from shallower.cutting import checkpoint
from shallower.processes import partial_folder
from tests.conftest import mostly_slow
from tests.cutting.checkpoints import DROPPED, stored
from tests.cutting.mixtures import mixture
from tests.folders import tree
from tests.scanning.ticks import ticks_beside


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

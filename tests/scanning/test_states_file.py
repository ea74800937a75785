"""A file of states gives the scan of the array, in constant memory."""

import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import shallower as sh
from shallower import StatesError, analyse_states
from shallower.scanning import states_file
from shallower.scanning.scan_file import scan_bytes
from shallower.scanning.states_file import FORMAT, Origin, StatesFile
from shallower.values.identity import ModelIdentity, TextsIdentity
from shallower.values.plan import Rejection
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import documents
from tests.scanning.state_files import as_numpy, keep, npy, set_buffers, walk, write

ALL = ("angular", "cosine", "relative_l2", "norm_ratio")
DTYPES = ["float16", "float32", "float64", "bfloat16"]


def saved(scan):
    """All that a scan holds, as bytes."""
    return scan_bytes(scan.contents)


@pytest.fixture(params=[1, 100, 1000, 5000, 1 << 20], ids=lambda size: f"buffers of {size}")
def _small_buffers(request, monkeypatch):
    """Buffers that hold less than a sample, a few, and all."""
    set_buffers(monkeypatch, request.param)


# What is read.
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_small_buffers")
def test_a_file_gives_the_scan_of_the_array(tmp_path, suffix, dtype):
    states = walk(dtype=dtype)
    options = {"metrics": ALL, "keep_samples": True, "cka_batch": 4}
    found = analyse_states(write(tmp_path / f"states{suffix}", states), **options)
    expected = analyse_states(states, **options)
    assert saved(found) == saved(expected)
    assert (found.samples() == expected.samples()).all()


@given(
    num_samples=st.integers(1, 40),
    num_states=st.integers(2, 6),
    width=st.integers(1, 40),
    buffer=st.integers(1, 4000),
    most=st.integers(1, 12),
    threads=st.integers(1, 3),
)
def test_any_sizes_give_the_same_bits(
    tmp_path_factory, num_samples, num_states, width, buffer, most, threads
):
    states = walk(num_samples, num_states, width)
    path = write(tmp_path_factory.mktemp("sizes") / "states.npy", states)
    with pytest.MonkeyPatch.context() as patch:
        set_buffers(patch, buffer)
        patch.setattr(states_file, "PART_SAMPLES", most)
        found = analyse_states(path, threads=threads)
    expected = analyse_states(states)
    for value in ("mean", "variance"):
        left, right = getattr(found, value)(), getattr(expected, value)()
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(tmp_path, version):
    states = as_numpy(walk())
    path = tmp_path / "states.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, states, version=version)
    assert (analyse_states(path).mean() == analyse_states(states).mean()).all()
    assert analyse_states(str(path)).num_samples == 23


def test_the_tensor_is_named_or_the_only_one_that_fits(tmp_path):
    path = tmp_path / "states.safetensors"
    left, right = as_numpy(walk(seed=1)), as_numpy(walk(seed=2))
    save_file({"left": left, "bias": left[0, 0]}, path)
    assert (analyse_states(path).mean() == analyse_states(left).mean()).all()
    save_file({"left": left, "right": right}, path)
    for name, states in (("left", left), ("right", right)):
        found = analyse_states(path, tensor=name)
        assert (found.mean() == analyse_states(states).mean()).all()
    with pytest.raises(StatesError, match=r"no tensor hidden_states.*left, right.*--tensor"):
        analyse_states(path)
    with pytest.raises(StatesError, match=r"no tensor middle"):
        analyse_states(path, tensor="middle")
    save_file({"left": left, "hidden_states": right}, path)
    assert (analyse_states(path).mean() == analyse_states(right).mean()).all()


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.usefixtures("_small_buffers")
def test_samples_are_named_as_the_file_numbers_them(tmp_path):
    states = walk()
    states[3, 2] = np.nan
    states[20, 0] = 0
    path = tmp_path / "states.safetensors"
    numbers = torch.arange(23) * 10 + 7
    found = analyse_states(write(path, states, samples=numbers))
    assert [rejection.sample for rejection in found.rejections] == [37, 207]
    assert [r.sample for r in analyse_states(write(path, states)).rejections] == [3, 20]


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_what_the_file_remembers_goes_into_the_scan(tmp_path):
    origin = Origin(
        ModelIdentity('näme "quoted"', "llama", 4, "bfloat16", "0" * 64),
        (TextsIdentity(25, 256, "1" * 64),),
        2,
        (Rejection(4, "empty text"), Rejection(9, "0 tokens")),
    )
    path = tmp_path / "states.safetensors"
    save_file({"hidden_states": as_numpy(walk())}, path, {FORMAT: origin.to_json()})
    with StatesFile(path) as file:
        assert file.origin == origin
    found = analyse_states(path)
    assert (found.model, found.texts) == (origin.model, origin.texts)
    assert (found.num_samples, found.num_rejected) == (23, 2)
    assert found.rejections == origin.rejections
    assert found.plan(2).model == origin.model


@pytest.mark.usefixtures("_small_buffers")
def test_sequences_in_a_file_cluster_its_errors(tmp_path):
    states, numbers = walk(), np.repeat([5, 3, 9, -1, 7], [1, 9, 2, 10, 1])
    path = tmp_path / "states.safetensors"
    write(path, states, sequences=torch.from_numpy(numbers))
    options = {"metrics": ALL, "keep_samples": True}
    found = analyse_states(path, **options)
    expected = analyse_states(states, sequences=numbers, **options)
    assert found.num_sequences == 5
    assert saved(found) == saved(expected)
    each = np.arange(23)
    apart = analyse_states(path, sequences=each, **options)
    expected = analyse_states(states, sequences=each, **options)
    assert saved(apart) == saved(expected)


def test_sequences_that_come_again_are_refused(tmp_path):
    numbers = torch.tensor([*[4] * 11, *[2] * 11, 4])
    path = write(tmp_path / "states.safetensors", walk(), sequences=numbers)
    with pytest.raises(StatesError, match="sequence 4 comes again at sample 22"):
        analyse_states(path)


def test_a_part_is_read_while_the_last_one_is_compared(tmp_path, monkeypatch):
    """The reader is in the second part while the first is still in the caller's hands."""
    set_buffers(monkeypatch, 1000)
    began = threading.Event()
    read = StatesFile._part

    def watched(self, buffer, start, sequences):
        if start:
            began.set()
        return read(self, buffer, start, sequences)

    monkeypatch.setattr(StatesFile, "_part", watched)
    with StatesFile(write(tmp_path / "states.npy", walk())) as file:
        parts = file.parts()
        first = next(parts)
        before = first.states.copy()
        assert began.wait(10)
        assert (first.states == before).all()
        parts.close()


@pytest.mark.parametrize(
    ("threads", "shape", "lengths"),
    [
        (1, (23, 5, 24), [23]),
        (2, (23, 5, 1 << 17), [8, 8, 7]),
        (8, (3, 2, 1 << 23), [1, 1, 1]),
        (1, (70_000, 2, 1), [65_536, 4_464]),
    ],
)
def test_a_part_has_samples_for_every_thread_and_its_bounds(tmp_path, threads, shape, lengths):
    path = tmp_path / "states.npy"
    path.write_bytes(npy(shape)[:-96])
    os.truncate(path, path.stat().st_size + 4 * int(np.prod(shape)))
    with StatesFile(path) as file:
        assert [len(part) for part in file.parts(threads)] == lengths


def test_progress_counts_samples(tmp_path, monkeypatch):
    set_buffers(monkeypatch, 1000)
    seen = []

    @contextmanager
    def track(description, total, show):
        seen.append((description, total, show))
        yield seen.append

    monkeypatch.setattr("shallower.progress.track", track)
    path = write(tmp_path / "states.npy", walk())
    analyse_states(path, progress=True)
    assert seen == [("analyse", 23, True), *[2] * 11, 1]
    seen.clear()
    analyse_states(walk())
    analyse_states(path, progress=False)
    assert seen == []


MEMORY = """
import json, re, sys
from pathlib import Path
import shallower as sh

def peak():  # not of getrusage, which counts the process that forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

sh.analyse_states(sys.argv[1])
before = peak()
scan = sh.analyse_states(sys.argv[2])
print(json.dumps([scan.num_samples, before, peak(), "torch" in sys.modules]))
"""


@pytest.mark.parametrize("suffix", mostly_slow([".npy", ".safetensors"], [".safetensors"]))
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    small = write(tmp_path / f"small{suffix}", walk(2000, 5, 512))
    large = tmp_path / f"large{suffix}"
    states = walk(2000, 5, 512)
    write(large, states.repeat(6, 1, 1))
    assert large.stat().st_size > 120_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, small, large], capture_output=True, text=True, check=True
    )
    num_samples, before, after, torch_loaded = json.loads(done.stdout)
    assert num_samples == 12_000
    assert after - before < 8
    assert after < 150
    assert not torch_loaded


# States of a model.


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize(
    ("buffer", "positions"),
    mostly_slow(
        itertools.product([1, 4000, 1 << 20], ["last", "last:4", "random:3", "random:1", "all"]),
        [(4000, "last"), (4000, "random:3"), (1, "last:4"), (1, "all"), (1 << 20, "random:1")],
    ),
)
def test_positions_and_clusters_of_a_model_are_the_same(
    words, tmp_path, monkeypatch, buffer, positions
):
    set_buffers(monkeypatch, buffer)
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    texts = documents(30)
    texts[7] = ""
    chosen = {"positions": positions, "seed": 3, "batch_size": 4}
    path = keep(tmp_path / "states.safetensors", model, words, texts, **chosen)
    options = {"metrics": ALL, "keep_samples": True, "cka_batch": 8}
    scan = sh.scan(model, words, texts, **chosen, **options)
    again = analyse_states(path, **options)
    assert again.num_rejected > 1
    assert again.rejections == scan.rejections
    assert again.positions == scan.positions
    assert again.num_sequences == scan.num_sequences
    assert saved(again) == saved(scan)

"""States in files: the same scan as in memory, or an error that says what is wrong."""

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from shallower import StatesError, accumulation, analyse_states, states_file
from shallower.artifacts import ModelIdentity, Rejection, TextsIdentity
from shallower.states_file import FORMAT, Origin, StatesFile

ALL = ("angular", "cosine", "relative_l2", "norm_ratio")
DTYPES = ["float16", "float32", "float64", "bfloat16"]


def walk(num_samples=23, num_states=5, width=24, seed=0, dtype="float32"):
    """Residual streams as a torch tensor."""
    chance = np.random.default_rng(seed)
    steps = chance.standard_normal((num_samples, num_states, width)) * 0.3
    steps[:, 0] *= 5
    return torch.from_numpy(steps.cumsum(axis=1)).to(getattr(torch, dtype))


def as_numpy(states):
    return (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()


def write(path, states, **more):
    """The states in a file of the format that the name tells."""
    if path.suffix == ".npy":
        np.save(path, as_numpy(states))
    else:
        save_tensors({"hidden_states": states, **more}, path)
    return path


def saved(scan, path):
    """All that a scan holds, as bytes."""
    scan.save(path)
    return path.read_bytes()


def set_buffers(monkeypatch, size):
    monkeypatch.setattr(states_file, "BUFFER_BYTES", size)
    monkeypatch.setattr(states_file, "MAX_BUFFER_BYTES", size)


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
    assert saved(found, tmp_path / "found") == saved(expected, tmp_path / "expected")
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


def test_a_link_is_followed(tmp_path):
    write(tmp_path / "states.npy", walk())
    (tmp_path / "link.npy").symlink_to(tmp_path / "states.npy")
    assert analyse_states(tmp_path / "link.npy").num_samples == 23


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


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_a_file_of_nothing_but_rejections_keeps_the_first_names_only(tmp_path):
    states = walk(5000, 2, 2)
    states[:-1] = np.nan
    path = write(tmp_path / "states.npy", states)
    found = analyse_states(path)
    assert (found.num_samples, found.num_rejected) == (1, 4999)
    assert [rejection.sample for rejection in found.rejections] == list(range(100))


@pytest.mark.usefixtures("_small_buffers")
def test_sequences_in_a_file_cluster_its_errors(tmp_path):
    states, numbers = walk(), np.repeat([5, 3, 9, -1, 7], [1, 9, 2, 10, 1])
    path = tmp_path / "states.safetensors"
    write(path, states, sequences=torch.from_numpy(numbers))
    options = {"metrics": ALL, "keep_samples": True}
    found = analyse_states(path, **options)
    expected = analyse_states(states, sequences=numbers, **options)
    assert found.num_sequences == 5
    assert saved(found, tmp_path / "found") == saved(expected, tmp_path / "expected")
    each = np.arange(23)
    apart = analyse_states(path, sequences=each, **options)
    expected = analyse_states(states, sequences=each, **options)
    assert saved(apart, tmp_path / "found") == saved(expected, tmp_path / "expected")


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

    def watched(self, buffer, start):
        if start:
            began.set()
        return read(self, buffer, start)

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
        (8, (5, 2, 1 << 23), [1, 1, 1, 1, 1]),
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

    class Bar:
        def __enter__(self):
            return lambda steps: seen.append(steps)

        def __exit__(self, *_):
            seen.append("closed")

    def track(description, total, show):
        seen.append((description, total, show))
        return Bar()

    monkeypatch.setattr("shallower.progress.track", track)
    path = write(tmp_path / "states.npy", walk())
    analyse_states(path, progress=True)
    assert seen == [("analyse", 23, True), *[2] * 11, 1, "closed"]
    seen.clear()
    analyse_states(walk(), progress=True)
    assert seen == [("analyse", 23, True), 23, "closed"]
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


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    small = write(tmp_path / f"small{suffix}", walk(2000, 5, 512))
    large = tmp_path / f"large{suffix}"
    states = walk(2000, 5, 512)
    write(large, states.repeat(15, 1, 1))
    assert large.stat().st_size > 300_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, small, large], capture_output=True, text=True, check=True
    )
    num_samples, before, after, torch_loaded = json.loads(done.stdout)
    assert num_samples == 30_000
    assert after - before < 8
    assert after < 150
    assert not torch_loaded


# What is refused.


def npy(shape=(2, 3, 4), descr="<f4", order=False, length=None, header=None, version=1):
    """A .npy file by hand."""
    if header is None:
        header = repr({"descr": descr, "fortran_order": order, "shape": shape})
    text = header.encode()
    size = 2 if version == 1 else 4
    claimed = len(text) if length is None else length
    prefix = b"\x93NUMPY" + bytes([version, 0]) + claimed.to_bytes(size, "little")
    return prefix + text + bytes(96)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no .npy file"),
        (b"\x93NUMPY\x01", "is no .npy file"),
        (b"PK\x03\x04" + bytes(100), "is no .npy file"),
        (npy(version=4), r"version \(4, 0\)"),
        (npy(length=60_000), "claims 60000 bytes"),
        (npy(length=2**32 - 1, version=2), "claims 4294967295 bytes"),
        (npy((2, 3, 5)), "is truncated: an array of shape .* makes"),
        (npy((2, 3, 3)), "is longer than its header says"),
        (npy((2**62, 2**62, 2**62)), "is truncated"),
        (npy((2, 2**63, 4)), "is truncated"),
        (npy((2, 12)), r"shape \(2, 12\), expected three axes"),
        (npy((24,)), "expected three axes"),
        (npy(()), "expected three axes"),
        (npy((-2, 3, -4)), "broken header: its shape"),
        (npy((True, 6, 4)), "broken header: its shape"),
        (npy((2.0, 3, 4)), "broken header: its shape"),
        (npy([2, 3, 4]), "broken header: its shape"),
        (npy((0, 3, 4)), "is longer"),
        (npy(descr=">f4"), "'>f4': expected little-endian"),
        (npy(descr="|O"), "expected little-endian"),
        (npy(descr="<i4"), "expected little-endian"),
        (npy(descr=[("a", "<f4")]), "expected little-endian"),
        (npy(order=True), "Fortran"),
        (npy(order=1), "Fortran"),
        (npy(header="{'descr': '<f4', 'shape': (2, 3, 4)}"), "broken header"),
        (npy(header="(1, 2)"), "broken header"),
        (npy(header="{" * 3000), "broken header"),
        (npy(header="-" * 4000 + "1"), "broken header"),
        (npy(header="__import__('os').getcwd()"), "broken header"),
        (npy(header="{'descr': 0, 'fortran_order': False, 'shape': (2, 3, 4), 'x': 1}"), "keys"),
    ],
)  # fmt: skip
def test_a_hostile_npy_file_is_refused(tmp_path, content, message):
    path = tmp_path / "states.npy"
    path.write_bytes(content)
    with pytest.raises(StatesError, match=message) as raised:
        analyse_states(path)
    assert str(path) in str(raised.value)


def safetensors(header, data=96, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def tensor(shape=(2, 3, 4), dtype="F32", offsets=(0, 96)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


STATES = {"hidden_states": tensor()}
DEEPER = asdict(ModelIdentity("", "", 9, "", ""))


def described(**origin):
    whole = {"model": None, "texts": [], "num_rejected": 0, "rejections": []}
    whole = {**whole, "positions": None, **origin}
    return {"__metadata__": {FORMAT: json.dumps(whole)}, **STATES}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file: it has 0 bytes"),
        (bytes(8), "truncated or damaged"),
        (safetensors(STATES, length=2**64 - 1), "claims 18446744073709551615 bytes"),
        (safetensors(STATES, length=1000), "claims 1000 bytes"),
        (safetensors(STATES, data=95), "need 96 bytes, it holds 95"),
        (safetensors(STATES, data=97), "need 96 bytes, it holds 97"),
        (safetensors({"hidden_states": tensor(offsets=(0, 2**63))}), "truncated or damaged"),
        (safetensors({"hidden_states": tensor((2**62, 2**62, 4))}), "overflows"),
        (safetensors({"hidden_states": tensor((2, 12))}), "expected three axes"),
        (safetensors({"hidden_states": tensor((2, 3, 4), "I32")}), "dtype I32, expected one of"),
        (safetensors({"hidden_states": tensor((0, 3, 4), offsets=(0, 0))}, 0), "there are none"),
        (safetensors({}, 0), "no tensor hidden_states.*holds none"),
        (safetensors({**STATES, "samples": tensor((3,), "F32", (96, 108))}, 108), "samples is of"),
        (safetensors({**STATES, "sequences": tensor((3,), "I64", (96, 120))}, 120), "sequences is"),
        (safetensors(described(model={"name": "x"})), "damaged"),
        (safetensors(described(positions={"kind": "few", "count": 1, "seed": 0})), "no positions"),
        (safetensors(described(positions="last")), "damaged"),
        (safetensors(described(num_rejected=-1)), "num_rejected is -1"),
        (safetensors(described(num_rejected=2**31)), "num_rejected"),
        (safetensors(described(num_rejected="1")), "damaged"),
        (safetensors(described(texts={"a": 1})), "damaged"),
        (safetensors(described(rejections=[{"sample": "1", "reason": "x"}])), "damaged"),
        (safetensors({"__metadata__": {FORMAT: "[" * 100_000}, **STATES}), "damaged"),
        (safetensors(described(model=DEEPER)), "its model has 9 layers"),
    ],
)  # fmt: skip
def test_a_hostile_safetensors_file_is_refused(tmp_path, content, message):
    path = tmp_path / "states.safetensors"
    path.write_bytes(content)
    with pytest.raises(StatesError, match=message) as raised:
        analyse_states(path)
    assert str(path) in str(raised.value)


WHOLE = {}
for _suffix in (".npy", ".safetensors"):
    _buffer = io.BytesIO()
    if _suffix == ".npy":
        np.save(_buffer, as_numpy(walk(3, 3, 4)))
    WHOLE[_suffix] = (
        _buffer.getvalue() or safetensors(STATES, 0) + as_numpy(walk(2, 3, 4)).tobytes()
    )


@pytest.mark.filterwarnings("ignore")
@given(suffix=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_a_struck_file_is_a_scan_or_an_error_in_words(tmp_path_factory, suffix, data):
    content = bytearray(WHOLE[suffix])
    header = content.index(b"}") + 1
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("struck") / f"states{suffix}"
    path.write_bytes(content)
    try:
        scan = analyse_states(path)
    except StatesError:
        return
    assert scan.num_samples > 0


@given(suffix=st.sampled_from(sorted(WHOLE)), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, suffix, share):
    content = WHOLE[suffix]
    path = tmp_path_factory.mktemp("truncated") / f"states{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StatesError, match=r"truncated|is no|it has"):
        analyse_states(path)


@pytest.mark.parametrize("name", ["none.npy", "none.safetensors", "folder.npy", "pipe.npy"])
def test_what_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(StatesError, match=rf"no states file .*{name}"):
        analyse_states(tmp_path / name)


@pytest.mark.parametrize("name", ["states", "states.pt", "states.npz", "states.NPY"])
def test_another_format_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(WHOLE[".npy"])
    with pytest.raises(StatesError, match=r"expected a file that ends in \.npy or \.safetensors"):
        analyse_states(tmp_path / name)


def test_a_name_of_a_tensor_needs_a_file_that_has_names(tmp_path):
    with pytest.raises(StatesError, match="not the tensor 'x'"):
        analyse_states(write(tmp_path / "states.npy", walk()), tensor="x")
    with pytest.raises(StatesError, match="no tensor 'x' in an array"):
        analyse_states(walk(), tensor="x")


@pytest.mark.parametrize("change", ["shrink", "touch"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, change):
    set_buffers(monkeypatch, 1000)
    path = write(tmp_path / "states.npy", walk())
    add = accumulation.ScanBuilder.add

    def changing(self, states, samples, **more):
        if change == "shrink":
            os.truncate(path, 2000)
        else:
            os.utime(path)
        return add(self, states, samples, **more)

    monkeypatch.setattr(accumulation.ScanBuilder, "add", changing)
    expected = {
        "shrink": "ended early: expected .* at least, it holds 2000",
        "touch": "was changed",
    }[change]
    with pytest.raises(StatesError, match=expected):
        analyse_states(path)


def test_a_sample_that_memory_cannot_hold_is_an_error(tmp_path):
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system promises any amount of memory")
    path = tmp_path / "states.npy"
    width = 1 << 38
    header = npy((1, 2, width), "<f2")[:-96]
    path.write_bytes(header)
    os.truncate(path, len(header) + 4 * width)  # a hole: it takes no room
    with pytest.raises(StatesError, match="more than there is memory for"):
        analyse_states(path)

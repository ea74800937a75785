"""Hostile, damaged and changing files of states."""

import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import StatesError, analyse_states
from shallower.scanning.builder import ScanBuilder
from shallower.scanning.states_file import FORMAT
from shallower.values.identity import ModelIdentity
from tests.scanning.state_files import as_numpy, npy, set_buffers, walk, write


def refuses(path, content, message):
    path.write_bytes(content)
    with pytest.raises(StatesError, match=message) as raised:
        analyse_states(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or is no .npy file.*expected 8 bytes got 0.*numpy.save"),
        (npy(version=4), r"version is \(4, 0\)"),
        (npy(length=2**32 - 1, version=2), "expected 4294967295 bytes"),
        (npy((2, 3, 5)), "is truncated: an array of shape .* makes"),
        (npy((2, 3, 3)), "is longer than its header says"),
        (npy((2, 2**63, 4)), "is truncated"),
        (npy((2, 12)), r"shape \(2, 12\), expected three axes"),
        (npy((-2, 3, -4)), r"shape \(-2, 3, -4\): there are none"),
        (npy((0, 3, 4)), "there are none"),
        (npy(descr=">f4"), "dtype >f4, expected .*little-endian"),
        (npy(descr="<i4"), "expected one of .*little-endian"),
        (npy(order=True), "Fortran"),
        (npy(header="-" * 4000 + "1"), "is no .npy file"),
        (npy(header="__import__('os').getcwd()"), "is no .npy file"),
        (npy(header="{'descr': 0, 'fortran_order': False, 'shape': (2, 3, 4), 'x': 1}"), "keys"),
    ],
)  # fmt: skip
def test_a_hostile_npy_file_is_refused(tmp_path, content, message):
    refuses(tmp_path / "states.npy", content, message)


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
        (b"", "not a safetensors file.*the file has 0"),
        (safetensors(STATES, length=2**64 - 1), "claims 18446744073709551615 bytes"),
        (safetensors(STATES, data=95), "need 96 bytes, it holds 95"),
        (safetensors({"hidden_states": tensor((2, 12))}), "expected three axes"),
        (safetensors({"hidden_states": tensor((2, 3, 4), "I32")}), "dtype I32, expected one of"),
        (safetensors({"hidden_states": tensor((0, 3, 4), offsets=(0, 0))}, 0), "there are none"),
        (safetensors({}, 0), "no tensor hidden_states.*holds none"),
        (safetensors({**STATES, "samples": tensor((3,), "F32", (96, 108))}, 108), "samples is of"),
        (safetensors({**STATES, "sequences": tensor((3,), "I64", (96, 120))}, 120), "sequences is"),
        (safetensors(described(model={"name": "x"})), "damaged"),
        (safetensors(described(positions={"kind": "few", "count": 1, "seed": 0})), "no positions"),
        (safetensors(described(num_rejected=-1)), "num_rejected is -1"),
        (safetensors(described(rejections=[{"sample": "1", "reason": "x"}])), "damaged"),
        (safetensors({"__metadata__": {FORMAT: "[" * 100_000}, **STATES}), "damaged"),
        (safetensors(described(model=DEEPER)), "its model has 9 layers"),
    ],
)  # fmt: skip
def test_a_hostile_safetensors_file_is_refused(tmp_path, content, message):
    refuses(tmp_path / "states.safetensors", content, message)


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
    add = ScanBuilder.add

    def changing(self, states, samples, **more):
        if change == "shrink":
            os.truncate(path, 2000)
        else:
            os.utime(path)
        return add(self, states, samples, **more)

    monkeypatch.setattr(ScanBuilder, "add", changing)
    expected = {
        "shrink": "ended early: it holds 2000 bytes, and held 11168",
        "touch": "changed while it was read; run again",
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

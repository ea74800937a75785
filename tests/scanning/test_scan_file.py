"""The scan's file: every bit comes back, and damage is refused."""

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays

from shallower import (
    OutputError,
    PlanError,
    RejectedSamplesWarning,
    Scan,
    ScanError,
    analyse_states,
)
from shallower.reporting.stories.stages import scan_table
from shallower.scanning.scan_file import FORMAT, scan_bytes
from tests.scanning.samples import (
    BOTH,
    MODEL,
    TEXTS,
    batches,
    bits,
    changed_file,
    closed,
    described,
    load,
    model_of,
    opened,
    random_states,
    scan_of,
    signed,
    stored,
)
from tests.values.damage import damaged, mistyped


# Files
@pytest.fixture
def scan_file(tmp_path):
    """A small scan's path, with a rejection, a model and texts."""
    states = random_states((6, 4, 8), 0)
    states[2, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RejectedSamplesWarning)
        scan_of(states).save(tmp_path / "scan")
    return tmp_path / "scan"


def refused_or_of_use(content):
    """A scan that loads gives means in range, and can be printed, merged and planned."""
    try:
        scan = load(content)
    except ScanError:
        return
    if scan.num_samples:
        for metric in scan.metrics:
            assert np.isfinite(scan.mean(metric)).all()
            assert np.abs(scan.mean(metric)).max() <= 1
            assert not (scan.variance(metric) < 0).any()
        scan_table(scan)
        if scan.num_layers > 1:
            with suppress(PlanError):
                scan.plan(1).check_model(MODEL)
        assert bits(Scan.merge([scan])) == bits(scan)


@given(batches(), st.sampled_from([BOTH, BOTH[::-1], ("angular",), ("cosine",)]))
def test_a_scan_comes_back_to_the_bit(values, metrics):
    scan = scan_of(values, metrics)
    with TemporaryDirectory() as folder:
        scan.save(Path(folder) / "deep" / "scan")
        back = Scan.load(str(Path(folder) / "deep" / "scan"))
    assert bits(back) == bits(scan)
    assert stored(back) == stored(scan)
    assert (back.metrics, back.num_layers) == (metrics, values.shape[1] - 1)
    assert (back.model, back.texts) == (model_of(back.num_layers), (TEXTS,))


@pytest.mark.parametrize("name", ["scan/below", "", "x" * 300])
def test_a_scan_that_cannot_be_written_leaves_nothing(scan_file, name):
    before = scan_file.read_bytes()
    with pytest.raises(OutputError):
        scan_of(random_states((3, 5, 8), 1)).save(scan_file.parent / name)
    assert scan_file.read_bytes() == before
    assert list(scan_file.parent.iterdir()) == [scan_file]


@pytest.mark.parametrize("name", ["absent", "", "x" * 300, "a\0b", "scan/below"])
def test_a_scan_that_is_not_there_is_refused(scan_file, name):
    with pytest.raises(ScanError):
        Scan.load(scan_file.parent / name)


def test_a_truncated_scan_is_refused_at_every_length(scan_file):
    for length in reversed(range(scan_file.stat().st_size)):
        os.truncate(scan_file, length)
        with pytest.raises(ScanError):
            Scan.load(scan_file)


def test_a_scan_with_a_flipped_byte_is_refused_or_of_use(scan_file):
    content = scan_file.read_bytes()
    flips = np.random.default_rng(0).integers(1, 256, len(content))
    for position, flip in enumerate(flips):
        damage = bytearray(content)
        damage[position] ^= int(flip)
        refused_or_of_use(bytes(damage))


@pytest.mark.parametrize("value", [0, 2**63, 2**64 - 1])
def test_a_scan_with_a_word_replaced_is_refused_or_of_use(scan_file, value):
    header, data = opened(scan_file.read_bytes())
    inner = json.loads(header["__metadata__"][FORMAT])
    for position in range(len(data) // 8):
        words = np.frombuffer(data, "<u8").copy()
        words[position] = value
        damage = words.tobytes()
        refused_or_of_use(closed(signed(header, inner, damage), damage))


def test_a_description_with_a_value_of_another_type_is_refused(scan_file):
    """One with a rejection."""
    header, sums = opened(scan_file.read_bytes())
    inner = json.loads(header["__metadata__"][FORMAT])
    del inner["sha256"]  # which is made to fit
    assert inner["rejections"]
    for changed in mistyped(inner, "model", "positions"):
        with pytest.raises(ScanError):
            load(closed(signed(header, changed, sums), sums))


@pytest.mark.parametrize(
    "values",
    [
        {"positions": {"kind": "first", "count": 1, "seed": 0}},
        {"positions": {"kind": "last", "count": 10**400, "seed": 0}},
        {"rejections": [{"sample": 1, "reason": "r", "x": 1}]},
        {"model": {"name": "t", "model_type": "l", "num_layers": 99, "dtype": "d",
                   "fingerprint": "f"}},
    ],
    ids=lambda values: str(values)[:60],
)  # fmt: skip
def test_a_scan_that_describes_itself_wrongly_is_refused(values):
    header, _, data = described(**values)
    with pytest.raises(ScanError):
        load(closed(header, data))


@pytest.mark.parametrize(
    ("version", "way"), [(1, "scan again"), (3, "scan again"), (5, "update shallower")]
)
def test_a_scan_of_another_version_is_refused_in_plain_words(version, way):
    header, inner, data = described()
    header["__metadata__"] = {f"shallower.scan.{version}": json.dumps(inner)}
    with pytest.raises(ScanError, match=f"version {version}, .* reads version 4: {way}"):
        load(closed(header, data))


@pytest.mark.parametrize("key", sorted(described()[1]))
def test_a_scan_that_lacks_something_is_refused(key):
    header, inner, data = described()
    del inner[key]
    if key == "sha256":
        header["__metadata__"] = {FORMAT: json.dumps(inner)}
    else:
        header = signed(header, inner, data)
    with pytest.raises(ScanError):
        load(closed(header, data))


def test_tensors_that_a_scan_has_not_are_refused():
    header, inner, data = described()
    header["more"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    with pytest.raises(ScanError, match="expected"):
        load(closed(signed(header, inner, data + b"\0"), data + b"\0"))


@given(st.data())
def test_a_scan_damaged_anyhow_is_refused_or_of_use(data):
    header, inner, sums = described()
    refused_or_of_use(closed(signed(header, data.draw(damaged(inner)), sums), sums))


@given(st.data())
def test_a_scan_whose_file_header_is_damaged_is_refused_or_of_use(data):
    header, _, sums = described()
    refused_or_of_use(closed(data.draw(damaged(header)), sums))


def _whole(num_samples=30, num_states=5):
    """The file of a scan with CKA and the values of its samples."""
    states = random_states((num_samples, num_states, 9), 0)
    return scan_bytes(analyse_states(states, BOTH, keep_samples=True, cka_batch=8).contents)


def _of(content, name):
    return load_arrays(content)[name]


DAMAGES = {
    "no bytes of CKA": lambda arrays: arrays.update(cka=arrays["cka"][:0]),
    "fewer of CKA": lambda arrays: arrays.update(cka=arrays["cka"][:-8]),
    "many minibatches": lambda arrays: arrays["cka"].put(range(24, 32), 255),
    "CKA of other states": lambda arrays: arrays.update(cka=_of(_whole(30, 4), "cka")),
    "CKA of other samples": lambda arrays: arrays.update(cka=_of(_whole(32), "cka")),
    "NaN": lambda arrays: arrays["angular.samples"].put(7, np.nan),
    "fewer samples": lambda arrays: arrays.update(
        {"angular.samples": arrays["angular.samples"][1:]}
    ),
    "samples of float64": lambda arrays: arrays.update(
        {"angular.samples": arrays["angular.samples"].astype(float)}
    ),
    "samples of one metric": lambda arrays: arrays.pop("angular.samples"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_arrays_that_do_not_fit_are_refused(name):
    with pytest.raises(ScanError):
        load(changed_file(_whole(), lambda _header, arrays: DAMAGES[name](arrays)))


def test_a_file_that_is_changed_in_nothing_is_read():
    assert load(changed_file(_whole(), lambda *_: None)).keeps_samples

"""The same bits in any layout, order, batch and number of threads."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower import (
    RejectedSamplesWarning,
    Scan,
    StatesError,
    TextsIdentity,
    analyse_states,
)
from shallower.scanning.builder import ScanBuilder
from tests.scanning.samples import (
    BOTH,
    DTYPES,
    batches,
    bits,
    random_states,
    rounded,
    scan_of,
    stored,
)
from tests.scanning.ticks import ticks_beside


# The same bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    states, _ = rounded(random_states((97, 6, 130), 1), dtype)
    alone = bits(analyse_states(states, BOTH, threads=1))
    for threads in (2, 4, None):
        assert bits(analyse_states(states, BOTH, threads=threads)) == alone


@st.composite
def views(draw):
    """A view of some array: axes in any order, cut and stepped through either way."""
    axes = draw(st.permutations([0, 1, 2]))
    shape = [draw(st.integers(1, 5)), draw(st.integers(4, 6)), draw(st.integers(1, 40))]
    steps = [draw(st.sampled_from([1, 1, 2, -1, -3])) for _ in range(3)]
    margins = [draw(st.integers(0, 2)) for _ in range(3)]
    whole = [
        size * abs(step) + margin for size, step, margin in zip(shape, steps, margins, strict=True)
    ]
    base = random_states([whole[axis] for axis in axes], draw(st.integers(0, 99)), False)
    base = base.transpose(np.argsort(axes))
    return base[tuple(slice(None, None, step) for step in steps)]


@given(views(), st.sampled_from(["float64", "float32", "float16", "uint16"]))
def test_any_layout_gives_the_same_bits(view, dtype):
    view = view.astype(dtype) if dtype != "uint16" else (view * 99 + 16_000).astype(dtype)
    plain = analyse_states(np.ascontiguousarray(view), BOTH)
    assert bits(analyse_states(view, BOTH)) == bits(plain)


@given(views())
def test_any_layout_of_a_tensor_gives_the_same_bits(view):
    axes = np.argsort([-stride for stride in view.strides])
    base = torch.from_numpy(np.array(view.transpose(axes), order="C"))
    tensor = base.permute(*np.argsort(axes).tolist())
    for states in (tensor, tensor.float(), tensor.bfloat16(), tensor.half()):
        plain = analyse_states(states.contiguous(), BOTH)
        assert bits(analyse_states(states, BOTH)) == bits(plain)


def test_copying_in_small_parts_gives_the_same_bits(monkeypatch):
    states = random_states((40, 4, 20), 3)
    states[[3, 21, 39], 2] = 0
    strided = np.repeat(states, 2, axis=2)[..., ::2]
    with pytest.warns(RejectedSamplesWarning):
        plain = analyse_states(states)
    monkeypatch.setattr("shallower.scanning.analyse.CHUNK_BYTES", 7 * states[0].nbytes)
    with pytest.warns(RejectedSamplesWarning):
        parts = analyse_states(strided)
    assert bits(parts) == bits(plain)
    assert parts.rejections == plain.rejections
    assert [rejection.sample for rejection in parts.rejections] == [3, 21, 39]


def test_a_read_only_file_in_memory_is_read(tmp_path):
    states = random_states((5, 4, 8), 4).astype(np.float16)
    np.save(tmp_path / "states.npy", states)
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    assert bits(analyse_states(mapped)) == bits(analyse_states(states))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2)])
def test_an_array_off_its_alignment_is_read(axes):
    states = random_states((5, 4, 8), 4)
    moved = np.empty(states.nbytes + 1, np.uint8)[1:].view(np.float64).reshape(states.shape)
    moved[:] = states
    assert not moved.flags.aligned
    plain = np.ascontiguousarray(states.transpose(axes))
    assert bits(analyse_states(moved.transpose(axes))) == bits(analyse_states(plain))


def test_the_states_stay_as_they_were():
    states = random_states((5, 4, 8), 4)
    before = states.copy()
    analyse_states(states)
    analyse_states(states[:, ::-1])
    assert np.array_equal(states, before)


@given(batches(min_samples=3), st.data())
def test_shards_merge_to_the_same_bits_in_any_order(values, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values) - 1), min_size=1)))
    shards = [
        scan_of(values[start:stop], texts=(TextsIdentity(stop - start, 256, str(start)),))
        for start, stop in pairwise([0, *cuts, len(values)])
    ]
    whole = Scan.merge([scan_of(values, texts=tuple(t for s in shards for t in s.texts))])
    order = data.draw(st.permutations(shards))
    merged = Scan.merge(order)
    nested = Scan.merge([order[0], Scan.merge(order[1:])])
    assert bits(merged) == bits(nested) == bits(whole)
    assert stored(merged) == stored(nested) == stored(whole)
    assert merged.texts == tuple(texts for scan in order for texts in scan.texts)


def test_merging_leaves_its_parts_as_they_were():
    one, two = (scan_of(random_states((3, 4, 8), seed)) for seed in (1, 2))
    before = bits(one), bits(two)
    Scan.merge([one, two, one])
    assert (bits(one), bits(two)) == before
    assert Scan.merge([one, one]).num_samples == 6


# Threads of Python
def test_other_threads_run_while_states_are_compared():
    states = random_states((12, 257, 512), 0).astype(np.float16).repeat(4, axis=0)
    assert ticks_beside(lambda: analyse_states(states, threads=1)) >= 3


# A scan in the making


def test_a_batch_of_another_depth_is_refused():
    builder = ScanBuilder(4, BOTH)
    with pytest.raises(StatesError, match="4 states"):
        builder.add(random_states((5, 3, 8), 0), range(5))

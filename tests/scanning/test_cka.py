"""Linear CKA: against its slow twin, what leaves it as it is, and where minibatches end."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower import (
    RejectedSamplesWarning,
    Scan,
    ScanError,
    StatesError,
    analyse_states,
)
from shallower.scanning.builder import ScanBuilder
from tests import reference


def walk(num_samples, num_states=5, width=33, seed=0, massive=False):
    """Residual streams; with ``massive`` two channels are nearly the same huge number."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((num_samples, num_states, width)).cumsum(axis=1)
    if massive:
        states[..., [0, width // 2]] = 3000 + 10 * states[..., [0, width // 2]]
    return states


def cka(states, batch=8, threads=None):
    return analyse_states(states, threads=threads, cka_batch=batch).cka


@given(
    st.integers(4, 40), st.integers(2, 6), st.integers(1, 600), st.integers(4, 50),
    st.integers(0, 2**32), st.booleans(),
)  # fmt: skip
def test_equals_the_slow_twin(num_samples, num_states, width, batch, seed, massive):
    states = walk(num_samples, num_states, width, seed, massive)
    found = cka(states, batch)
    np.testing.assert_allclose(found, reference.cka(states, batch), rtol=0, atol=1e-9)
    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diagonal(found), np.ones(num_states))
    assert np.abs(found).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_read(dtype):
    states = torch.from_numpy(walk(30)).to(getattr(torch, dtype))
    expected = reference.cka(states.double().numpy(), 8)
    np.testing.assert_allclose(cka(states), expected, rtol=0, atol=1e-9)
    bits = states.view(torch.uint16) if dtype == "bfloat16" else states
    assert np.array_equal(cka(bits.numpy()), cka(states))


def test_rotations_scales_and_shifts_of_a_layer_change_nothing():
    states = walk(32)
    rng = np.random.default_rng(1)
    turned = np.empty_like(states)
    for layer in range(5):
        rotation, _ = np.linalg.qr(rng.standard_normal((33, 33)))
        turned[:, layer] = 10.0 ** (3 * layer - 5) * states[:, layer] @ rotation + 100 * layer
    np.testing.assert_allclose(cka(turned), cka(states), rtol=0, atol=1e-8)


def test_states_that_never_vary_have_no_cka():
    states = walk(11)
    states[:, 2] = np.random.default_rng(0).standard_normal(33)
    found = cka(states, 5)
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()
    rest = np.delete(np.delete(found, 2, axis=0), 2, axis=1)
    assert np.isfinite(rest).all()


# Minibatches
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_bits(threads):
    states = walk(61, 7, 300)
    assert cka(states, 8, threads).tobytes() == cka(states, 8, 1).tobytes()


@pytest.mark.parametrize("step", [1, 3, 8, 16, 60])
@pytest.mark.parametrize("state_first", [False, True])
def test_where_the_callers_batches_end_does_not_matter(step, state_first):
    states = walk(61)
    builder = ScanBuilder(5, ["angular"], cka_batch=8)
    reused = np.empty((5, step, 33) if state_first else (step, 5, 33))
    for start in range(0, 61, step):
        part = states[start : start + step]
        if len(part) == step:
            reused[:] = part.transpose(1, 0, 2) if state_first else part
            builder.add(reused, range(start, 61), state_first=state_first)
        else:
            last = part.transpose(1, 0, 2) if state_first else part
            builder.add(np.ascontiguousarray(last), range(start, 61), state_first=state_first)
    assert builder.finish().cka.tobytes() == cka(states).tobytes()


def test_rejected_samples_are_in_no_minibatch():
    states = walk(40)
    states[[0, 5, 6, 23], 1] = np.nan
    good = np.delete(states, [0, 5, 6, 23], axis=0)
    with pytest.warns(RejectedSamplesWarning):
        scan = analyse_states(states, cka_batch=8)
    assert scan.cka.tobytes() == cka(good).tobytes()
    with pytest.warns(RejectedSamplesWarning):
        flipped = analyse_states(np.ascontiguousarray(states.transpose(1, 0, 2)).transpose(1, 0, 2),
                                 cka_batch=8)  # fmt: skip
    assert flipped.cka.tobytes() == scan.cka.tobytes()


@pytest.mark.parametrize(("samples", "left_out"), [(16, 0), (17, 1), (19, 3), (20, 0), (23, 0)])
def test_a_last_minibatch_of_fewer_than_four_is_left_out(samples, left_out):
    scan = analyse_states(walk(samples), cka_batch=8)
    assert scan.num_samples - scan.contents.cka.samples == left_out
    used = walk(samples)[: samples - left_out]
    assert scan.cka.tobytes() == cka(used).tobytes()


@pytest.mark.parametrize("samples", [1, 3])
def test_too_few_samples_have_no_cka(samples):
    scan = analyse_states(walk(samples), cka_batch=8)
    assert scan.contents.cka.samples == 0
    with pytest.raises(StatesError, match="at least 4 samples"):
        _ = scan.cka


# Merged, stored
def test_shards_merge_to_the_same_bits_in_any_order():
    states = walk(64)
    states[:16] *= 1e12
    parts = [analyse_states(part, cka_batch=8) for part in np.split(states, [16, 24, 48])]
    whole = cka(states).tobytes()
    assert Scan.merge(parts).cka.tobytes() == whole
    assert Scan.merge(parts[::-1]).cka.tobytes() == whole
    assert Scan.merge([parts[0], Scan.merge(parts[1:])]).cka.tobytes() == whole


def test_a_scan_comes_back_with_its_cka(tmp_path):
    scan = analyse_states(walk(30), cka_batch=8, keep_samples=True)
    scan.save(tmp_path / "scan")
    back = Scan.load(tmp_path / "scan")
    assert back.cka.tobytes() == scan.cka.tobytes()
    assert back.contents.cka.samples == scan.contents.cka.samples
    back.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "scan").read_bytes()


def test_scans_without_cka_say_how_to_get_it():
    scan, with_cka = analyse_states(walk(30)), analyse_states(walk(30), cka_batch=8)
    for one in (scan, Scan.merge([scan, with_cka])):
        with pytest.raises(ScanError, match="cka_batch=64"):
            _ = one.cka
    with pytest.raises(ScanError, match="minibatches"):
        Scan.merge([with_cka, analyse_states(walk(30), cka_batch=9)])


@pytest.mark.parametrize("batch", [0, 3, -1, 1025, 10**30, 8.0, "8", True])
def test_minibatches_of_other_sizes_are_refused(batch):
    with pytest.raises(StatesError, match="expected an integer, 4 to 1024"):
        analyse_states(walk(30), cka_batch=batch)


def test_a_scan_of_a_model_has_cka(llama, words, tmp_path):
    texts = [f"w{i} w{3 * i + 1} w{2 * i}" for i in range(20)]
    scan = sh.scan(llama, words, texts, cka_batch=8, batch_size=3)
    assert scan.cka.shape == (7, 7)
    assert scan.contents.cka.samples == scan.num_samples
    assert scan.cka[0, 6] < scan.cka[5, 6] < 1
    with pytest.raises(ScanError, match="leave out one"):
        sh.scan(llama, words, texts, cka_batch=8, checkpoint=tmp_path / "part")

"""The scan: against slow twins, against itself in other orders, and against broken input."""

import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shallower import (
    LayersError,
    MetricError,
    ModelIdentity,
    OutputError,
    PlanError,
    RejectedSamplesWarning,
    Rejection,
    Scan,
    ScanError,
    StatesError,
    TextsIdentity,
    ThreadsError,
    TierError,
    _core,
    _reference,
    analyse_states,
)
from shallower.accumulation import ScanBuilder
from shallower.report import scan_table
from shallower.similarity import FORMAT, NORMS, _digest
from test_artifacts import JSON, damaged

ANGULAR_TOLERANCE = 1e-7
BOTH = ("angular", "cosine")
ALL = (*BOTH, "relative_l2", "norm_ratio")
TIERS = _core.tiers()
DTYPES = ["float32", "float16", "bfloat16", "bfloat16 bits", "float64"]
TEXTS = TextsIdentity(24, 256, "0" * 64)


def tolerance(metric, dtype, values):
    """What a mean may err by: bfloat16 is multiplied in float32, the metrics of norms are
    rounded to multiples of 2**-32 and grow with the ratio of the norms."""
    if metric in BOTH:
        return 1e-12 if metric == "cosine" and not dtype.startswith("bf") else ANGULAR_TOLERANCE
    return 4 * ANGULAR_TOLERANCE * max(1, values.max())


@pytest.fixture(params=[name for name, _ in TIERS])
def tier(request, monkeypatch):
    """Forces each tier in turn; what this machine lacks is skipped by name."""
    if not dict(TIERS)[request.param]:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("SHALLOWER_TIER", request.param)
    return request.param


def model_of(num_layers, fingerprint="f" * 64):
    return ModelIdentity("tiny", "llama", num_layers, "bfloat16", fingerprint)


MODEL = model_of(3)


def rounded(values, dtype):
    """What the core is given in ``dtype``, and the same numbers in float64."""
    if not dtype.startswith("bfloat16"):
        states = values.astype(dtype)
        return states, states.astype(np.float64)
    states = torch.from_numpy(values).to(torch.bfloat16)
    exact = states.double().numpy()
    return (states.view(torch.uint16).numpy() if dtype.endswith("bits") else states), exact


def random_states(shape, seed, outliers=False):
    """Normal values; with ``outliers`` two channels are a thousand times larger."""
    states = np.random.default_rng(seed).standard_normal(shape)
    if outliers:
        states[..., [0, shape[-1] // 2]] *= 1000
    return states


def rows_at(distance, width, outliers, seed=0):
    """Two rows of different lengths at an angular distance, (1, 2, width)."""
    first, other = random_states((width,), seed, outliers), random_states((width,), seed + 1)
    first /= np.linalg.norm(first)
    other -= (other @ first) * first
    other /= np.linalg.norm(other)
    second = np.cos(np.pi * distance) * first + np.sin(np.pi * distance) * other
    return np.stack([first * np.sqrt(width), second * np.sqrt(width) * 3])[None]


def fifty_digits(sample):
    """Angular distances and cosines of one sample's rows, in 50-digit arithmetic."""
    size = len(sample)
    angular, cosine = np.zeros((size, size)), np.ones((size, size))
    with mpmath.workdps(50):
        rows = [[mpmath.mpf(float(value)) for value in row] for row in sample]
        norms = [mpmath.sqrt(mpmath.fdot(row, row)) for row in rows]
        for first in range(size):
            for second in range(first):
                value = mpmath.fdot(rows[first], rows[second]) / norms[first] / norms[second]
                value = max(-1, min(1, value))
                cosine[first, second] = cosine[second, first] = value
                angle = mpmath.acos(value) / mpmath.pi
                angular[first, second] = angular[second, first] = angle
    return {"angular": angular, "cosine": cosine}


def bits(scan):
    """The bytes of every number that a scan gives."""
    return [
        values.tobytes()
        for metric in scan.metrics
        for values in (scan.mean(metric), scan.variance(metric), scan.stderr(metric))
    ]


def stored(scan):
    """The sums of a scan as they are saved, and its header without the parts' order."""
    with TemporaryDirectory() as folder:
        scan.save(Path(folder) / "scan")
        header, sums = opened((Path(folder) / "scan").read_bytes())
    described = json.loads(header.pop("__metadata__")[FORMAT])
    del described["sha256"]
    for key in ("rejections", "texts"):
        described[key] = sorted(described[key], key=str)
    return header, described, sums


def opened(content):
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def closed(header, data):
    """The inverse of ``opened``."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def scan_of(states, metrics=BOTH, model="of that depth", texts=(TEXTS,)):
    """A scan that remembers a model and texts."""
    if model == "of that depth":
        model = model_of(states.shape[1] - 1)
    builder = ScanBuilder(states.shape[1], metrics, model=model)
    builder.add(states, range(len(states)))
    return builder.finish(texts)


@st.composite
def batches(draw, min_samples=1):
    """Shapes (samples, L+1, D), and what the states hold."""
    shape = (
        draw(st.integers(min_samples, 6)),
        draw(st.integers(2, 6)),
        draw(st.sampled_from([1, 2, 7, 8, 9, 33, 511, 512, 513, 700])),
    )
    return random_states(shape, draw(st.integers(0, 2**32)), draw(st.booleans()))


# Against slow twins


@pytest.mark.parametrize("dtype", DTYPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=batches(min_samples=2))
def test_equals_the_slow_twin(tier, dtype, values):
    states, exact = rounded(values, dtype)
    scan = analyse_states(states, ALL)
    for metric in ALL:
        mean, stderr = _reference.mean_and_stderr(exact, metric)
        allowed = tolerance(metric, dtype, mean)
        np.testing.assert_allclose(scan.mean(metric), mean, rtol=0, atol=allowed)
        np.testing.assert_allclose(scan.stderr(metric), stderr, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_equals_fifty_digits_on_random_rows(tier, dtype, outliers):
    states, exact = rounded(random_states((1, 4, 601), 7, outliers), dtype)
    scan, expected = analyse_states(states, BOTH), fifty_digits(exact[0])
    for metric in BOTH:
        error = np.abs(scan.mean(metric) - expected[metric]).max()
        assert error < tolerance(metric, dtype, expected[metric])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("distance", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5, 1 - 1e-6])
def test_equals_fifty_digits_on_rows_at_a_distance(tier, dtype, outliers, distance):
    states, exact = rounded(rows_at(distance, 601, outliers), dtype)
    expected = fifty_digits(exact[0])["angular"]
    assert np.abs(analyse_states(states).mean() - expected).max() < ANGULAR_TOLERANCE
    if dtype == "float64":
        assert abs(expected[0, 1] - distance) < 1e-12


def test_a_tier_is_chosen_and_can_be_forced(tier):
    assert _core.tier() == tier


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_tier_is_refused(monkeypatch, name):
    monkeypatch.setenv("SHALLOWER_TIER", name)
    has = ", ".join(tier for tier, available in TIERS if available)
    with pytest.raises(TierError, match=f"unknown tier {name!r}.*has {has}".replace("'", '"')):
        analyse_states(random_states((2, 3, 4), 0))


def test_a_tier_that_the_machine_lacks_is_refused(monkeypatch):
    for name in (name for name, available in TIERS if not available):
        monkeypatch.setenv("SHALLOWER_TIER", name)
        with pytest.raises(TierError, match=f"cannot run tier {name}: it has scalar"):
            analyse_states(random_states((2, 3, 4), 0))


@given(values=batches(min_samples=2))
def test_the_norms_equal_the_slow_twins_and_are_kept(values):
    states, exact = rounded(values, "bfloat16")
    scan = scan_of(states)
    np.testing.assert_allclose(scan.norms(), _reference.norms(exact), rtol=1e-7)
    halves = [scan_of(states[part]) for part in (slice(1, None), slice(None, 1))]
    with TemporaryDirectory() as folder:
        scan.save(Path(folder) / "scan")
        kept = Scan.load(Path(folder) / "scan")
    assert kept.norms().tobytes() == scan.norms().tobytes() == Scan.merge(halves).norms().tobytes()


def test_the_metrics_of_norms_are_of_the_later_state_over_the_earlier():
    scan = analyse_states(np.array([[[3.0, 4], [0, 10], [0, 1]]]), ALL)
    assert scan.mean("norm_ratio")[0].tolist() == [1, 2, pytest.approx(0.2, abs=1e-9)]
    change = [0, np.sqrt(45) / 5, np.sqrt(18) / 5]
    assert scan.mean("relative_l2")[0] == pytest.approx(change, abs=1e-9)
    assert np.array_equal(scan.mean("relative_l2"), scan.mean("relative_l2").T)
    assert scan.best_block(1, "relative_l2").start == 1
    with pytest.raises(MetricError, match="norm_ratio does not say how alike"):
        scan.best_block(1, "norm_ratio")


def test_norms_too_far_apart_for_the_sums_are_rejected():
    states = np.array([[[1.0, 0], [70_000, 0]], [[1, 0], [2, 0]]])
    assert analyse_states(states).num_rejected == 0
    with pytest.warns(RejectedSamplesWarning, match="65535 times the norm of an earlier state"):
        scan = analyse_states(states, ["norm_ratio"])
    assert scan.num_samples == 1
    assert scan.mean("norm_ratio")[0, 1] == 2


def test_the_mean_is_of_angles_and_not_the_angle_of_the_mean():
    states = np.array([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]], [[1, 0], [-1, 0]]])
    scan = analyse_states(states, BOTH)
    assert scan.mean()[0, 1] == 0.5
    assert scan.mean("cosine")[0, 1] == 0
    assert scan.variance()[0, 1] == 0.25
    assert scan.variance("cosine")[0, 1] == 1


@given(batches())
def test_equal_and_opposite_directions_are_exact(values):
    first = values[:, :1]
    states = np.concatenate([first, first, 4 * first, -first, -0.5 * first], axis=1)
    scan = analyse_states(states, BOTH)
    side = np.array([1, 1, 1, -1, -1])
    cosine = np.outer(side, side)
    assert np.array_equal(scan.mean("cosine"), cosine)
    assert np.array_equal(scan.mean(), (1 - cosine) / 2)


@given(batches())
def test_the_mean_is_symmetric_and_in_range(values):
    scan = analyse_states(values, BOTH)
    for metric, diagonal, least in (("angular", 0, 0), ("cosine", 1, -1)):
        mean = scan.mean(metric)
        assert mean.dtype == np.float64
        assert mean.flags.writeable
        assert np.array_equal(mean, mean.T)
        assert np.array_equal(np.diagonal(mean), np.full(len(mean), diagonal))
        assert mean.min() >= least
        assert mean.max() <= 1
        assert np.array_equal(scan.stderr(metric), scan.stderr(metric).T, equal_nan=True)


def test_one_sample_has_no_standard_error():
    scan = analyse_states(random_states((1, 4, 8), 0), BOTH)
    for metric in BOTH:
        assert np.isnan(scan.variance(metric)).all()
        assert np.isnan(scan.stderr(metric)).all()
    assert np.isnan(scan.best_block(2).stderr)


@pytest.mark.parametrize("samples", [2, 3, 7, 100])
def test_a_sample_repeated_has_no_error_at_all(samples):
    states = np.repeat(random_states((1, 5, 33), 3), samples, axis=0)
    scan = analyse_states(states, BOTH)
    assert not scan.stderr().any()
    assert not scan.stderr("cosine").any()
    assert np.array_equal(scan.mean(), analyse_states(states[:1]).mean())


def test_the_standard_error_of_tiny_differences_keeps_its_digits():
    distances = 0.1 + 1e-6 * np.random.default_rng(5).standard_normal(50)
    states = np.concatenate([rows_at(distance, 65, outliers=False) for distance in distances])
    _, expected = _reference.mean_and_stderr(states, "angular")
    assert analyse_states(states).stderr()[0, 1] == pytest.approx(expected[0, 1], rel=1e-6)


# The same bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    states, _ = rounded(random_states((97, 6, 130), 1), dtype)
    alone = bits(analyse_states(states, BOTH, threads=1))
    for threads in (2, 4, None):
        assert bits(analyse_states(states, BOTH, threads)) == alone


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


def test_state_first_gives_the_same_bits_as_sample_first():
    states = random_states((5, 7, 33), 2).astype(np.float32)
    state_first = np.ascontiguousarray(states.transpose(1, 0, 2))
    plain = bits(analyse_states(states, BOTH))
    assert bits(analyse_states(state_first.transpose(1, 0, 2), BOTH)) == plain
    builder = ScanBuilder(7, BOTH)
    builder.add(state_first, range(5), state_first=True)
    assert bits(builder.finish()) == plain


def test_copying_in_small_parts_gives_the_same_bits(monkeypatch):
    states = random_states((40, 4, 20), 3)
    states[[3, 21, 39], 2] = 0
    strided = np.repeat(states, 2, axis=2)[..., ::2]
    with pytest.warns(RejectedSamplesWarning):
        plain = analyse_states(states)
    monkeypatch.setattr("shallower.accumulation.CHUNK_BYTES", 7 * states[0].nbytes)
    with pytest.warns(RejectedSamplesWarning):
        parts = analyse_states(strided)
    assert bits(parts) == bits(plain)
    assert parts.rejections == plain.rejections
    assert [rejection.sample for rejection in parts.rejections] == [3, 21, 39]


def test_a_row_repeated_by_a_stride_of_zero_is_read():
    states = np.broadcast_to(random_states((1, 4, 8), 4), (5, 4, 8))
    assert bits(analyse_states(states)) == bits(analyse_states(states.copy()))


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


def test_a_tensor_that_asks_for_gradients_is_read():
    tensor = torch.ones(3, 4, 8, requires_grad=True)
    assert analyse_states(tensor).num_samples == 3


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
    states = random_states((12, 257, 512), 0).astype(np.float16).repeat(10, axis=0)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    analyse_states(states, threads=1)
    end = time.perf_counter()
    done.set()
    ticker.join()
    margin = (end - begin) / 5
    within = sum(begin + margin < moment < end - margin for moment in ticks)
    assert within >= 3, f"{within} ticks in {end - begin:.3f} s"


def test_python_threads_can_compare_at_once():
    states = random_states((20, 9, 64), 0)
    expected, found = bits(analyse_states(states)), []

    def compare():
        found.append(bits(analyse_states(states, threads=2)))

    workers = [threading.Thread(target=compare) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 8


# The best block


@given(batches())
def test_the_best_block_joins_the_pair_that_was_scored(values):
    assume(values.shape[1] > 2)
    scan = analyse_states(values, BOTH)
    for metric in BOTH:
        mean = scan.mean(metric)
        cost = -mean if metric == "cosine" else mean
        for n in range(1, scan.num_layers):
            block = scan.best_block(n, metric)
            assert block.start == _reference.best_start(cost, n)
            assert len(block) == n
            joined = mean[block.start, block.stop]
            assert block.score == (1 - joined if metric == "cosine" else joined)
            error = scan.stderr(metric)[block.start, block.stop]
            assert np.array_equal(block.stderr, error, equal_nan=True)


@pytest.mark.parametrize("metric", BOTH)
def test_of_equal_blocks_the_first_is_best(metric):
    rows = random_states((2, 8), 5)
    scan = analyse_states(np.stack([np.concatenate([rows, rows, rows])] * 3), BOTH)
    assert [scan.best_block(n, metric).start for n in range(1, 5)] == [0, 0, 0, 0]
    equal = analyse_states(np.ones((3, 7, 8)), BOTH)
    assert [equal.best_block(n, metric).start for n in range(1, 6)] == [0] * 5
    assert equal.best_block(3, metric).score == 0


@pytest.mark.parametrize("start", range(5))
def test_the_best_block_can_lie_anywhere(start):
    states = random_states((3, 7, 64), 6)
    states[:, start + 2] = states[:, start]
    scan = analyse_states(states, BOTH)
    for metric in BOTH:
        block = scan.best_block(2, metric)
        assert (block.start, block.stop, block.score) == (start, start + 2, 0)


def test_the_first_held_metric_decides_if_there_is_no_angle():
    states = random_states((3, 7, 8), 6)
    scan = analyse_states(states, ["cosine"])
    assert scan.best_block(2).score == scan.best_block(2, "cosine").score
    assert scan.plan(2).metric == "cosine"
    assert analyse_states(states, ["cosine", "angular"]).plan(2).metric == "angular"


@pytest.mark.parametrize("n", [0, -1, 6, 7, 100, 2**31, 2**63, 10**30, -(10**30)])
def test_a_block_of_no_layer_or_of_all_is_refused(n):
    scan = analyse_states(random_states((2, 7, 4), 0), BOTH)
    with pytest.raises(LayersError):
        scan.best_block(n)
    with pytest.raises(LayersError):
        scan.plan(n, "cosine")


@pytest.mark.parametrize(
    "n", [True, False, np.True_, 1.0, 2.5, np.float64(2), "2", None, [2], np.array([1, 2])]
)
def test_a_block_needs_an_integer_size(n):
    with pytest.raises(LayersError):
        analyse_states(random_states((2, 7, 4), 0)).best_block(n)


@pytest.mark.parametrize("n", [np.int64(2), np.uint8(2), torch.tensor(2)])
def test_any_kind_of_integer_is_a_size(n):
    scan = analyse_states(random_states((2, 7, 4), 0))
    assert scan.best_block(n) == scan.best_block(2)


def test_a_model_of_one_layer_has_no_block_to_drop():
    with pytest.raises(LayersError):
        analyse_states(random_states((2, 2, 4), 0)).best_block(1)


def test_a_plan_drops_the_best_block_and_remembers_the_model():
    scan = scan_of(random_states((5, 4, 8), 0))
    plan = scan.plan(2)
    assert plan.blocks == (scan.best_block(2),)
    assert plan.blocks[0].score == scan.best_block(2).score
    assert (plan.num_layers, plan.strategy, plan.metric) == (3, "similarity", "angular")
    assert (plan.model, plan.texts) == (MODEL, (TEXTS,))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_metric_that_is_not_held_is_refused(metric):
    scan = analyse_states(random_states((5, 4, 8), 0))
    for ask in (scan.mean, scan.variance, scan.stderr):
        with pytest.raises(MetricError, match=metric):
            ask(metric)
    with pytest.raises(MetricError):
        scan.best_block(1, metric)
    with pytest.raises(MetricError):
        scan.plan(1, metric)


# Samples that cannot be compared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.nan, "holds NaN or infinity"), (np.inf, "holds NaN or infinity"),
        (-np.inf, "holds NaN or infinity"), (0.0, "is a zero vector"), (-0.0, "is a zero vector"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", [0, 2, 4])
def test_a_bad_sample_is_named_and_enters_no_sum(dtype, bad, reason, state):
    values = random_states((7, 5, 600), 8)
    values[3, state] = bad
    states, _ = rounded(values, dtype)
    good, _ = rounded(np.delete(values, 3, axis=0), dtype)
    with pytest.warns(RejectedSamplesWarning, match="1 of 7") as warned:
        scan = analyse_states(states, BOTH)
    assert warned[0].filename == __file__
    assert scan.rejections == (Rejection(3, f"state {state} {reason}"),)
    assert (scan.num_samples, scan.num_rejected) == (6, 1)
    assert bits(scan) == bits(analyse_states(good, BOTH))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("channel", [0, 511, 512, 599])
def test_one_bad_channel_is_enough(bad, channel):
    states = random_states((3, 4, 600), 8)
    states[1, 2, channel] = bad
    with pytest.warns(RejectedSamplesWarning):
        scan = analyse_states(states)
    assert scan.rejections == (Rejection(1, "state 2 holds NaN or infinity"),)


@pytest.mark.parametrize("scale", [1e-80, 1e-200, 1e80, 1e200])
def test_a_norm_beyond_double_precision_is_rejected(scale):
    states = random_states((3, 4, 8), 8)
    states[1, 2] *= scale
    with pytest.warns(RejectedSamplesWarning, match="norm"):
        scan = analyse_states(states)
    assert [rejection.sample for rejection in scan.rejections] == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_smallest_and_the_largest_numbers_are_compared(dtype):
    info = torch.finfo(getattr(torch, dtype))
    signs = np.where(random_states((2, 3, 8), 9) > 0, 1.0, -1.0)
    for scale in (info.smallest_normal, info.tiny / 4, info.max):
        states, exact = rounded(signs * scale, dtype)
        expected, _ = _reference.mean_and_stderr(exact, "angular")
        np.testing.assert_allclose(analyse_states(states).mean(), expected, rtol=0, atol=1e-7)


def test_the_first_bad_state_of_every_bad_sample_is_named_in_order():
    states = random_states((60, 6, 8), 8)
    states[10, 4], states[10, 2] = np.nan, 0
    states[5, 1], states[59, 5] = 0, np.inf
    with pytest.warns(RejectedSamplesWarning, match="3 of 60"):
        scan = analyse_states(states, threads=4)
    assert [str(rejection) for rejection in scan.rejections] == [
        "sample 5: state 1 is a zero vector",
        "sample 10: state 2 is a zero vector",
        "sample 59: state 5 holds NaN or infinity",
    ]


def test_many_bad_samples_are_counted_and_the_first_hundred_named():
    states = random_states((300, 3, 4), 8)
    states[::2, 1] = 0
    with pytest.warns(RejectedSamplesWarning, match="150 of 300"):
        scan = analyse_states(states)
    assert (scan.num_samples, scan.num_rejected) == (150, 150)
    assert [rejection.sample for rejection in scan.rejections] == list(range(0, 200, 2))


@pytest.mark.parametrize("threads", [1, 4])
def test_samples_that_are_all_bad_are_an_error(threads):
    states = random_states((9, 3, 4), 8)
    states[:, 1, 2] = np.nan
    with pytest.raises(StatesError, match=r"9 of 9 .*sample 0: state 1 holds NaN"):
        analyse_states(states, threads=threads)


# Input that is no states


@pytest.mark.parametrize(
    "shape",
    [
        (), (4,), (3, 4), (2, 3, 4, 5), (0, 3, 4), (0, 0, 0), (3, 0, 4), (3, 1, 4), (3, 4, 0),
        (0, 1, 4), (0, 10**9, 4), (0, 2**33, 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_states_of_another_shape_are_refused(shape, make):
    with pytest.raises(StatesError):
        analyse_states(make(shape))


@pytest.mark.parametrize(
    "dtype",
    [
        "int64", "int32", "int16", "int8", "uint8", "uint32", "uint64", "bool", "complex64",
        "complex128", "longdouble", "object", "U3", "S3", "V4", "M8[s]", ">f4", ">f8", ">f2",
        ">u2", [("x", "f4")],
    ],
    ids=str,
)  # fmt: skip
def test_arrays_of_another_dtype_are_refused(dtype):
    with pytest.raises(StatesError, match="dtype"):
        analyse_states(np.zeros((2, 3, 4), dtype))
    with pytest.raises(StatesError, match="dtype"):
        analyse_states(np.zeros((2, 3, 8), dtype)[..., ::2])


@pytest.mark.parametrize(
    "dtype",
    ["int64", "int16", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"],
)
def test_tensors_of_another_dtype_are_refused(dtype):
    with pytest.raises(StatesError):
        analyse_states(torch.ones(2, 3, 4).to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3, 4, device="meta"),
        torch.ones(2, 3, 4).to_sparse(),
        torch.ones(2, 3, 4, dtype=torch.complex64).conj(),
    ],
    ids=["meta", "sparse", "conjugate"],
)
def test_tensors_that_hold_no_plain_numbers_are_refused(tensor):
    with pytest.raises(StatesError):
        analyse_states(tensor)


@pytest.mark.parametrize(
    "states",
    [None, [[[1.0, 2.0]]], 5, b"states", np.float32(1), iter([]), torch.Size([2, 3, 4])],
    ids=lambda states: type(states).__name__,
)
def test_what_is_no_array_is_refused(states):
    with pytest.raises(StatesError, match=r"NumPy array or a torch tensor"):
        analyse_states(states)


@pytest.mark.parametrize(
    "metrics", [(), [], ["euclidean"], ["Angular"], [""], ["angular", "angular"], "angular", ""]
)
def test_metrics_that_are_none_unknown_or_twice_are_refused(metrics):
    with pytest.raises(MetricError):
        analyse_states(random_states((2, 3, 4), 0), metrics)


@pytest.mark.parametrize("threads", [0, -1, -(2**63), -(10**30), 10**30])
def test_threads_that_cannot_be_started_are_refused(threads):
    with pytest.raises(ThreadsError):
        analyse_states(random_states((2, 3, 4), 0), threads=threads)


def test_more_states_than_memory_holds_are_an_error_and_no_crash():
    code = (
        "import numpy, shallower\n"
        "try: shallower.analyse_states(numpy.ones((1, 300_000, 1)))\n"
        "except (shallower.StatesError, MemoryError): print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.stdout.strip() == "refused", done.stderr[-500:]


# A scan in the making


def test_batches_build_the_same_scan_as_the_whole():
    states = random_states((9, 4, 8), 0)
    builder = ScanBuilder(4, BOTH, model=MODEL)
    for start in (0, 4, 7):
        builder.add(states[start : start + 4][: 9 - start], range(start, 9))
    assert builder.finish().num_samples == 4 + 4 + 2
    builder = ScanBuilder(4, BOTH, model=MODEL)
    for batch in ([8, 0, 5], [1, 2, 3, 4, 6, 7]):
        builder.add(states[batch], batch)
    assert stored(builder.finish((TEXTS,))) == stored(scan_of(states))


def test_an_interrupted_scan_goes_on_to_the_same_bits(tmp_path):
    states = random_states((9, 4, 8), 0)
    states[[2, 7], 1] = 0
    with pytest.warns(RejectedSamplesWarning):
        whole = scan_of(states)
    first = ScanBuilder(4, BOTH, model=MODEL)
    first.add(states[:5], range(5))
    first.so_far(TEXTS).save(tmp_path / "scan")
    second = ScanBuilder(4, BOTH, model=MODEL)
    second.resume(Scan.load(tmp_path / "scan"), TEXTS)
    second.add(states[5:], range(5, 9))
    with pytest.warns(RejectedSamplesWarning, match="2 of 9"):
        resumed = second.finish((TEXTS,))
    assert stored(resumed) == stored(whole)
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    ("metrics", "model", "texts"),
    [
        (("angular",), MODEL, TEXTS),
        (BOTH, None, TEXTS),
        (BOTH, model_of(3, "e" * 64), TEXTS),
        (BOTH, MODEL, TextsIdentity(24, 256, "1" * 64)),
    ],
)
def test_a_scan_of_something_else_is_not_resumed(metrics, model, texts):
    before = scan_of(random_states((5, 4, 8), 0))
    with pytest.raises(ScanError):
        ScanBuilder(4, metrics, model=model).resume(before, texts)


def test_samples_that_never_became_states_are_counted():
    builder = ScanBuilder(4, BOTH)
    builder.add(random_states((5, 4, 8), 0), [0, 1, 3, 4, 6])
    builder.reject(2, [Rejection(5, "no token"), Rejection(2, "no token")])
    with pytest.warns(RejectedSamplesWarning, match=r"2 of 7 .*sample 2: no token"):
        scan = builder.finish()
    assert (scan.num_samples, scan.num_rejected) == (5, 2)
    assert [rejection.sample for rejection in scan.rejections] == [2, 5]


def test_a_batch_of_another_depth_is_refused():
    builder = ScanBuilder(4, BOTH)
    with pytest.raises(StatesError, match="4 states"):
        builder.add(random_states((5, 3, 8), 0), range(5))


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


def described(**values):
    """A valid scan file of 4 states and 5 samples, with another header."""
    with TemporaryDirectory() as folder:
        scan_of(random_states((5, 4, 8), 0)).save(Path(folder) / "scan")
        header, data = opened((Path(folder) / "scan").read_bytes())
    inner = {**json.loads(header["__metadata__"][FORMAT]), **values}
    return signed(header, inner, data), inner, data


def signed(header, inner, data):
    """The header with another description, its checksum made to fit where that can be."""
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        sums = {}
        for name in (*inner["metrics"], NORMS):
            start, stop = header[name]["data_offsets"]
            sums[name] = np.frombuffer(data[start:stop], "<u8")
        plain = {name: value for name, value in inner.items() if name != "sha256"}
        inner = {**plain, "sha256": _digest(plain, sums)}
    header["__metadata__"] = {FORMAT: json.dumps(inner)}
    return header


def load(content):
    with TemporaryDirectory() as folder:
        (Path(folder) / "scan").write_bytes(content)
        return Scan.load(Path(folder) / "scan")


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


def test_rejections_come_back(scan_file):
    back = Scan.load(scan_file)
    assert (back.num_samples, back.num_rejected) == (5, 1)
    assert back.rejections == (Rejection(2, "state 1 is a zero vector"),)


def test_a_scan_replaces_the_file_that_was_there(scan_file):
    scan = scan_of(random_states((3, 5, 8), 1))
    scan.save(scan_file)
    assert Scan.load(scan_file).num_layers == 4
    assert list(scan_file.parent.iterdir()) == [scan_file]


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
    content = scan_file.read_bytes()
    for length in range(len(content)):
        scan_file.write_bytes(content[:length])
        with pytest.raises(ScanError):
            Scan.load(scan_file)


def test_a_scan_with_more_behind_it_is_refused(scan_file):
    content = scan_file.read_bytes()
    for more in (b"\0", b" " * 8, content):
        scan_file.write_bytes(content + more)
        with pytest.raises(ScanError):
            Scan.load(scan_file)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_scan_are_refused(content):
    with pytest.raises(ScanError):
        load(content)


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


def test_a_negative_sum_of_distances_is_refused():
    header, inner, data = described()
    words = np.frombuffer(data, "<u8").copy()
    low, high = header["angular"]["data_offsets"][0] // 8 + np.arange(2)
    negative = (-int(words[low]) - (int(words[high]) << 64)) % (1 << 128)
    words[low], words[high] = negative % (1 << 64), negative >> 64
    damage = words.tobytes()
    with pytest.raises(ScanError, match="negative"):
        load(closed(signed(header, inner, damage), damage))


def test_norms_that_no_samples_have_are_refused():
    header, inner, data = described()
    start, stop = header[NORMS]["data_offsets"]
    for words in (bytes(stop - start), b"\xff" * (stop - start)):
        damage = data[:start] + words + data[stop:]
        with pytest.raises(ScanError, match="norms are damaged"):
            load(closed(signed(header, inner, damage), damage))


@pytest.mark.parametrize(
    "values",
    [
        {"num_states": -3}, {"num_states": 0}, {"num_states": 1}, {"num_states": 3},
        {"num_states": 5}, {"num_states": 2**31}, {"num_states": 10**18}, {"num_states": 10**400},
        {"num_states": 4.0}, {"num_states": "4"}, {"num_states": None}, {"num_states": True},
        {"num_states": float("nan")}, {"num_states": float("inf")}, {"num_states": [4]},
        *({"lengths": [count, 0, 0, 0]} for count in (
            -1, 0, 1, 5.0, "5", None, True, 2**31 + 1, 2**63, 2**64, 10**400, float("nan"), [])),
        {"lengths": []}, {"lengths": [5]}, {"lengths": None}, {"lengths": 5},
        {"lengths": [5, 0, 0, 0, 0]}, {"lengths": [3, 1, 2, 4]}, {"lengths": [5, 0, 2, 4]},
        {"lengths": [5, 0, 0, 1]}, {"lengths": [5, 2**64, 0, 0]}, {"lengths": [5, 0, -1, 1]},
        {"positions": "last"}, {"positions": {}}, {"positions": 5},
        {"positions": {"kind": "first", "count": 1, "seed": 0}},
        {"positions": {"kind": "last", "count": True, "seed": 0}},
        {"positions": {"kind": "last", "count": 10**400, "seed": 0}},
        {"positions": {"kind": "last", "count": 1}},
        {"rejected": -1}, {"rejected": 1.0}, {"rejected": "1"}, {"rejected": None},
        {"rejected": 2**31}, {"rejected": 2**64}, {"rejected": float("inf")},
        {"metrics": []}, {"metrics": "angular"}, {"metrics": None}, {"metrics": [5]},
        {"metrics": ["euclidean"]}, {"metrics": ["angular", "angular"]}, {"metrics": [["angular"]]},
        {"metrics": [None]}, {"metrics": ["__metadata__"]}, {"metrics": ["angular"]},
        {"rejections": None}, {"rejections": 5}, {"rejections": ["x"]}, {"rejections": [{}]},
        {"rejections": [{"sample": 1}]}, {"rejections": [{"sample": 1, "reason": "r", "x": 1}]},
        {"rejections": [{"sample": "x", "reason": "r"}]},
        {"rejections": [{"sample": 1, "reason": 5}]},
        {"model": 5}, {"model": "tiny"}, {"model": []}, {"model": {}}, {"model": {"name": "tiny"}},
        {"model": {"name": "t", "model_type": "l", "num_layers": 3, "dtype": "d",
                   "fingerprint": 5}},
        {"model": {"name": "t", "model_type": "l", "num_layers": "3", "dtype": "d",
                   "fingerprint": "f"}},
        {"model": {"name": "t", "model_type": "l", "num_layers": 99, "dtype": "d",
                   "fingerprint": "f"}},
        {"texts": None}, {"texts": 5}, {"texts": ["x"]}, {"texts": [{}]},
        {"texts": [{"num_texts": "1", "max_length": 1, "fingerprint": "f"}]},
        {"texts": [{"num_texts": 1, "max_length": None, "fingerprint": "f"}]},
        {"texts": [{"num_texts": 1, "max_length": 1, "fingerprint": 5}]},
    ],
    ids=lambda values: str(values)[:60],
)  # fmt: skip
def test_a_scan_that_describes_itself_wrongly_is_refused(values):
    header, _, data = described(**values)
    with pytest.raises(ScanError):
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


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{", "NaN", "[" * 100_000, "1" * 5000])
def test_a_scan_described_by_other_json_is_refused(text):
    header, _, data = described()
    header["__metadata__"] = {FORMAT: text}
    with pytest.raises(ScanError):
        load(closed(header, data))


@pytest.mark.parametrize(
    "metadata",
    [
        None, {}, {"format": "shallower.scan"}, {"format": "pt", "version": "1", "scan": "{}"},
        {"format": "shallower.scan", "version": "2", "scan": "{}"}, {"scan": 5}, [], "scan",
    ],
    ids=str,
)  # fmt: skip
def test_safetensors_of_something_else_are_refused(metadata):
    header, _, data = described()
    header["__metadata__"] = metadata
    if metadata is None:
        del header["__metadata__"]
    with pytest.raises(ScanError):
        load(closed(header, data))


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("BOOL", 8), ("U8", 8), ("I8", 8), ("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("I16", 16),
        ("F16", 16), ("BF16", 16), ("F32", 32), ("F64", 64), ("I64", 64), ("C64", 64), ("X", 64),
    ],
)  # fmt: skip
def test_sums_of_another_dtype_are_refused(dtype, width):
    header, _, data = described()
    for metric in BOTH:
        header[metric].update(dtype=dtype, shape=[24 * 64 // width])
    with pytest.raises(ScanError):
        load(closed(header, data))


@pytest.mark.parametrize("shape", [[4, 6], [1, 24], [24, 1], [23], [25], [], [2**62, 24], [-24]])
def test_sums_of_another_shape_are_refused(shape):
    header, _, data = described()
    header["angular"]["shape"] = shape
    with pytest.raises(ScanError):
        load(closed(header, data))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(scan_file, length):
    content = scan_file.read_bytes()
    scan_file.write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(ScanError):
        Scan.load(scan_file)


@given(st.data())
def test_a_scan_damaged_anyhow_is_refused_or_of_use(data):
    header, inner, sums = described()
    refused_or_of_use(closed(signed(header, data.draw(damaged(inner)), sums), sums))


@given(st.data())
def test_a_scan_whose_file_header_is_damaged_is_refused_or_of_use(data):
    header, _, sums = described()
    refused_or_of_use(closed(data.draw(damaged(header)), sums))


@given(JSON)
def test_a_scan_described_by_anything_is_refused(value):
    header, _, data = described()
    header["__metadata__"] = {FORMAT: json.dumps(value)}
    with pytest.raises(ScanError):
        load(closed(header, data))


# Merging


@pytest.mark.parametrize(
    "other",
    [
        scan_of(random_states((3, 5, 8), 1)),
        scan_of(random_states((3, 4, 8), 1), ("angular",)),
        scan_of(random_states((3, 4, 8), 1), ("cosine",)),
        scan_of(random_states((3, 4, 8), 1), model=None),
        scan_of(random_states((3, 4, 8), 1), model=model_of(3, "e" * 64)),
    ],
    ids=["layers", "metrics", "other metrics", "no model", "another model"],
)
def test_scans_of_different_things_do_not_merge(other):
    scan = scan_of(random_states((3, 4, 8), 0))
    for scans in ([scan, other], [other, scan], [scan, scan, other]):
        with pytest.raises(ScanError):
            Scan.merge(scans)


@pytest.mark.parametrize("scans", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_scans_do_not_merge(scans):
    with pytest.raises(ScanError, match="no scan"):
        Scan.merge(scans)


def test_more_samples_than_there_is_room_for_do_not_merge():
    header, inner, data = described(lengths=[2**31, 0, 0, 0])
    nothing = bytearray(len(data))
    norms = slice(*header[NORMS]["data_offsets"])
    nothing[norms] = data[norms]
    scan = load(closed(signed(header, inner, nothing), bytes(nothing)))
    with pytest.raises(StatesError, match="at most 2147483648 samples"):
        Scan.merge([scan, scan])


def test_merged_scans_count_and_name_all_that_were_rejected():
    states = random_states((5, 4, 8), 0)
    states[1, 2] = 0
    with pytest.warns(RejectedSamplesWarning):
        scan = scan_of(states)
    merged = Scan.merge(iter([scan] * 150))
    assert (merged.num_samples, merged.num_rejected) == (600, 150)
    assert len(merged.rejections) == 100
    assert merged.model == MODEL


def test_a_scan_says_what_it_holds():
    scan = scan_of(random_states((5, 4, 8), 0))
    assert repr(scan) == (
        "Scan(num_layers=3, num_samples=5, num_rejected=0, metrics=('angular', 'cosine'))"
    )

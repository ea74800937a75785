"""The scan against slow twins, and the blocks that it finds."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mpmath
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from shallower import (
    LayersError,
    MetricError,
    RejectedSamplesWarning,
    Scan,
    TierError,
    _core,
    _reference,
    analyse_states,
)
from tests.scanning.samples import (
    BOTH,
    DTYPES,
    MODEL,
    TEXTS,
    batches,
    random_states,
    rounded,
    scan_of,
)

ANGULAR_TOLERANCE = 1e-7
ALL = (*BOTH, "relative_l2", "norm_ratio")
TIERS = _core.tiers()


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


def tensor(number):
    import torch

    return torch.tensor(number)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, tensor])
def test_any_kind_of_integer_is_a_size(integer):
    scan = analyse_states(random_states((2, 7, 4), 0))
    assert scan.best_block(integer(2)) == scan.best_block(2)


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


def test_a_scan_says_what_it_holds():
    scan = scan_of(random_states((5, 4, 8), 0))
    assert repr(scan) == (
        "Scan(num_layers=3, num_samples=5, num_rejected=0, metrics=('angular', 'cosine'))"
    )

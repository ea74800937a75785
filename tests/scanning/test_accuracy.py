"""The distances against slow twins and fifty digits, on every instruction set."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mpmath
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from shallower import (
    Scan,
    TierError,
    _core,
    analyse_states,
)
from tests import reference
from tests.scanning.samples import (
    BOTH,
    DTYPES,
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


@cache
def rows_and_digits(distance, outliers, dtype):
    """Two rows at a distance, and their angular distances in 50-digit arithmetic."""
    states, exact = rounded(rows_at(distance, 601, outliers), dtype)
    return states, fifty_digits(exact[0])["angular"]


# Against slow twins
@pytest.mark.parametrize("dtype", DTYPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=batches(min_samples=2))
def test_equals_the_slow_twin(tier, dtype, values):
    states, exact = rounded(values, dtype)
    scan = analyse_states(states, ALL)
    for metric in ALL:
        mean, stderr = reference.mean_and_stderr(exact, metric)
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
    states, expected = rows_and_digits(distance, outliers, dtype)
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
    np.testing.assert_allclose(scan.norms(), reference.norms(exact), rtol=1e-7)
    halves = [scan_of(states[part]) for part in (slice(1, None), slice(None, 1))]
    with TemporaryDirectory() as folder:
        scan.save(Path(folder) / "scan")
        kept = Scan.load(Path(folder) / "scan")
    assert kept.norms().tobytes() == scan.norms().tobytes() == Scan.merge(halves).norms().tobytes()


def test_the_standard_error_of_tiny_differences_keeps_its_digits():
    distances = 0.1 + 1e-6 * np.random.default_rng(5).standard_normal(50)
    states = np.concatenate([rows_at(distance, 65, outliers=False) for distance in distances])
    _, expected = reference.mean_and_stderr(states, "angular")
    assert analyse_states(states).stderr()[0, 1] == pytest.approx(expected[0, 1], rel=1e-6)

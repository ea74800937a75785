"""The bootstrap of 10,000 samples x 561 pairs x 1,000 resamplings: the core against two
vectorised NumPy versions that draw the same samples, answers asserted first.

`gather` takes the drawn rows of every resampling and sums them; `product` multiplies a matrix
of counts with the samples, by BLAS on all cores. Both are given the samples in order, as
float64 integers. `walk` are residual streams whose first and last layers turn most, as those
of models do; `alike` has starts that are all equally good, the worst case.
"""

import numpy as np
import pytest

import shallower as sh
from shallower import _reference

SAMPLES, STATES, RESAMPLES, SEED = 10_000, 34, 1000, 7


@pytest.fixture(scope="module", params=["walk", "alike"])
def samples(request):
    """A name, a scan, and its samples as NumPy is given them."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((SAMPLES, STATES, 48))
    if request.param == "walk":
        turn = 0.2 + np.linspace(-1, 1, STATES) ** 2
        states = (states * turn[:, None]).cumsum(axis=1)
    states += 4 * rng.standard_normal((SAMPLES, 1, 48))
    scan = sh.analyse_states(states, keep_samples=True)
    return request.param, scan, _reference.integer_costs(scan.samples(), False)


def shallower(scan, costs):
    found = scan.bootstrap(RESAMPLES, SEED)
    return [one.distribution * RESAMPLES for one in found.values()]


def product(scan, costs):
    weights = np.empty((RESAMPLES, SAMPLES))
    for index in range(RESAMPLES):
        drawn = _reference.resample(SAMPLES, SEED, index)
        weights[index] = np.bincount(drawn, minlength=SAMPLES)
    return _reference.wins(weights @ costs)


def gather(scan, costs):
    drawn = (_reference.resample(SAMPLES, SEED, index) for index in range(RESAMPLES))
    return _reference.wins(np.stack([costs[rows].sum(axis=0) for rows in drawn]))


@pytest.fixture(scope="module")
def expected(samples):
    return product(*samples[1:])


@pytest.mark.parametrize("engine", [shallower, product, gather], ids=lambda f: f.__name__)
def test_bootstrap(benchmark, engine, samples, expected):
    name, scan, costs = samples
    for ours, theirs in zip(engine(scan, costs), expected, strict=True):
        assert np.array_equal(ours, theirs)
    benchmark.group = f"bootstrap, {SAMPLES} x {costs.shape[1]} x {RESAMPLES}, {name}"
    rounds = {shallower: 15, product: 5, gather: 1}[engine]
    benchmark.pedantic(engine, (scan, costs), rounds=rounds)

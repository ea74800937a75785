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
from tests import reference

SAMPLES, STATES, RESAMPLES, SEED = 10_000, 34, 1000, 7
FEW = 20
"""Resamplings for which the answers are compared before anything is timed."""


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
    return request.param, scan, reference.integer_costs(scan.samples(), False)


def shallower(scan, costs, count):
    found = scan.bootstrap(count, SEED)
    return [one.distribution * count for one in found.values()]


def product(scan, costs, count):
    weights = np.empty((count, SAMPLES))
    for index in range(count):
        drawn = reference.resample(SAMPLES, SEED, index)
        weights[index] = np.bincount(drawn, minlength=SAMPLES)
    return reference.wins(weights @ costs)


def gather(scan, costs, count):
    drawn = (reference.resample(SAMPLES, SEED, index) for index in range(count))
    return reference.wins(np.stack([costs[rows].sum(axis=0) for rows in drawn]))


def same(left, right):
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(left, right, strict=True))


@pytest.mark.parametrize("engine", [shallower, product, gather], ids=lambda f: f.__name__)
def test_bootstrap(benchmark, engine, samples):
    name, *given = samples
    assert same(engine(*given, FEW), product(*given, FEW))
    if benchmark.disabled:
        return
    benchmark.group = f"bootstrap, {SAMPLES} x {given[1].shape[1]} x {RESAMPLES}, {name}"
    rounds = {shallower: 15, product: 5, gather: 1}[engine]
    found = benchmark.pedantic(engine, (*given, RESAMPLES), rounds=rounds)
    assert same(found, product(*given, RESAMPLES))

"""The bootstrap: against its slow twin, and against itself in other orders."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import (
    MetricError,
    RejectedSamplesWarning,
    Scan,
    ScanError,
    analyse_states,
)
from shallower._core import Threads
from shallower._core import bootstrap as core_bootstrap
from tests import reference
from tests.scanning.ticks import ticks_beside

BOTH = ("angular", "cosine")


def walk(num_samples, num_states=7, seed=0, width=16, noise=1.0):
    """States that move away from the first one, as a residual stream does."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((num_samples, num_states, width))
    return noise * steps.cumsum(axis=1) + 2 * rng.standard_normal((num_states, width))


def vague(num_samples, num_states=7, seed=0):
    """States in any direction, so that no start is sure."""
    return np.random.default_rng(seed).standard_normal((num_samples, num_states, 8))


def kept(states, metrics=BOTH, threads=None):
    return analyse_states(states, metrics, threads=threads, keep_samples=True)


def shares(scan, *args, **options):
    found = scan.bootstrap(*args, **options)
    return {n: one.distribution.tolist() for n, one in found.items()}


# What is kept
@given(st.integers(1, 40), st.integers(2, 8), st.integers(0, 2**32))
def test_the_values_of_samples_are_kept_in_their_order(num_samples, num_states, seed):
    states = walk(num_samples, num_states, seed)
    scan = kept(states)
    first, second = np.triu_indices(num_states, 1)
    for metric in BOTH:
        values = scan.samples(metric)
        assert values.dtype == np.float32
        expected = np.stack([reference.METRICS[metric](s)[first, second] for s in states])
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-7)
        mean = scan.mean(metric)[first, second]
        np.testing.assert_allclose(values.mean(axis=0, dtype=float), mean, rtol=0, atol=1e-7)
    assert scan.keeps_samples


def test_rejected_samples_are_not_kept():
    states = walk(20)
    states[[3, 11], 2] = np.nan
    with pytest.warns(RejectedSamplesWarning):
        scan = kept(states)
    good = kept(np.delete(states, [3, 11], axis=0))
    assert np.array_equal(scan.samples(), good.samples())
    assert shares(scan) == shares(good)


def test_a_scan_without_samples_says_how_to_get_them(tmp_path):
    scan = analyse_states(walk(30))
    scan.save(tmp_path / "scan")
    for one in (
        scan,
        Scan.load(tmp_path / "scan"),
        Scan.merge([kept(walk(30), ["angular"]), scan]),
    ):
        assert not one.keeps_samples
        with pytest.raises(ScanError, match="keep_samples=True"):
            one.bootstrap()
        with pytest.raises(ScanError, match="keep_samples=True"):
            one.samples()


# The answer
@given(st.data())
def test_the_bootstrap_equals_its_slow_twin(data):
    num_samples = data.draw(st.one_of(st.integers(2, 14), st.integers(60, 300)))
    noise = data.draw(st.sampled_from([0.01, 0.3, 3.0]))
    num_states = data.draw(st.integers(3, 8))
    make = data.draw(st.sampled_from([vague, partial(walk, noise=noise)]))
    scan = kept(make(num_samples, num_states, data.draw(st.integers(0, 2**32))))
    seed, count = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(1, 300))
    for metric in BOTH:
        found = scan.bootstrap(count, seed, metric=metric)
        expected = reference.bootstrap(
            scan.samples(metric), count, seed, similarity=metric == "cosine"
        )
        assert list(found) == list(range(1, scan.num_layers))
        for n, wins in zip(found, expected, strict=True):
            assert np.array_equal(found[n].distribution, wins / count)
            assert found[n].start == scan.best_block(n, metric).start
            assert found[n].probability == found[n].distribution[found[n].start]


@pytest.mark.parametrize("num_samples", [2047, 2048, 2049, 5000])
def test_many_samples_equal_the_slow_twin(num_samples):
    states = np.random.default_rng(1).standard_normal((num_samples, 6, 4))
    states[:, 3:] += 3
    scan = kept(states)
    for metric in BOTH:
        found = scan.bootstrap(130, 5, metric=metric)
        expected = reference.bootstrap(scan.samples(metric), 130, 5, similarity=metric == "cosine")
        for n, wins in zip(found, expected, strict=True):
            assert np.array_equal(found[n].distribution, wins / 130)


@given(st.integers(0, 2**32), st.integers(20, 200))
def test_starts_that_differ_in_their_last_bits_are_told_apart(seed, num_samples):
    rng = np.random.default_rng(seed)
    ours, rival = rng.random((2, num_samples)).astype(np.float32)
    values = np.stack([ours, rival, rival, rival, ours, rival], axis=1)
    values[:, [1, 2, 3, 5]] += 2.0**-20 * rng.integers(-1, 2, (num_samples, 4)).astype(np.float32)
    found = core_bootstrap(values, 4, 200, seed, Threads())
    expected = reference.bootstrap(values, 200, seed, similarity=False)
    assert [list(wins) for wins in expected] == found


@pytest.mark.slow
def test_a_start_that_only_the_rarest_draws_make_the_best_is_found():
    # The second start is the best if the first sample is drawn 7 times of 12 or more.
    worse = np.array([-0.72] + [1] * 11) / 16
    values = np.full((12, 3), 0.5, dtype=np.float32)
    values[:, 2] += worse
    drawn = np.array([reference.resample(12, 1, index) for index in range(100_000)])
    expected = int(((drawn == 0).sum(axis=1) >= 7).sum())
    assert expected > 0
    assert core_bootstrap(values, 3, 100_000, 1, Threads()) == [[100_000 - expected, expected]]


def test_any_threads_shards_and_order_give_the_same_bits():
    states = vague(150)
    expected = shares(kept(states), 500, 3)
    assert max(expected[3]) < 1
    for threads in (1, 2, 4):
        assert shares(kept(states), 500, 3, threads=threads) == expected
    order = np.random.default_rng(0).permutation(150)
    assert shares(kept(states[order]), 500, 3) == expected
    for count in (2, 7):
        parts = [kept(part) for part in np.array_split(states, count)]
        for parts_in_order in (parts, parts[::-1]):
            assert shares(Scan.merge(parts_in_order), 500, 3) == expected


def test_the_shares_are_those_of_a_plain_bootstrap():
    states = vague(60)
    scan = kept(states)
    found = scan.bootstrap(4000)
    rng = np.random.default_rng(9)
    values = scan.samples().astype(float)
    drawn = rng.integers(0, 60, (4000, 60))
    means = np.stack([values[index].mean(axis=0) for index in drawn])
    first, second = np.triu_indices(7, 1)
    for n, one in found.items():
        best = means[:, second - first == n].argmin(axis=1)
        plain = np.bincount(best, minlength=8 - n - 1) / 4000
        assert np.abs(one.distribution - plain).max() < 6 * np.sqrt(0.5 / 4000)
        assert one.distribution.sum() == pytest.approx(1, abs=1e-12)


def test_a_sure_start_is_sure_and_equal_starts_go_to_the_first():
    states = walk(50, width=64)
    states[:, 4] = states[:, 2]
    one = kept(states).bootstrap()[2]
    assert (one.start, one.probability) == (2, 1.0)
    equal = kept(np.ones((5, 6, 4))).bootstrap(50)
    assert all(one.probability == one.distribution[0] == 1 for one in equal.values())


def test_other_threads_run_while_samples_are_drawn():
    scan = kept(walk(20_000, 12))
    assert ticks_beside(lambda: scan.bootstrap(1000, threads=1)) >= 3


# What is refused
@pytest.mark.parametrize(
    "options",
    [{"num_resamples": n} for n in (0, 2**31 + 1, 10.0)] + [{"seed": n} for n in (-1, 2**64, True)],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ScanError, match="expected an integer"):
        kept(walk(5)).bootstrap(**options)


def test_a_single_sample_and_an_unheld_metric_are_refused():
    with pytest.raises(ScanError, match="single sample"):
        kept(walk(1)).bootstrap()
    with pytest.raises(MetricError):
        kept(walk(5), ["angular"]).bootstrap(metric="cosine")


def test_a_model_of_one_layer_has_no_start_to_be_sure_of():
    assert kept(walk(5, 2)).bootstrap() == {}

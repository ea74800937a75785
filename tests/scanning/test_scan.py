"""The scan: its metrics, the blocks that it finds, and what it refuses. Needs no torch."""

import numpy as np
import pytest
from hypothesis import assume, given

from shallower import (
    LayersError,
    MetricError,
    RejectedSamplesWarning,
    analyse_states,
)
from tests import reference
from tests.scanning.samples import (
    BOTH,
    MODEL,
    TEXTS,
    batches,
    random_states,
    scan_of,
)

ALL = (*BOTH, "relative_l2", "norm_ratio")


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


@given(batches())
def test_equal_and_opposite_directions_are_exact(values):
    first = values[:, :1]
    states = np.concatenate([first, first, 4 * first, -first, -0.5 * first], axis=1)
    scan = analyse_states(states, BOTH)
    side = np.array([1, 1, 1, -1, -1])
    cosine = np.outer(side, side)
    assert np.array_equal(scan.mean("cosine"), cosine)
    assert np.array_equal(scan.mean(), (1 - cosine) / 2)


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
            assert block.start == reference.best_start(cost, n)
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


def test_the_first_held_metric_decides_if_there_is_no_angle():
    states = random_states((3, 7, 8), 6)
    scan = analyse_states(states, ["cosine"])
    assert scan.best_block(2).score == scan.best_block(2, "cosine").score
    assert scan.plan(2).metric == "cosine"
    assert analyse_states(states, ["cosine", "angular"]).plan(2).metric == "angular"


@pytest.mark.parametrize("n", [0, -1, 6, 10**30, True, np.True_, 2.5, "2", None, np.array([1, 2])])
def test_a_block_of_no_layer_of_all_or_of_no_integer_is_refused(n):
    scan = analyse_states(random_states((2, 7, 4), 0), BOTH)
    with pytest.raises(LayersError):
        scan.best_block(n)
    with pytest.raises(LayersError):
        scan.plan(n, "cosine")


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
        scan.best_plan(1, metric=metric)

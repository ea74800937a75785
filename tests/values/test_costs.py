"""Costs by any criterion, against trying all blocks and plans in fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import shallower as sh
from shallower import Block, Costs, CostsError, LayersError, PlanError, ScanError
from shallower.values.plan import STRATEGIES
from tests import reference

UNKNOWN = Fraction(10) ** 400
"""More than any sum of float64."""

few = st.sampled_from([0.0, -0.0, 0.1, 0.2, 0.1 + 0.2, 0.3, 1.0, -1.0, math.nan])
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.one_of(few, finite, st.sampled_from([5e-324, 1e-300, 1e300, 1.7e308, math.nan]))


@st.composite
def matrices(draw, elements=values):
    """(L+1, L+1), L from 1 to 6, with anything on and below the diagonal."""
    size = draw(st.integers(2, 7))
    matrix = draw(arrays.arrays(np.float64, (size, size), elements=elements))
    below = draw(st.sampled_from([0.0, math.nan, math.inf]))
    matrix[np.tril_indices(size)] = below
    return matrix


def fractions(matrix):
    """The same costs, exactly; unmeasured ones cost more than all others together."""
    exact = np.empty(matrix.shape, dtype=object)
    for place in np.ndindex(matrix.shape):
        value = matrix[place]
        exact[place] = Fraction(float(value)) if math.isfinite(value) else UNKNOWN
    return exact


def of_layers(layers):
    """The exact costs of blocks from those of single layers."""
    exact = fractions(layers)
    size = len(layers) + 1
    blocks = np.full((size, size), UNKNOWN, dtype=object)
    for start in range(size):
        for stop in range(start + 1, size):
            blocks[start, stop] = sum(exact[start:stop], Fraction(0))
    return blocks


def check_search(costs, exact, data):
    """The best blocks and plans are those that trying all of them finds."""
    num_layers = len(exact) - 1
    assert costs.num_layers == num_layers
    if num_layers == 1:
        with pytest.raises(LayersError):
            costs.best_block(1)
        return
    n, k = data.draw(st.integers(1, num_layers - 1)), data.draw(st.integers(1, 8))
    starts = [start for start in range(num_layers - n + 1) if exact[start, start + n] < UNKNOWN]
    expected = sorted(starts, key=lambda start: (exact[start, start + n], start))[:k]
    if expected:
        found = costs.best_blocks(n, k)
        assert [(block.start, block.stop) for block in found] == [(s, s + n) for s in expected]
        assert costs.best_block(n) == found[0]
        assert costs.plan(n).blocks == (found[0],)
    else:
        with pytest.raises(CostsError, match="NaN"):
            costs.best_blocks(n, k)
    first = data.draw(st.integers(0, num_layers - n))
    last = data.draw(st.integers(0, num_layers - n - first))
    max_blocks = data.draw(st.integers(1, 4))
    wanted = reference.best_plan(exact, n, max_blocks, protect_first=first, protect_last=last)
    options = {"protect_first": first, "protect_last": last}
    if sum(exact[block] for block in wanted) < UNKNOWN / 2:
        plan = costs.best_plan(n, max_blocks, **options)
        assert [(block.start, block.stop) for block in plan.blocks] == wanted
        for block in plan.blocks:
            assert block.score == costs.scored(block).score == costs.blocks[block.start, block.stop]
    else:
        with pytest.raises(CostsError, match="measure the costs of more blocks"):
            costs.best_plan(n, max_blocks, **options)


@given(matrices(), st.data())
def test_the_search_is_that_of_trying_all(matrix, data):
    check_search(Costs.of_blocks(matrix, metric="any"), fractions(matrix), data)


@given(matrices(few), st.data())
def test_many_equal_costs_are_told_apart_exactly(matrix, data):
    check_search(Costs.of_blocks(matrix, metric="any"), fractions(matrix), data)


@given(st.lists(values, min_size=1, max_size=6), st.data())
def test_a_block_costs_the_sum_of_its_layers(layers, data):
    layers = np.array(layers)
    exact = of_layers(layers)
    exact[exact >= UNKNOWN / 2] = UNKNOWN
    check_search(Costs.of_layers(layers, metric="any"), exact, data)


@given(st.integers(0, 2**32), st.integers(3, 8))
def test_the_costs_of_a_scan_as_a_matrix_choose_the_same(seed, num_states):
    states = np.random.default_rng(seed).standard_normal((5, num_states, 16)).cumsum(axis=1)
    scan = sh.analyse_states(states, ("angular", "cosine"), keep_samples=True)
    for metric in scan.metrics:
        exact = scan.costs(metric)
        again = Costs.of_blocks(exact.blocks, metric=metric, stderr=exact.stderr)
        for n in range(1, scan.num_layers):
            assert exact.best_block(n) == scan.best_block(n, metric) == again.best_block(n)
            assert exact.best_block(n).score == again.best_block(n).score
            assert exact.best_block(n).stderr == again.best_block(n).stderr
            assert exact.plan(n) == scan.plan(n, metric)
            plan = scan.best_plan(n, 2, metric=metric)
            assert exact.best_plan(n, 2) == plan
            assert (plan.strategy, plan.metric) == ("similarity", metric)
        drawn = scan.bootstrap(50, 1, metric=metric)
        for n, found in exact.bootstrap(50, 1).items():
            assert found.distribution.tolist() == drawn[n].distribution.tolist()


def test_samples_of_any_criterion_are_resampled():
    rng = np.random.default_rng(3)
    samples = rng.integers(0, 1024, (40, 15)) / 1024
    matrix = np.zeros((6, 6))
    matrix[np.triu_indices(6, 1)] = samples.mean(axis=0)
    costs = Costs.of_blocks(matrix, metric="any", samples=samples)
    found = costs.bootstrap(200, 5)
    expected = reference.bootstrap(samples.astype(np.float32), 200, 5, similarity=False)
    for n, wins in enumerate(expected, 1):
        assert (found[n].distribution * 200).round().tolist() == wins.tolist()
        assert found[n].start == costs.best_block(n).start
        assert found[n].probability == found[n].distribution[found[n].start]
    with pytest.raises(ScanError, match="no samples behind these costs"):
        Costs.of_blocks(matrix, metric="any").bootstrap()
    for few in (samples[:1], samples[:0]):
        with pytest.raises(ScanError, match="scan at least 2"):
            Costs.of_blocks(matrix, metric="any", samples=few).bootstrap()
    with pytest.raises(ScanError, match="NaN or infinite"):
        Costs.of_blocks(matrix, metric="any", samples=np.full((3, 15), np.nan)).bootstrap()


def test_a_plan_says_where_its_costs_come_from(tmp_path):
    model = sh.ModelIdentity("tiny", "llama", 4, "float32", "f" * 64)
    texts = (sh.TextsIdentity(3, 256, "0" * 64),)
    positions = sh.Positions("all", 0)
    known = {"model": model, "texts": texts, "positions": positions}
    stderr = np.full(4, 0.25)
    costs = Costs.of_layers([3, 1, 2, 4], metric="loss", stderr=stderr, **known)
    plan = costs.best_plan(2, 2)
    assert (plan.strategy, plan.metric) == ("costs", "loss")
    assert (plan.model, plan.texts, plan.positions) == (model, texts, positions)
    assert [(str(block), block.score) for block in plan.blocks] == [("[1, 3)", 3.0)]
    assert math.isnan(plan.blocks[0].stderr)
    assert costs.best_block(1).stderr == 0.25
    plan.save(tmp_path / "plan.json")
    assert sh.Plan.load(tmp_path / "plan.json") == plan
    deepest = Costs.of_layers([3, 1, 2, 4], metric="depth", strategy="deepest")
    assert deepest.plan(1).strategy == "deepest"
    with pytest.raises(PlanError, match="expected similarity"):
        Costs.of_layers([1, 2], metric="any", strategy="luck")
    assert all(reason and not reason.endswith(".") for reason in STRATEGIES.values())


def test_the_columns_and_errors_of_a_matrix_are_its_blocks():
    matrix = np.arange(16.0).reshape(4, 4)
    costs = Costs.of_blocks(matrix, metric="any", stderr=matrix / 10)
    assert costs.scored(Block(1, 3)) == Block(1, 3)
    assert (costs.scored(Block(1, 3)).score, costs.scored(Block(1, 3)).stderr) == (7.0, 0.7)
    assert Costs.of_blocks(matrix, metric="any").best_block(2).stderr is None
    matrix[:] = 0
    assert costs.blocks[1, 3] == 7
    assert repr(costs) == "Costs(num_layers=3, metric='any')"
    with pytest.raises(LayersError, match="the model has 3 layers"):
        costs.scored(Block(1, 4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Costs.of_blocks(np.zeros((3, 4)), metric="x"), r"values of shape \(3, 4\)"),
        (lambda: Costs.of_blocks(np.zeros((1, 1)), metric="x"), r"expected \(L\+1, L\+1\)"),
        (lambda: Costs.of_blocks(np.zeros(9), metric="x"), "values of shape"),
        (lambda: Costs.of_blocks([["a", "b"]] * 2, metric="x"), "expected an array of numbers"),
        (lambda: Costs.of_blocks([[0, 1], [2]], metric="x"), "expected an array of numbers"),
        (lambda: Costs.of_blocks(np.full((3, 3), np.inf), metric="x"), r"block \[0, 1\) is inf"),
        (lambda: Costs.of_blocks(np.zeros((4, 4)), metric="x", stderr=np.zeros((3, 3))), "stderr"),
        (lambda: Costs.of_blocks(np.zeros((4, 4)), metric="x", samples=np.zeros((2, 5))), "pair"),
        (lambda: Costs.of_layers([], metric="x"), r"expected \(L,\)"),
        (lambda: Costs.of_layers([[1, 2]], metric="x"), r"expected \(L,\)"),
        (lambda: Costs.of_layers(np.zeros(4096), metric="x"), "L from 1 to 4095"),
        (lambda: Costs.of_layers([1, -np.inf], metric="x"), r"block \[1, 2\) is -inf"),
        (lambda: Costs.of_layers([1, 2], metric="x", stderr=[1]), "stderr"),
    ],
    ids=range(13),
)
def test_costs_that_cannot_be_are_refused(make, said):
    with pytest.raises(CostsError, match=said):
        make()

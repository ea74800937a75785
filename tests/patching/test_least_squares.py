"""Sums for linear maps, and maps chosen by held-out tokens, against NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower.patching.least_squares import (
    KEPT_ROWS,
    PANEL,
    RIDGES,
    ROWS,
    HeldOut,
    NormalEquations,
    Rows,
    choose,
)


def data(seed, rows, inputs=7, outputs=3):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, inputs)), generator.normal(size=(rows, outputs))


def equations(x, r, parts=1):
    sums = NormalEquations.empty(x.shape[1], r.shape[1], torch.device("cpu"))
    for a, b in zip(np.array_split(x, parts), np.array_split(r, parts), strict=True):
        sums.add(torch.from_numpy(a), torch.from_numpy(b))
    return sums


def expected(x, r, ridge, penalty):
    return np.linalg.solve(x.T @ x + ridge * np.diag(penalty), x.T @ r).T


@given(
    st.integers(0, 99), st.integers(1, 50), st.integers(1, 5), st.sampled_from([1e-2, 1.0, 30.0])
)
def test_a_map_is_that_of_ridge_regression_in_whatever_parts(seed, rows, parts, ridge):
    x, r = data(seed, rows)
    penalty = np.linspace(1, 2, 7)
    found = equations(x, r, parts).solve(ridge, torch.from_numpy(penalty))
    np.testing.assert_allclose(found.numpy(), expected(x, r, ridge, penalty), atol=1e-4)


def test_more_tokens_than_are_summed_in_float32():
    x, r = data(0, 2 * ROWS + 5)
    sums = equations(x, r)
    assert sums.count == 2 * ROWS + 5
    np.testing.assert_allclose(sums.gram.numpy(), x.T @ x, rtol=1e-4, atol=1e-2)
    assert float(sums.scale) == pytest.approx(np.square(x).sum(0).mean(), rel=1e-5)


@pytest.mark.parametrize("inputs", [PANEL - 1, PANEL, 2 * PANEL + 3])
def test_more_inputs_than_are_multiplied_at_once(inputs):
    x, r = data(4, 50, inputs)
    sums = equations(x, r, parts=2)
    np.testing.assert_allclose(sums.gram.numpy(), x.T @ x, atol=1e-4)
    np.testing.assert_allclose(sums.cross.numpy(), x.T @ r, atol=1e-4)


@pytest.mark.parametrize("inputs", [7, 2 * PANEL + 3])
def test_kept_tokens_count_as_often_as_is_said(inputs):
    x, r = data(1, KEPT_ROWS + 40, inputs)
    sums = equations(x[:30], r[:30])
    for a, b in zip(np.array_split(x[30:], 3), np.array_split(r[30:], 3), strict=True):
        sums.keep(torch.from_numpy(a), torch.from_numpy(b))
    ones = np.ones(inputs)
    for weight in (0.25, 2.0, 0.0):
        weights = np.sqrt(np.r_[np.ones(30), np.full(len(x) - 30, weight)])[:, None]
        found = sums.solve(10.0, torch.from_numpy(ones), weight).numpy()
        wanted = expected(weights * x, weights * r, 10.0, ones)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_solution_leaves_the_sums_alone():
    x, r = data(5, 40)
    sums = equations(x, r)
    gram, cross = sums.gram.clone(), sums.cross.clone()
    first, again = (sums.solve(0.1, torch.ones(7, dtype=torch.float64)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(sums.gram, gram)
    assert torch.equal(sums.cross, cross)


def test_equations_without_a_solution_give_no_number():
    sums = NormalEquations.empty(3, 2, torch.device("cpu"))
    assert sums.solve(0.0, torch.zeros(3, dtype=torch.float64)).isnan().all()


def test_equations_are_joined():
    x, r = data(8, 60)
    whole, some, rest = (
        equations(x[:50], r[:50]),
        equations(x[:20], r[:20]),
        equations(x[20:50], r[20:50]),
    )
    for sums, rows in ((whole, slice(50, 60)), (some, slice(50, 57)), (rest, slice(57, 60))):
        sums.keep(torch.from_numpy(x[rows]), torch.from_numpy(r[rows]))
    some.join(rest)
    assert some.count == 50
    ones = torch.ones(7, dtype=torch.float64)
    np.testing.assert_allclose(some.solve(1.0, ones, 0.5), whole.solve(1.0, ones, 0.5), atol=1e-5)


def test_the_error_of_a_map_is_that_of_its_rows():
    x, r = data(9, 50)
    sums = equations(x, r)
    matrix = np.random.default_rng(4).normal(size=(r.shape[1], x.shape[1]))
    expected = np.square(r - x @ matrix.T).sum() - np.square(r).sum()
    assert sums.error_of(torch.from_numpy(matrix)) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(sums.error_of(torch.from_numpy(matrix * np.nan)))


def test_products_of_bfloat16_are_exact():
    x, r = data(4, 300)
    x = torch.from_numpy(x).bfloat16()
    before = torch.get_float32_matmul_precision()
    sums = NormalEquations.empty(7, 3, torch.device("cpu"))
    sums.add(x, torch.from_numpy(r))
    assert torch.get_float32_matmul_precision() == before
    exact = x.double().numpy()
    np.testing.assert_allclose(sums.gram.numpy(), exact.T @ exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sums.cross.numpy(), exact.T @ r, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_that_are_set_by_backend_are_left_alone(dtype):
    """torch has no common word for them then, and raises where it is asked for one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        x, r = (torch.from_numpy(values).to(dtype) for values in data(7, 40))
        sums = NormalEquations.empty(7, 3, torch.device("cpu"))
        sums.add(x, r)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    np.testing.assert_allclose(sums.gram, x.double().T @ x.double(), atol=1e-4)


# Maps chosen by held-out tokens
INPUTS, OUTPUTS = 9, 4
WEIGHTS = (0.01, 0.1, 1.0)


def tokens(seed, rows, noise, scale=1.0):
    """Inputs, and targets that are a map of them and noise."""
    matrix = np.random.default_rng(0).normal(size=(OUTPUTS, INPUTS))
    generator = np.random.default_rng(seed)
    x = scale * generator.normal(size=(rows, INPUTS))
    return x, x @ matrix.T + scale * noise * generator.normal(size=(rows, OUTPUTS))


def fitted(rows, noise):
    sums = NormalEquations.empty(INPUTS, OUTPUTS, torch.device("cpu"))
    (x, r), (a, b) = tokens(1, rows, noise), tokens(2, 5, noise, 30)
    sums.add(torch.from_numpy(x), torch.from_numpy(r))
    sums.keep(torch.from_numpy(a), torch.from_numpy(b))
    return sums, (x, r), (a, b)


def held_out(noise, others=7.0, firsts=900.0):
    rows = tokens(3, 40, noise), tokens(4, 5, noise, 30)
    kinds = [
        Rows([tuple(torch.from_numpy(v) for v in part)], reached)
        for part, reached in zip(rows, (others, firsts), strict=True)
    ]
    return HeldOut(*kinds), rows


def ridge_map(others, firsts, ridge, weight):
    x, r = others
    gram = x.T @ x + weight * firsts[0].T @ firsts[0]
    gram += ridge * np.square(x).sum(axis=0).mean() * np.eye(INPUTS)
    return np.linalg.solve(gram, x.T @ r + weight * firsts[0].T @ firsts[1]).T


def relative_error(rows, solution, reached=(7.0, 900.0)):
    errors = (np.square(r - x @ solution.T).sum() for x, r in rows)
    return sum(error / size for error, size in zip(errors, reached, strict=True))


@pytest.mark.parametrize(("rows", "noise"), [(12, 3.0), (300, 0.5), (40, 10.0)])
def test_it_is_the_best_of_a_full_search(rows, noise):
    sums, others, firsts = fitted(rows, noise)
    held, kept = held_out(noise)
    errors = {
        ridge: relative_error(kept, ridge_map(others, firsts, ridge, WEIGHTS[0]))
        for ridge in RIDGES
    }
    ridge = min(errors, key=errors.get)
    weights = {w: relative_error(kept, ridge_map(others, firsts, ridge, w)) for w in WEIGHTS}
    solution, *found = choose(sums, held, sums.scale.expand(INPUTS), first_weights=WEIGHTS)
    assert found == [ridge, min(weights, key=weights.get)]
    wanted = ridge_map(others, firsts, *found)
    np.testing.assert_allclose(solution, wanted, atol=1e-4)


def test_the_choices_of_the_test_differ():
    """So that a choice that is not made would be noticed."""
    found = {
        choose(sums, held_out(noise)[0], sums.scale.expand(INPUTS), first_weights=WEIGHTS)[1]
        for rows, noise in ((12, 3.0), (300, 0.5), (40, 10.0))
        for sums in (fitted(rows, noise)[0],)
    }
    assert len(found) > 1


def test_errors_are_shares_of_the_states():
    held, kept = held_out(1.0)
    solution = np.random.default_rng(5).normal(size=(OUTPUTS, INPUTS))
    expected = relative_error(kept, solution)
    assert held.relative_error(torch.from_numpy(solution)) == pytest.approx(expected, rel=1e-5)
    nothing = np.square(kept[0][1]).sum()
    assert held.others.error() == pytest.approx(nothing, rel=1e-5)


def test_no_map_is_chosen_where_none_is_finite():
    sums, _, _ = fitted(30, 1.0)
    sums.cross[0, 0] = torch.nan
    assert choose(sums, held_out(1.0)[0], sums.scale.expand(INPUTS), first_weights=(0.1,)) is None

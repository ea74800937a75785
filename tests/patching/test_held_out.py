"""Maps chosen by held-out tokens, against NumPy in float64."""

import numpy as np
import pytest
import torch

from shallower.patching.least_squares import RIDGES, HeldOut, NormalEquations, Rows, choose

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
    found = choose(sums, held, sums.scale.expand(INPUTS), first_weights=WEIGHTS)
    assert (found.ridge, found.first_weight) == (ridge, min(weights, key=weights.get))
    wanted = ridge_map(others, firsts, ridge, found.first_weight)
    np.testing.assert_allclose(found.solution, wanted, atol=1e-4)


def test_the_choices_of_the_test_differ():
    """So that a choice that is not made would be noticed."""
    found = {
        choose(sums, held_out(noise)[0], sums.scale.expand(INPUTS), first_weights=WEIGHTS).ridge
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

"""`settling.py` on made-up texts: blocks that are nearly alike, and one that is clearly worse."""

import numpy as np
import pytest

import settling
from shallower import Until

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    level = rng.normal(0.2, 0.03, (500, 1))  # what is hard for one block is hard for all
    means = rng.uniform(0, 0.02, NUM_LAYERS * (NUM_LAYERS + 1) // 2)
    return np.clip(level + means + rng.normal(0, 0.02, (500, len(means))), 0, 1).astype("f4")


@pytest.mark.parametrize(("exact", "most"), [(False, 1024), (True, 3072)])
def test_in_miniature(pool, exact, most):
    until = Until(0.9, 0.02, (1, 2), exact)
    row = settling.simulated(pool, NUM_LAYERS, until, repeats=20, most=most)
    assert row["open"] == 0
    assert 128 <= row["texts"][0] < most


def test_bets_miss_no_rival(pool):
    row = settling.missed(pool, NUM_LAYERS, 1, exact=True, repeats=20, most=512)
    assert set(row["missed"].values()) == {0.0}


def test_a_wrong_rule_is_found(pool, monkeypatch):
    monkeypatch.setattr("shallower.scanning.settling.width", lambda count, error: -1.0)
    until = Until(0.9, 0.0, (1,))
    with pytest.raises(AssertionError):
        settling.simulated(pool, NUM_LAYERS, until, repeats=20)

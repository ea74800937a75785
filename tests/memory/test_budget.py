"""The bound of all states that a process keeps."""

import gc

import pytest

import shallower as sh
from shallower.memory import budget
from shallower.memory.budget import BUDGET, Budget, limit


class Store:
    """Something that keeps states."""


@pytest.fixture
def free(monkeypatch):
    """A machine with 800 bytes free, of which a test may take some."""
    machine = {"bytes": 800}
    monkeypatch.setattr(budget, "available_bytes", lambda _device: machine["bytes"])
    return machine


def test_every_store_gets_half_of_what_is_left(free):
    bound, stores = Budget(), [Store() for _ in range(3)]
    assert [bound.share(store) for store in stores] == [200, 100, 50]
    assert bound.left == 50


def test_what_a_store_had_is_left_when_it_is_gone(free):
    bound, first, second = Budget(), Store(), Store()
    bound.share(first)
    assert bound.share(second) == 100
    del first
    gc.collect()
    assert bound.left == 300
    del second
    gc.collect()
    free["bytes"] = 1000
    assert bound.share(Store()) == 250


def test_a_store_is_given_all_that_it_needs_or_nothing(free):
    bound, store = Budget(), Store()
    assert not bound.reserve(store, 401)
    assert bound.left == 400
    assert bound.reserve(store, 300)
    assert not bound.reserve(Store(), 101)
    assert bound.left == 100


def test_what_is_kept_in_any_case_is_counted(free):
    bound, kept, store = Budget(), Store(), Store()
    bound.hold(kept, 100)
    assert bound.left == 300
    bound.hold(kept, 900)
    assert (bound.left, bound.share(store)) == (0, 0)


def test_what_others_have_taken_meanwhile_is_not_given_away(free):
    bound, store = Budget(), Store()
    assert bound.share(store) == 200
    free["bytes"] = 60
    assert bound.left == 30


def test_a_limit_bounds_the_stores_that_begin_under_it(free, monkeypatch):
    monkeypatch.setattr(budget, "BUDGET", Budget())
    bound, store, other = budget.BUDGET, Store(), Store()
    with limit("400"):
        assert bound.share(store) == 100
        with limit(None):
            assert bound.bound == 400
    assert bound.bound is None
    with limit(10**6):  # there is less
        assert bound.share(other) == 200


def test_a_limit_that_is_no_size_is_refused():
    with pytest.raises(sh.ModelError), limit("much"):
        pass
    assert BUDGET.bound is None

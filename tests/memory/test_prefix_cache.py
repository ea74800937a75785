"""States that cuts share: what is kept, and that it is what would be run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower.memory.prefix_cache import Prefixes
from shallower.models.layerwise import Layerwise
from tests.conftest import tiny_llama
from tests.models.batches import batch


def run(store, path):
    """The states of the only batch behind a path."""
    found = {}
    store.run([(0, path)], found.__setitem__)
    return found[0, path]


STATE = torch.zeros(1)


def cache(capacity, sizes, every):
    """A store of so many bytes for batches of these sizes, of every so many layers."""
    store = Prefixes(None, [])
    vars(store).update(_capacity=capacity, _sizes=sizes, _every=every)
    return store


paths = st.sets(st.integers(0, 5)).map(lambda layers: tuple(sorted(layers)))


@given(
    st.lists(st.tuples(st.integers(0, 1), paths), min_size=1, max_size=20),
    st.integers(0, 12),
    st.integers(1, 4),
)
def test_no_more_is_kept_than_fits(asked, room, every):
    sizes = [10, 25]
    kept, tried = cache(room * 10, sizes, every), set()
    for index, path in asked:
        for depth in range(len(path)):
            kept._keep((index, path[:depth]), STATE)
            tried.add((index, path[:depth]))
        found = [place for place in tried if place in kept._cached]
        assert sum(sizes[index] for index, _ in found) <= room * 10
        assert all(len(layers) % every == 0 for _, layers in found)


def test_the_longest_beginning_is_found():
    kept = cache(1000, [1], 1)
    for depth in range(4):
        kept._keep((0, (0, 1, 2, 4)[:depth]), torch.tensor(depth))
    for path, depth in (((0, 1, 2), 3), ((0, 1, 3), 2), ((1,), 0)):
        assert kept._start(0, path) == (depth, depth)
    kept._keep((0, (0, 1, 3)), STATE)
    assert kept._start(0, (0, 1, 3))[0] == 3


def test_what_was_longest_not_needed_goes_first():
    kept = cache(3, [1], 1)
    for path in ((), (0,), (1,)):
        kept._keep((0, path), STATE)
    kept._start(0, (0, 2))  # needs the embedding and what is behind layer 0
    for path, gone in (((2,), (1,)), ((3,), (0,))):
        assert (0, gone) in kept._cached
        kept._keep((0, path), STATE)
        assert (0, gone) not in kept._cached
    assert all((0, path) in kept._cached for path in ((), (2,), (3,)))


def test_a_state_that_fits_nowhere_drives_nobody_out():
    kept = cache(10, [1, 50], 1)
    kept._keep((0, ()), STATE)
    kept._keep((1, ()), STATE)
    assert (0, ()) in kept._cached
    assert (1, ()) not in kept._cached


def test_every_second_state_is_kept_where_two_paths_do_not_fit():
    layerwise, some = Layerwise(tiny_llama(6)), batch()
    of_state = some.input_ids.size * 32 * 4
    for states, every in [(12, 1), (11, 2), (6, 2), (5, 3), (4, 3), (3, 6), (0, 6)]:
        store = Prefixes(layerwise, [some], memory=states * of_state)
        assert store._every == every, states


@pytest.mark.parametrize("memory", [None, 0, 20_000])
def test_a_path_is_what_its_layers_make(memory):
    layerwise, some = Layerwise(tiny_llama(6)), batch()
    store = Prefixes(layerwise, [some], memory=memory)
    for path in [(0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 5), (0, 1, 3, 5), (), (5,), (0, 1, 2)]:
        expected = layerwise.run(some, layerwise.embed(some), path)
        assert torch.equal(run(store, path), expected)


def test_states_are_not_changed_by_who_gets_them(monkeypatch):
    layerwise, some = Layerwise(tiny_llama(6)), batch()
    store = Prefixes(layerwise, [some])
    run(store, (0, 1, 2, 3))
    monkeypatch.setattr(layerwise, "run", None)  # not needed
    first, again = (run(store, (0, 1, 2)) for _ in range(2))
    assert torch.equal(first, again)


def test_the_states_after_each_layer_are_given():
    layerwise, some = Layerwise(tiny_llama(6)), batch()
    found_after: list[torch.Tensor] = []
    start = layerwise.embed(some)
    end = layerwise.run(some, start, (0, 2, 5), each=found_after.append)
    assert len(found_after) == 3
    assert found_after[-1] is end
    states = start
    for layer, found in zip((0, 2, 5), found_after, strict=True):
        states = layerwise.run(some, states, (layer,))
        assert torch.equal(found, states)
    assert all(not module._forward_hooks for module in layerwise.modules)

"""Blocks and sets of layers."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower import Block, LayersError, Plan
from shallower.values.layers import blocks_of, dropped_layers
from tests.values.damage import peak_memory

NO_INDICES = [True, np.True_, 1.0, np.float64(1), "1", b"1", None, 1j, [1], float("nan")]


def test_a_block_is_half_open():
    block = Block(3, 7, 0.5, 0.1)
    assert list(block.layers) == [3, 4, 5, 6]
    assert len(block) == 4
    assert str(block) == "[3, 7)"


def test_a_block_equals_its_range_alone():
    assert Block(11, 19, 0.3, 0.1) == Block(11, 19)
    assert hash(Block(11, 19, 0.3, 0.1)) == hash(Block(11, 19))
    assert Block(11, 19) != Block(11, 18)


def test_a_block_holds_plain_integers():
    block = Block(np.int64(3), torch.tensor(7))
    assert type(block.start) is int
    assert type(block.stop) is int
    assert json.loads(json.dumps(block.to_json())) == {
        "start": 3, "stop": 7, "score": None, "stderr": None,
    }  # fmt: skip


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 3), (3, 2), (-1, 2), (-3, -1)])
def test_a_block_without_layers_is_refused(start, stop):
    with pytest.raises(LayersError, match="0 <= start < stop"):
        Block(start, stop)


@pytest.mark.parametrize(
    "layers",
    [
        Block(2, 5), [Block(2, 5)], range(2, 5), [range(2, 5)], [2, 3, 4], (4, 3, 2), {2, 3, 4},
        [Block(2, 4), 4], [4, range(2, 4)], np.arange(2, 5), torch.arange(2, 5),
        pytest.param(iter([4, 2, 3]), id="iter"), [range(4, 1, -1)], [np.int32(2), Block(3, 5)],
    ],
    ids=repr,
)  # fmt: skip
def test_layers_are_named_in_any_mixture(layers):
    dropped = dropped_layers(6, layers)
    assert dropped == (2, 3, 4)
    assert {type(layer) for layer in dropped} == {int}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], "no layer 6"), ([-1], "no layer -1"), (Block(4, 7), "no layer 6"),
        ([10**30], "no layer"), ([2, 2], "layer 2 is named twice"),
        ([Block(1, 4), 3], "layer 3 is named twice"), ([], "no layer is named"),
        ([range(3, 3)], "no layer is named"), (range(6), "at least one must stay"),
        ([Block(0, 6)], "at least one must stay"),
    ],
)  # fmt: skip
def test_layers_that_cannot_go_are_refused(layers, message):
    with pytest.raises(LayersError, match=message):
        dropped_layers(6, layers)


@pytest.mark.parametrize("layers", ["3", b"3", 3, None, 2.5, object()])
def test_what_holds_no_layers_is_refused(layers):
    with pytest.raises(LayersError):
        dropped_layers(6, layers)


@pytest.mark.parametrize("value", NO_INDICES)
def test_what_is_no_layer_is_refused(value):
    for named in (lambda: dropped_layers(6, [2, value]), lambda: Block(0, value)):
        with pytest.raises(LayersError):
            named()


def test_a_block_far_too_long_costs_no_memory():
    def name_a_million():
        with pytest.raises(LayersError):
            dropped_layers(32, [Block(0, 1_000_000)])

    assert peak_memory(name_a_million) < 1_000_000


@given(st.integers(2, 40), st.data())
def test_blocks_and_layers_are_two_ways_to_say_the_same(num_layers, data):
    subsets = st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1)
    layers = tuple(sorted(data.draw(subsets)))
    blocks = blocks_of(layers)
    assert dropped_layers(num_layers, blocks) == layers
    assert all(left.stop < right.start for left, right in itertools.pairwise(blocks))
    plan = Plan(num_layers, blocks)
    assert plan.dropped == layers
    assert sorted(plan.dropped + plan.survivors) == list(range(num_layers))


def test_no_layers_are_no_blocks():
    assert blocks_of([]) == ()

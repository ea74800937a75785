"""Operations recorded on tensors that are there: products, and the stretches between them."""

import torch
from torch import nn

from shallower.savings.operations import Recorder

FLOAT = 4


class Block(nn.Module):
    """A norm, a matrix, an activation, a matrix, a residual sum."""

    def __init__(self, width=16, inner=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, states):
        normed = self.scale * states * states.pow(2).mean(-1, keepdim=True).rsqrt()
        return states + self.down(torch.relu(self.up(normed)))


def recorded(model, *inputs, layers=(), **options):
    recorder = Recorder(model, **options)
    with torch.no_grad(), recorder.inside(layers):
        model(*inputs)
    return recorder.operations


def test_products_and_stretches_by_hand():
    rows, width, inner = 5, 16, 32
    norm, up, relu, down, residual = recorded(Block(), torch.ones(rows, width))
    states, hidden = FLOAT * rows * width, FLOAT * rows * inner
    matrix = FLOAT * width * inner
    assert (norm.flops, norm.read, norm.written) == (0, states + FLOAT * width, states)
    assert (up.flops, up.read, up.written) == (2 * rows * width * inner, states + matrix, hidden)
    assert (relu.flops, relu.read, relu.written) == (0, hidden, hidden)
    assert down.flops == 2 * rows * width * inner
    assert (down.read, down.written) == (hidden + matrix + FLOAT * width, states)
    # Nobody reads the sum inside this body, so that nothing says that it is written.
    assert (residual.read, residual.written) == (2 * states, 0)
    assert [one.launches for one in (norm, up, relu, down, residual)] == [5, 1, 1, 1, 1]


def test_what_is_made_and_read_within_a_stretch_does_not_reach_memory():
    class Chain(nn.Module):
        def forward(self, value):
            for _ in range(10):
                value = (value * 2).sin()
            return value @ value.T

    stretch, product = recorded(Chain(), torch.ones(4, 8))
    assert (stretch.read, stretch.written) == (FLOAT * 32, FLOAT * 32)
    assert product.flops == 2 * 4 * 8 * 4


def test_operations_know_their_layer():
    model = nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 4))
    found = recorded(model, torch.ones(3, 8), layers=[model[1], model[2]])
    places = [one.layer for one in found]
    assert places == [None, *[0] * 5, *[1] * 5, None]
    # A residual sum ends with its layer, so that layers can be taken out by themselves.
    assert [o.flops for o in found if o.layer == 0] == [o.flops for o in found if o.layer == 1]
    first, second = ([(o.read, o.written) for o in found if o.layer == i] for i in (0, 1))
    assert first == second


def test_rows_of_a_table_are_read_where_they_are_used():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(1000, 16), nn.Linear(16, 4, bias=False)

        def forward(self, ids):
            return self.head(self.table(ids))

    (head,) = recorded(Embedded(), torch.tensor([3, 1, 2]))
    assert head.read == FLOAT * (3 * 16 + 16 * 4)


def test_new_keys_are_put_behind_those_of_a_cache():
    class Appending(nn.Module):
        def forward(self, cached, new, query):
            keys = torch.cat([cached, new], dim=-2)
            return query @ keys.transpose(-1, -2)

    cached, new = torch.ones(2, 50, 8), torch.ones(2, 1, 8)
    append, product = recorded(Appending(), cached, new, torch.ones(2, 1, 8), cached=[cached])
    assert (append.read, append.written) == (FLOAT * 16, FLOAT * 16)
    assert product.read == FLOAT * 2 * (51 * 8 + 8)
    copied, _ = recorded(Appending(), cached, new, torch.ones(2, 1, 8))
    assert (copied.read, copied.written) == (FLOAT * 2 * 51 * 8, FLOAT * 2 * 51 * 8)


def test_fused_attention_is_one_product():
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    query, key = torch.ones(1, 8, 10, 4), torch.ones(1, 2, 10, 4)
    (one,) = recorded(Attention(), query, key, key)
    assert one.flops == 4 * 8 * 10 * 10 * 4
    assert (one.read, one.written) == (FLOAT * 4 * 10 * (8 + 2 + 2), FLOAT * 4 * 10 * 8)


def test_heads_that_are_repeated_are_read_once():
    class Repeating(nn.Module):
        def forward(self, query, key):
            wide = key[:, :, None].expand(1, 2, 4, 10, 4).reshape(1, 8, 10, 4)
            return query @ wide.transpose(-1, -2)

    repeat, product = recorded(Repeating(), torch.ones(1, 8, 10, 4), torch.ones(1, 2, 10, 4))
    keys, query = FLOAT * 2 * 10 * 4, FLOAT * 8 * 10 * 4
    assert (repeat.read, repeat.written) == (keys, keys)
    assert product.read == keys + query


def test_what_is_written_in_place_is_written_once():
    class InPlace(nn.Module):
        def forward(self, state, update):
            state.add_(update).mul_(2)

    (one,) = recorded(InPlace(), torch.ones(6), torch.ones(6))
    assert (one.read, one.written) == (FLOAT * 12, FLOAT * 6)

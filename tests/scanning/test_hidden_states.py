"""Hidden states against plain forwards, and what hooks leave behind."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import shallower as sh
from shallower.scanning.builder import ScanBuilder
from shallower.scanning.hidden_states import stream
from shallower.texts.batches import Batch
from shallower.values.positions import Positions
from tests.conftest import mostly_slow, tiny_llama
from tests.families import random_model
from tests.scanning.batches import plain_states

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}
SEQUENCES = [
    list(range(start, start + n)) for start, n in ((3, 7), (20, 1), (40, 5), (9, 7), (60, 3))
]
FAMILIES = ["gpt2", "opt", "qwen2", "gemma2, two kinds", "phi", "llama, tied"]


CHOSEN = ["last", "last:2", "last:9", "random:1", "random:3", "all"]


def padded(sequences, left=False, first=0):
    """A batch by hand; pads hold a token of their own, so that reading one shows."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), 99, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return Batch(ids, mask, np.arange(first, first + len(sequences)))


def batched(sequences, size, left=False):
    return [
        padded(sequences[start : start + size], left, start)
        for start in range(0, len(sequences), size)
    ]


def states_of(model, batches):
    """(S, L+1, D), by sample."""
    parts = [(part.samples, part.states) for part in stream(model, batches)]
    joined = torch.cat([states for _, states in parts], dim=1).transpose(0, 1)
    return joined[np.argsort(np.concatenate([samples for samples, _ in parts]))]


def hooks_in(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize(
    ("size", "left", "family"),
    mostly_slow(
        itertools.product([1, 2, 5], [True, False], FAMILIES),
        [(size, size == 2, family) for size in (2, 5) for family in FAMILIES],
    ),
)
def test_the_last_token_is_found_under_any_padding(family, left, size):
    model = random_model(family)
    got = states_of(model, batched(SEQUENCES, size, left))
    for sequence, states in zip(SEQUENCES, got, strict=True):
        expected, normed = plain_states(model, sequence)
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        assert (states[-1] - normed).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "left"),
    mostly_slow(
        itertools.product(CHOSEN, [True, False]),
        [*zip(CHOSEN, 3 * [True, False], strict=True)],
    ),
)
def test_the_chosen_tokens_are_those_of_a_plain_forward(llama, name, left):
    positions = Positions.parse(name, 5)
    (whole,) = stream(llama, [padded(SEQUENCES)], Positions.parse("all"))
    lengths = [len(sequence) for sequence in SEQUENCES]
    starts = np.cumsum([0, *lengths])
    assert whole.states.shape == (7, sum(lengths), 32)
    for text, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            ids = torch.tensor([sequence])
            hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat(hidden[:-1])
        got = whole.states[:-1, starts[text] : starts[text + 1]]
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for size in (1, 2, len(SEQUENCES)):
        batches = batched(SEQUENCES, size, left)
        for batch, part in zip(batches, stream(llama, batches, positions), strict=True):
            wanted = [positions.chosen(lengths[text], text) for text in batch.samples]
            texts = np.repeat(batch.samples, [len(tokens) for tokens in wanted])
            assert part.samples.tolist() == texts.tolist()
            assert part.sequences is (None if positions.one_a_text else part.samples)
            assert (part.state_first, part.steps) == (True, len(batch))
            expected = whole.states[:, starts[texts] + np.concatenate(wanted)]
            torch.testing.assert_close(part.states, expected, atol=2e-6, rtol=1e-5)
            assert part.states.is_contiguous()


def test_a_batch_without_tokens_gives_no_rows(llama):
    empty = Batch(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), np.arange(2))
    (part,) = stream(llama, [empty], Positions.parse("all"))
    states, samples = part.states, part.samples
    assert states.shape == (7, 0, 32)
    assert samples.shape == (0,)
    builder = ScanBuilder(7, ["angular"], keep_samples=True)
    builder.add(states, samples, state_first=True, sequences=samples)
    builder.add(torch.ones(7, 1, 32), [0], state_first=True, sequences=np.array([3]))
    builder.add(states, samples, state_first=True, sequences=samples)
    builder.add(torch.ones(7, 1, 32), [0], state_first=True, sequences=np.array([3]))
    scan = builder.finish()
    assert (scan.num_samples, scan.num_sequences, len(scan.samples())) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_come_in_the_dtype_of_the_model(dtype):
    model = tiny_llama(3).to(dtype)
    (part,) = stream(model, [padded(SEQUENCES)])
    states = part.states
    assert states.dtype == dtype
    assert states.device.type == "cpu"
    assert not states.requires_grad
    assert states.is_contiguous()


def test_neither_the_head_nor_a_cache_is_used(llama):
    seen = []
    llama.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    caches = {"cache", "past_key_values"}  # the older name until transformers 5.23
    llama.model.register_forward_hook(lambda _module, _args, out: seen.append(caches & set(out)))
    list(stream(llama, batched(SEQUENCES, 2)))
    assert seen == [set()] * 3


def mixed_modes(model):
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.eval()
    return [module.training for module in model.modules()]


def at_the_end(llama):
    list(stream(llama, batched(SEQUENCES, 2)))


def when_the_consumer_stops_early(llama):
    streamed = stream(llama, batched(SEQUENCES, 1))
    next(streamed)
    assert hooks_in(llama) == 7
    streamed.close()


def when_the_batches_raise(llama):
    def broken():
        yield padded(SEQUENCES)
        yield padded(SEQUENCES)
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        list(stream(llama, broken()))


def when_the_model_raises(llama):
    with pytest.raises(IndexError):
        list(stream(llama, [padded([[5, 1000]])]))


@pytest.mark.parametrize(
    "end",
    [at_the_end, when_the_consumer_stops_early, when_the_batches_raise, when_the_model_raises],
)
def test_nothing_is_left_behind(llama, end):
    modes = mixed_modes(llama)
    end(llama)
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes


def test_hooks_of_others_stay(llama):
    seen = []
    llama.model.layers[2].register_forward_hook(lambda *_: seen.append(2))
    list(stream(llama, batched(SEQUENCES, 5)))
    assert hooks_in(llama) == 1
    assert seen == [2]


def test_dropout_is_off():
    model = tiny_llama(attention_dropout=0.5).train()
    one, other = (states_of(model, batched(SEQUENCES, 5)) for _ in range(2))
    assert torch.equal(one, other)
    assert model.training


class Tuples(nn.Module):
    """A layer as transformers wrote them: keyword input, a tuple out."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states), "attentions"


class TupleModel(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Tuples(config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids, **_):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states=hidden_states)
        return self.norm(hidden_states)


@pytest.mark.parametrize("size", [1, 5])
def test_a_layer_that_returns_a_tuple_is_read_by_its_states(size):
    torch.manual_seed(3)
    model = TupleModel(LlamaConfig(**SIZES, intermediate_size=48)).eval()
    got = states_of(model, batched(SEQUENCES, size))
    for sequence, states in zip(SEQUENCES, got, strict=True):
        expected = [model.embed(torch.tensor(sequence[-1]))]
        for layer in model.layers:
            expected.append(layer(expected[-1])[0])
        torch.testing.assert_close(states, torch.stack(expected).detach())


class Reversed(TupleModel):
    def forward(self, input_ids, **_):
        return self.layers[0](hidden_states=self.embed(input_ids))


def test_a_model_that_does_not_run_all_its_layers_is_refused():
    model = Reversed(LlamaConfig(**SIZES, intermediate_size=48))
    with pytest.raises(sh.ModelError, match=r"no states for \[1, 2, 3, 4\]"):
        list(stream(model, [padded(SEQUENCES)]))
    assert hooks_in(model) == 0


def test_layers_whose_owner_takes_no_tokens_are_run_by_the_model_around_it():
    model = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=48, is_decoder=True)).eval()
    expected = torch.stack([plain_states(model, sequence)[0] for sequence in SEQUENCES])
    assert torch.allclose(states_of(model, batched(SEQUENCES, 2)), expected, atol=1e-5)


def test_states_with_the_batch_on_another_axis_are_refused():
    model = XLNetLMHeadModel(
        XLNetConfig(vocab_size=100, d_model=32, n_layer=4, n_head=4, d_inner=48)
    ).eval()
    with pytest.raises(sh.ModelError, match=r"\(B, T, D\)"):
        list(stream(model, batched(SEQUENCES[:1] * 3, 3)))

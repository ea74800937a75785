"""Logits a few rows at a time, against the whole forward of the model."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from shallower.errors import ModelError
from shallower.models import head as head_module
from shallower.models.decoder import Decoder
from shallower.models.head import FEWEST_ROWS, LOGITS_AT_ONCE, Head, part_sizes
from tests.conftest import mostly_slow, tiny_llama
from tests.families import FAST, families, random_model
from tests.models.batches import batch

AS_A_WHOLE: set[str] = set()
"""Families whose logits are made of more than the final states: none."""


WITHOUT_PADDING = {"bailing_hybrid"}
"""Families whose own forward fails on padding, in these sizes."""


def tensors(some):
    return torch.from_numpy(some.input_ids), torch.from_numpy(some.attention_mask)


def expected(model, ids, mask, tokens):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.flatten(0, 1)[torch.from_numpy(tokens)]


@torch.no_grad()
def assert_same(model, head, some, tolerance=0.0):
    """The logits of all tokens of a batch, in parts and by the whole forward."""
    ids, mask = tensors(some)
    tokens = np.flatnonzero(some.attention_mask)
    parts = list(head.logits_of(ids, mask, tokens))
    whole = expected(model, ids, mask, tokens)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=tolerance)
    return parts


@pytest.mark.parametrize("name", mostly_slow(families(), FAST[::2]))
def test_the_head_of_every_family_takes_rows(monkeypatch, name):
    model = random_model(name)
    head = Head.of(Decoder.of(model))
    assert head.by_rows == (name not in AS_A_WHOLE)
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 5 * head.vocab_size)
    some = batch(vocabulary=60)
    if name in WITHOUT_PADDING:
        some.attention_mask[:] = 1
    parts = assert_same(model, head, some)
    assert len(parts) > 1
    assert all(4 <= len(part) <= 7 for part in parts)


class WithInputs(LlamaForCausalLM):
    """A model whose logits depend on the token itself, beside the states."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits + input_ids[..., None]
        return output


class Twice(LlamaForCausalLM):
    """A model that runs its layers twice."""

    def forward(self, input_ids, **options):
        once = self.model(input_ids=input_ids, **options)
        return super().forward(input_ids=None, inputs_embeds=once[0], **options)


class Alone(LlamaForCausalLM):
    """A model that holds its layers itself, without an inner model of transformers."""

    def __init__(self, config):
        super().__init__(config)
        self.layers, self.embedding = self.model.layers, self.model.embed_tokens
        self.rotary = self.model.rotary_emb
        del self.model

    def get_decoder(self):
        return self

    def forward(self, input_ids, **_options):
        states = self.embedding(input_ids)
        places = self.rotary(states, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            states = layer(states, position_embeddings=places)
        return CausalLMOutput(logits=self.lm_head(states))


@pytest.mark.parametrize("kind", [WithInputs, Twice, Alone])
def test_a_model_whose_head_takes_more_than_states_runs_as_a_whole(kind):
    torch.manual_seed(0)
    model = kind(tiny_llama(2).config).eval()
    head = Head.of(Decoder.of(model))
    assert not head.by_rows
    assert_same(model, head, batch())


def test_nothing_is_made_of_tokens_that_nobody_asks_for(llama):
    head = Head.of(Decoder.of(llama))
    ids, mask = tensors(batch())
    seen = []
    llama.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape))
    wanted = np.array([3, 5, 7, 8, 20])
    with torch.no_grad():
        (found,) = head.logits_of(ids, mask, wanted)
        assert seen == [(5, 1, 32)]
        torch.testing.assert_close(found, expected(llama, ids, mask, wanted), rtol=0, atol=0)


def test_padding_on_the_left_is_as_good(llama):
    some = batch()
    some.input_ids[:] = some.input_ids[:, ::-1]
    some.attention_mask[:] = some.attention_mask[:, ::-1]
    assert_same(llama, Head.of(Decoder.of(llama)), some)


def test_what_else_the_inner_model_returns_does_no_harm():
    """Mixtral makes a loss of it, beside the logits, if its config says so."""
    model = random_model("mixtral")
    model.config.output_router_logits = True
    head = Head.of(Decoder.of(model))
    assert head.by_rows
    assert_same(model, head, batch())


def test_more_rows_than_positions():
    model = random_model("gpt2")
    head = Head.of(Decoder.of(model))
    assert_same(model, head, batch(rows=20, length=100))
    assert 3 * model.config.n_positions < 20 * 100


def test_a_head_of_numbers_that_are_none_takes_rows(llama):
    with torch.no_grad():
        llama.lm_head.weight[3:5] = torch.tensor([[torch.nan], [torch.inf]])
    head = Head.of(Decoder.of(llama))
    assert head.by_rows


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_offloaded_come_and_go(tied):
    """accelerate replaces the forward of every module; afterwards its own are there again."""
    model = cpu_offload(tiny_llama(2, tie_word_embeddings=tied), execution_device="cpu")
    kept = [vars(module).get("forward") for module in model.modules()]
    assert any(kept)
    head = Head.of(Decoder.of(model))
    assert head.by_rows
    assert_same(model, head, batch())
    assert [vars(module).get("forward") for module in model.modules()] == kept


def test_a_model_is_as_it_was_when_its_forward_fails(llama):
    head = Head.of(Decoder.of(llama))
    with pytest.raises(IndexError):
        head.states(torch.full((1, 3), 1000), torch.ones((1, 3)))
    with pytest.raises(RuntimeError):
        head.logits(torch.zeros((4, 31)))
    assert not any("forward" in vars(module) for module in llama.modules())


def test_a_forward_that_does_not_run_the_layers_is_told(llama):
    head = Head.of(Decoder.of(llama))
    with pytest.raises(ModelError, match="did not run its layers"):
        head.reached_by(lambda: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_keep_their_dtype(dtype):
    model = tiny_llama(2).to(dtype)
    head = Head.of(Decoder.of(model))
    assert (head.by_rows, head.dtype, head.vocab_size) == (True, dtype, 100)
    scale = 100 * torch.finfo(dtype).eps
    assert_same(model, head, batch(), scale)


@given(st.integers(0, 1 << 20), st.integers(1, 1 << 30))
def test_rows_are_shared_out_evenly(num_rows, vocab_size):
    sizes = part_sizes(num_rows, vocab_size)
    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(num_rows, FEWEST_ROWS)
    assert max(sizes) * vocab_size <= LOGITS_AT_ONCE or max(sizes) < 2 * FEWEST_ROWS


def test_a_head_without_memory_is_no_head_of_another_kind(llama, monkeypatch):
    """A model that is run as a whole needs more of it."""

    def out_of_memory(_head, _rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Head, "logits", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Head.of(Decoder.of(llama))
    assert not any("forward" in vars(module) for module in llama.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow(families(), FAST[::2]))
def test_states_that_were_kept_make_the_same_logits(monkeypatch, name):
    model = random_model(name)
    head = Head.of(Decoder.of(model))
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 5 * head.vocab_size)
    some = batch(vocabulary=60)
    if name in WITHOUT_PADDING:
        some.attention_mask[:] = 1
    ids, mask = tensors(some)
    tokens = np.flatnonzero(some.attention_mask)[1::2]
    for one in (head, head.whole()):
        kept = one.states_at(ids, mask, tokens)
        assert len(kept) == len(tokens)
        parts = list(one.logits_from(kept.clone()))
        assert len(parts) > 1
        made = torch.cat(list(one.logits_of(ids, mask, tokens)))
        torch.testing.assert_close(torch.cat(parts), made, rtol=0, atol=0)
        assert list(map(len, one.logits_from(kept[:1]))) == [1]


@torch.no_grad()
def test_two_heads_of_one_model_take_turns_where_its_weights_are_offloaded():
    model = cpu_offload(tiny_llama(2), execution_device="cpu")
    places = {name: one.device for name, one in model.named_parameters()}
    some = batch()
    ids, mask = tensors(some)
    tokens = np.flatnonzero(some.attention_mask)
    for _ in range(2):
        one, other = Head.of(Decoder.of(model)), Head.of(Decoder.of(model))
        kept = one.states_at(ids, mask, tokens)
        for pair in zip(one.logits_from(kept), other.logits_from(kept), strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=0)
        assert {name: one.device for name, one in model.named_parameters()} == places
    assert_same(model, one, some)

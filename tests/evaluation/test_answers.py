"""Answers: those of plain forwards without a cache, whatever runs beside them."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

import shallower as sh
from shallower.evaluation import answers as module
from shallower.evaluation.answers import write_answers
from shallower.models.decoder import Decoder
from shallower.models.offload import reading_of
from tests.conftest import mostly_slow, tiny_llama, word_tokenizer
from tests.evaluation.answering import log_softmax, plain_answer, plain_logits
from tests.families import random_model

PROMPTS = [np.random.default_rng(i).integers(0, 97, 2 + 5 * i % 13) for i in range(20)]
WORDS = word_tokenizer()
EOS = 99


def said(model, prompts=PROMPTS, num_tokens=5, tokenizer=WORDS, **options):
    return write_answers(
        Decoder.of(model), tokenizer, prompts, num_tokens=num_tokens, progress=False, **options
    )


@pytest.fixture(scope="module")
def spread():
    """A model whose probabilities are neither alike nor all in one token."""
    model = tiny_llama(3, initializer_range=0.1, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def ending_at(model, *ends):
    """A copy whose own settings name ends of an answer."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [*ends]
    return model


# What is said.
@pytest.mark.parametrize("seed", [None, 3])
def test_answers_are_those_of_plain_forwards_without_a_cache(spread, seed):
    expected = [plain_answer(spread, one, 5, ends=[EOS], seed=seed) for one in PROMPTS]
    assert said(spread, seed=seed) == expected
    assert len({one.written for one in expected}) > 15


@pytest.mark.parametrize("seed", mostly_slow([None, 3], [3]))
def test_answers_end_at_any_end_that_the_model_or_the_tokenizer_names(spread, seed):
    ends = [*range(0, 97, 9), EOS]
    model = ending_at(spread, *ends[:-1])
    expected = [plain_answer(model, one, 5, ends=ends, seed=seed) for one in PROMPTS]
    found = said(model, seed=seed)
    assert found == expected
    assert {one.ended for one in found} == {True, False}
    assert all((one.written[-1] in ends) == one.ended for one in found)
    for one in found[:8]:  # as many tokens as are allowed, and an end
        if one.ended:
            (alone,) = said(model, [np.array(one.given)], len(one.written), seed=seed)
            assert alone == one
    model.generation_config.eos_token_id = ends[1]  # a single one
    expected = [plain_answer(model, one, 5, ends=[ends[1], EOS], seed=seed) for one in PROMPTS]
    assert said(model, seed=seed) == expected


def test_an_answer_ends_where_its_turn_does(spread):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w7"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} w7 {% endfor %}"
    )
    expected = [plain_answer(spread, one, 15, ends=[7, EOS], seed=0) for one in PROMPTS]
    found = said(spread, tokenizer=tokenizer, num_tokens=15, seed=0)
    assert found == expected
    assert {7, EOS} <= {one.written[-1] for one in found}


def test_a_tokenizer_without_an_end_lets_every_answer_go_on(spread):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    found = said(spread, tokenizer=tokenizer, num_tokens=20, seed=0)
    assert {len(one.written) for one in found} == {20}
    assert EOS in {token for one in found for token in one.written}
    assert not any(one.ended for one in found)


def test_drawn_tokens_follow_the_probabilities(spread):
    """Of a model that looks at the last token alone, so that many prompts are one."""
    model = copy.deepcopy(spread)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    ids = np.random.default_rng(0).integers(0, 97, (4000, 4))
    ids[:, -1] = 11
    found = said(model, [*np.unique(ids, axis=0)], 2, batch_size=1000, seed=7)
    drawn = [one.written for one in found]
    first = [one[0] for one in drawn]
    check_draws(first, plain_logits(model, [11]))
    common = max({*first} - {EOS}, key=first.count)
    second = [one[1] for one in drawn if one[0] == common]
    assert len(second) > 150
    check_draws(second, plain_logits(model, [common]))


def check_draws(drawn, logits):
    """Whether draws can be of such probabilities, by a chi-squared test; rare ones together."""
    expected = np.exp(log_softmax(logits))[0] * len(drawn)
    counts = np.bincount(drawn, minlength=len(expected))
    rare = expected < 5
    found = [*counts[~rare], counts[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    assert len(found) > 5
    assert stats.chisquare(found, wanted).pvalue > 1e-3


def test_prompts_draw_apart_and_so_do_seeds(spread):
    """A model that knows nothing: only the random numbers can tell its answers apart."""
    model = copy.deepcopy(spread)
    torch.nn.init.zeros_(model.lm_head.weight)
    first, second = (said(model, num_tokens=30, seed=seed) for seed in (0, 1))
    written = [one.written for one in (*first, *second)]
    assert len({*written}) == len(written)
    drawn = [token for one in written for token in one]
    counts = np.bincount(drawn, minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert said(model, num_tokens=30, seed=0) == first


# Whatever runs beside it.
@settings(max_examples=5)
@given(st.permutations(range(len(PROMPTS))), st.integers(1, 20), st.sampled_from([None, 5]))
def test_neither_order_nor_neighbours_nor_batch_size_change_an_answer(
    expected, spread, order, size, seed
):
    some = order[: 1 + size]
    found = said(spread, [PROMPTS[i] for i in some], 3, batch_size=size, seed=seed)
    assert found == [expected[seed][i] for i in some]


@pytest.fixture(scope="module")
def expected(spread):
    return {seed: said(spread, num_tokens=3, batch_size=1, seed=seed) for seed in (None, 5)}


FAMILIES = {
    "gpt2": "learned positions, which are told to it",
    "bart": "learned positions, which it counts from the padding on",
    "mamba2": "recurrent, and leaves the padding out",
    "recurrent_gemma": "recurrent, and does not",
    "rwkv": "recurrent, and mixes the states of texts",
    "bailing_hybrid": "fails on padding",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["gpt2", "bart", "mamba2"]))
def test_no_family_hears_the_padding(family):
    model = random_model(family)
    model.generation_config.eos_token_id = None
    prompts = [one + 3 for one in PROMPTS[:6]]
    prompts[0] = prompts[0][:1]
    tokenizer = word_tokenizer()
    expected = [plain_answer(model, one, 5, ends=[EOS]) for one in prompts]
    assert said(model, prompts, 5, tokenizer) == expected


def noting_sizes(model):
    """The prompts in each call by which a model answers, as a list that grows."""
    sizes, plain = [], model.generate

    def noted(input_ids, **options):
        if options["max_new_tokens"] > 2:  # else it is tried
            sizes.append(len(input_ids))
        return plain(input_ids=input_ids, **options)

    model.generate = noted
    return sizes


def test_prompts_that_can_be_are_answered_together(spread):
    model = copy.deepcopy(spread)
    sizes = noting_sizes(model)
    said(model, PROMPTS * 2)
    assert sizes == [32, 8]
    sizes.clear()
    said(model, batch_size=7)
    assert sizes == [7, 7, 6]


@pytest.mark.parametrize(("dtype", "together"), [(torch.bfloat16, True), (torch.float32, False)])
def test_rounding_is_told_from_the_influence_of_neighbours(spread, dtype, together):
    """Two per cent of the logits are rounding in bfloat16, and no rounding in float32."""
    model = copy.deepcopy(spread).to(dtype)
    sizes = noting_sizes(model)

    def disturb(_module, _inputs, logits):
        return logits + 0.02 * logits.std() * torch.randn_like(logits) * (len(logits) > 1)

    model.lm_head.register_forward_hook(disturb)
    torch.manual_seed(0)
    said(model, PROMPTS[:3])
    assert sizes == ([3] if together else [1, 1, 1])


# What the model's settings are.
PREFERRED = {
    "do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 5.0,
    "bad_words_ids": [[one] for one in range(0, 97, 2)], "max_length": 4, "num_beams": 2,
    "min_new_tokens": 8, "suppress_tokens": [1, 3, 5],
}  # fmt: skip


def test_the_models_own_settings_change_nothing_and_stay(spread):
    model = copy.deepcopy(spread)
    model.generation_config = kept = GenerationConfig(**PREFERRED)
    before = kept.to_dict()
    for seed in (None, 2):
        assert said(model, seed=seed) == said(spread, seed=seed)
    assert model.generation_config is kept
    assert kept.to_dict() == before


def test_they_stay_after_an_error(spread, monkeypatch):
    model = copy.deepcopy(spread)
    kept = model.generation_config
    monkeypatch.setattr(module, "_answered", lambda *_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        said(model)
    assert model.generation_config is kept
    assert all(one.training for one in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_is_left_in_its_mode_and_answers_without_dropout(mode):
    model = tiny_llama(2, attention_dropout=0.9)
    expected = said(model)
    model.train(mode)
    model.model.layers[0].train(not mode)
    before = [one.training for one in model.modules()]
    assert said(model) == expected
    assert [one.training for one in model.modules()] == before


def test_out_of_memory_goes_on_with_fewer_prompts(spread, monkeypatch):
    expected = {seed: said(spread, seed=seed) for seed in (None, 4)}
    sizes = []
    plain = spread.generate

    def small(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 6:
            raise torch.OutOfMemoryError("no memory")
        return plain(input_ids=input_ids, **options)

    monkeypatch.setattr(spread, "generate", small, raising=False)
    for seed, wanted in expected.items():
        sizes.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert said(spread, seed=seed) == wanted
        assert ["memory for 20 texts" in str(one.message) for one in told] == [True, False]
        assert sizes[2:] == [20, 10, 5, 5, 5, 5]  # behind those by which a model is tried


# What cannot be.
def test_what_cannot_be_answered_is_told_in_a_sentence(spread, monkeypatch):
    with pytest.raises(sh.TextsError, match="no prompts to answer"):
        said(spread, [])
    with pytest.raises(sh.TextsError, match="prompt 1 has no token: write a longer one"):
        said(spread, [PROMPTS[0], PROMPTS[0][:0]])
    monkeypatch.setattr(type(spread), "can_generate", classmethod(lambda _: False))
    with pytest.raises(sh.ModelError, match="LlamaForCausalLM cannot generate text: leave out"):
        said(spread)


def test_positions_that_were_not_learned_are_refused():
    config = OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, word_embed_proj_dim=16,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    prompts = [PROMPTS[0], np.arange(3, 15)]
    assert len(said(model, prompts, 8)) == 2
    with pytest.raises(
        sh.TextsError,
        match=r"^prompt 1 with an answer of 9 tokens has 21 tokens, .* has learned 20 positions: ",
    ):
        said(model, prompts, 9)


@pytest.mark.parametrize("seed", mostly_slow([None, 3], [3]))
def test_layers_on_disk_say_the_same_by_a_pass_a_token(spread, tmp_path, seed):
    sh.save_model(spread, WORDS, tmp_path / "tiny")
    streamed, tokenizer = sh.load_model(tmp_path / "tiny", "float32", "stream", progress=False)
    expected = said(spread, seed=seed)
    assert said(streamed, seed=seed, tokenizer=tokenizer) == expected
    assert reading_of(streamed).passes == max(len(one.written) for one in expected)

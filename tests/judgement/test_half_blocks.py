"""Half-blocks: each against a copy of the model in which the half's last matrix is zero."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers

import shallower as sh
from shallower.errors import CriterionError, LayersError
from shallower.judgement import half_blocks as half_blocks_module
from shallower.judgement.half_blocks import HalfBlock, half_blocks, skips_are_heeded
from shallower.judgement.judges.judge import judged_batches
from shallower.judgement.judges.kl import KLJudge
from shallower.judgement.judges.loss import LossJudge
from shallower.judgement.subject import Subject
from shallower.judgement.trials import Trials
from shallower.judgement.work import Meter
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.texts.batches import TokenBatches
from shallower.values.layers import dropped_layers, parse_layers
from shallower.values.tokens import Tokens
from tests.conftest import tiny_llama
from tests.documents import HELD_OUT, TEXTS, assert_same, state_of
from tests.families import random_model
from tests.judgement.toy import IDENTITY, SCALES, make_subject, toy_model, toy_texts

WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
}
"""The maps that write into the stream; of GPT-NeoX and Phi both have the same input."""


def subject_of(model, tokenizer, *, judge=LossJudge, batch_size=4):
    decoder, meter = Decoder.of(model), Meter()
    fit = list(TokenBatches(tokenizer, HELD_OUT, Tokens(16, batch_size)))
    made = judge(judged_batches(tokenizer, TEXTS[:9], Tokens(16, batch_size)))
    trials = Trials(Layerwise(decoder), made, meter=meter)
    return Subject(decoder, tokenizer, fit, trials, (1,), meter=meter, progress=False)


def layers_of(model):
    return Decoder.of(model).layers.modules


@torch.no_grad()
def without(model, layer, name):
    """A copy of a model, one of whose maps writes nothing."""
    changed = copy.deepcopy(model)
    writer = layers_of(changed)[layer].get_submodule(name)
    for weight in writer.parameters():
        weight.zero_()
    return changed


@torch.no_grad()
def outputs(model, text, layer, tokenizer):
    """The input and the output of a layer on a text by itself, in float64."""
    seen = []

    def note(_module, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        seen.extend((given, output if isinstance(output, torch.Tensor) else output[0]))

    handle = layers_of(model)[layer].register_forward_hook(note, with_kwargs=True)
    model(torch.tensor([tokenizer(text)["input_ids"][:16]]), use_cache=False)
    handle.remove()
    return [states[0].double().numpy() for states in seen]


def distance(pairs):
    """1 less the mean cosine of pairs of (T, D) states."""
    cosines = [
        (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)) for x, y in pairs
    ]
    return 1 - np.concatenate(cosines).mean()


@pytest.mark.parametrize("name", WRITERS)
def test_a_half_is_a_model_whose_writer_is_zero(words, name):
    model = random_model(name)
    found = half_blocks(subject_of(model, words))
    num_layers = len(layers_of(model))
    parts = ("attention", "feed_forward")
    assert [(half.layer, half.part) for half in found] == [
        (layer, part) for layer in range(num_layers) for part in parts
    ]
    whole = sh.evaluate_loss(model, words, TEXTS[:9], max_length=16)
    attention, feed_forward = WRITERS[name]
    for half in found[:2] + found[-4:-2]:
        writer = attention if half.part == "attention" else feed_forward
        cut = sh.evaluate_loss(without(model, half.layer, writer), words, TEXTS[:9], max_length=16)
        lost = cut.minus(whole)
        assert half.score == pytest.approx(cut.nats, rel=1e-5)
        assert half.difference == pytest.approx(lost.mean, abs=1e-5)
        assert half.difference_stderr == pytest.approx(lost.stderr, abs=1e-5)
        only_attention = without(model, half.layer, feed_forward)
        pairs = []
        for text in HELD_OUT:
            before, after = outputs(model, text, half.layer, words)
            between = outputs(only_attention, text, half.layer, words)[1]
            pairs.append((before, between) if half.part == "attention" else (between, after))
        assert half.similarity == pytest.approx(distance(pairs), abs=1e-6)


def test_the_halves_of_a_network_whose_worth_is_known(words):
    network = toy_model()
    subject = make_subject(network, words, toy_texts(network, 12))
    found = {(half.layer, half.part): half for half in half_blocks(subject)}
    idle = [(IDENTITY, "attention"), (IDENTITY, "feed_forward"), (SCALES, "attention")]
    for half in [found[one] for one in idle]:
        assert (half.difference, half.difference_stderr, half.tied) == (0, 0, True)
        assert half.similarity == pytest.approx(0, abs=1e-12)
    # The last layer scales the stream, which the final norm undoes.
    assert found[SCALES, "feed_forward"].similarity == pytest.approx(0, abs=1e-6)
    assert found[SCALES, "feed_forward"].difference == pytest.approx(0, abs=1e-5)
    others = [half for one, half in found.items() if one[0] not in (IDENTITY, SCALES)]
    assert len(others) == 12
    assert all(half.similarity > 1e-3 and half.difference > 0.01 for half in others)
    assert all(half.kv_bytes is None for half in found.values() if half.part == "attention")


def test_a_half_that_does_nothing_costs_nothing(words):
    model = tiny_llama(4)
    with torch.no_grad():
        layers_of(model)[2].self_attn.o_proj.weight.zero_()
    found = {(half.layer, half.part): half for half in half_blocks(subject_of(model, words))}
    idle = found.pop((2, "attention"), None)
    assert idle is not None
    assert idle.similarity == pytest.approx(0, abs=1e-12)
    assert (idle.difference, idle.tied) == (0, True)
    assert all(half.similarity > 1e-6 for half in found.values())


def test_the_judge_may_be_any(words):
    model = tiny_llama(3, initializer_range=0.2)
    found = half_blocks(subject_of(model, words, judge=KLJudge))
    assert all(half.score > 0 for half in found)
    assert [half.score for half in found] == [half.difference for half in found]


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        ("llama", ["self_attn"], ["mlp"]),
        ("gpt2", ["attn"], ["mlp"]),
        ("opt", ["self_attn"], ["fc1", "fc2"]),
    ],
)
def test_what_a_half_would_save(words, name, attention, feed_forward):
    model = random_model(name)
    total = sum(weight.numel() for weight in model.parameters())
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    for half in half_blocks(subject_of(model, words)):
        names = attention if half.part == "attention" else feed_forward
        modules = [getattr(layers_of(model)[half.layer], one) for one in names]
        expected = sum(weight.numel() for module in modules for weight in module.parameters())
        assert half.parameters == expected > 0
        assert half.parameters_share == expected / total
        kept = cache.layers[half.layer]
        kv_bytes = (kept.keys.numel() + kept.values.numel()) * 4 // 3
        assert half.kv_bytes == (kv_bytes if half.part == "attention" else 0)


def test_the_cache_of_a_llama_in_bfloat16(words):
    found = half_blocks(subject_of(tiny_llama(2).bfloat16(), words))
    assert [half.kv_bytes for half in found] == [2 * 2 * 8 * 2, 0] * 2


def test_work_is_counted(monkeypatch, words):
    subject, ran = subject_of(tiny_llama(4), words), []
    run = Layerwise.run

    def counting(model, batch, states, layers):
        ran.append(len(layers) * len(batch))
        return run(model, batch, states, layers)

    monkeypatch.setattr(Layerwise, "run", counting)
    with subject.meter.account() as work:
        found = half_blocks(subject)
    assert work.layer_forwards == sum(ran) + 4  # and once the model itself, for its cache
    assert sum(ran) > (4**2 + 3 * 4 - 1) * 9 + (4 + 4) * len(HELD_OUT)
    with subject.meter.account() as again:
        assert half_blocks(subject) is found
    assert again.layer_forwards == work.layer_forwards


def test_the_model_is_left_as_it_was(llama, words):
    llama.train()
    before = state_of(llama)
    half_blocks(subject_of(llama, words))
    assert_same(before, state_of(llama))


def test_a_model_without_plain_writers_is_refused(words):
    with pytest.raises(CriterionError, match="no such layer"):
        half_blocks(subject_of(random_model("mixtral"), words))


def test_a_half_is_plain_json(llama, words):
    half = half_blocks(subject_of(llama, words))[3]
    values = json.loads(json.dumps(half.to_json(), allow_nan=False))
    assert (values["layer"], values["part"], values["cuttable"]) == (1, "feed_forward", False)
    assert values["difference"] == half.difference
    broken = HalfBlock(0, "attention", math.nan, 1.0, 0.5, math.nan, 1, 0.1, None, False)
    assert broken.to_json()["similarity"] is None
    assert broken.to_json()["tied"] is True


# Halves cannot be cut.
@pytest.mark.parametrize(
    ("text", "whole"), [("3.attention", "3"), ("1,3.mlp", "3"), ("3:5.feed_forward", "3:5")]
)
def test_a_cut_of_a_half_is_refused(text, whole):
    message = rf"a half of a layer, .* transformers 5\.24 writes .* the whole layer \({whole}\)"
    with pytest.raises(LayersError, match=message):
        parse_layers(text)
    part = text.rpartition(",")[2]
    for layers in (part, [1, part]):
        with pytest.raises(LayersError, match=message):
            dropped_layers(8, layers)


def test_a_cut_of_a_half_is_refused_in_memory_and_on_the_command_line(llama, words, shallower):
    with pytest.raises(LayersError, match="is a half of a layer"):
        sh.drop_layers(llama, "1.attention")
    done = shallower("prune", "nowhere", "--drop", "1.attention", "--out", "cut")
    assert done.status == 2
    assert "1.attention is a half of a layer, and no stock loader would leave it out" in done.err


def test_transformers_ignores_what_a_config_says_to_skip():
    assert not skips_are_heeded(), (
        f"transformers {transformers.__version__} leaves out halves of layers whose config says "
        f"per_layer_config skip: half-blocks can be cut now; see judgement/half_blocks.py"
    )


def test_a_version_that_heeds_it_is_noticed(monkeypatch):
    built = transformers.LlamaForCausalLM

    def build(config):
        model = built(config)
        for index, layer in enumerate(model.model.layers):
            if "attention" in getattr(config.per_layer_config[index], "skip", ()):
                layer.self_attn.o_proj.register_forward_hook(lambda _m, _a, out: out * 0)
        return model

    monkeypatch.setattr(half_blocks_module, "LlamaForCausalLM", build)
    assert skips_are_heeded()

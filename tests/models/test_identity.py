"""The identity and the fingerprint of a model."""

import copy
import itertools
from functools import partial

import pytest
import torch
from tokenizers import normalizers
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama import modeling_llama

import shallower as sh
from shallower.cutting.checkpoint import identity_of
from shallower.models.identity import identify, weights_hash
from shallower.models.loading import load_model
from shallower.models.structure import structure_of
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.mixtures import mixture, some_experts
from tests.cutting.tiny_models import logits_of
from tests.models.checkpoints import lively, wide_llama, wide_qwen


# Identity
def test_the_identity_tells_what_it_is_of(wide):
    model, _ = load_model(wide, dtype="float32")
    identity = identify(model)
    assert (identity.name, identity.model_type) == ("wide-llama", "llama")
    assert (identity.num_layers, identity.dtype) == (4, "float32")
    assert identity == identify(model)


@pytest.mark.parametrize(
    ("build", "dtype"),
    mostly_slow(
        itertools.product([wide_llama, wide_qwen], ["bfloat16", "float16", "nf4", "int8"]),
        [
            (wide_llama, "bfloat16"),
            (wide_qwen, "float16"),
            (wide_qwen, "nf4"),
            (wide_llama, "int8"),
        ],
    ),
)
def test_the_fingerprint_is_the_same_in_every_dtype(words, tmp_path, build, dtype):
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    expected = identify(load_model(tmp_path, dtype="float32")[0])
    identity = identify(load_model(tmp_path, dtype=dtype)[0])
    assert identity.dtype == dtype
    assert identity.fingerprint == expected.fingerprint


def test_the_fingerprint_does_not_change_by_use(wide):
    model, _ = load_model(wide, dtype="nf4")
    before = identify(model)
    logits_of(model)
    model.train()
    assert identify(model) == before


def test_the_fingerprint_is_the_same_where_weights_lie_on_disk(wide, tmp_path):
    places = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places += [f"model.layers.{i}" for i in range(4)]
    spread = AutoModelForCausalLM.from_pretrained(
        wide,
        device_map=dict.fromkeys(places, "cpu") | {"model.layers.2": "disk"},
        offload_folder=tmp_path,
    )
    expected = identify(load_model(wide, dtype="float32")[0])
    assert identify(spread).fingerprint == expected.fingerprint


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_fingerprint_tells_other_norms(llama, layer):
    before = identify(llama).fingerprint
    with torch.no_grad():
        llama.model.layers[layer].post_attention_layernorm.weight[7] += 0.1
    assert identify(llama).fingerprint != before


def test_the_fingerprint_tells_swapped_layers():
    model = lively(tiny_llama())
    before = identify(model).fingerprint
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    assert identify(model).fingerprint != before


# The hash of all weights.
def test_the_hash_of_the_weights_knows_every_value():
    model = tiny_llama()
    expected = weights_hash(model)
    assert weights_hash(tiny_llama()) == expected
    assert weights_hash(tiny_llama(seed=1)) != expected
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[-1] += 1
            assert weights_hash(model) != expected
            tensor.copy_(kept)
    assert weights_hash(model) == expected
    model.config.rms_norm_eps *= 2
    assert weights_hash(model) != expected


@pytest.mark.parametrize("dtype", ["bfloat16", "nf4", "int8"])
def test_the_hash_of_quantised_weights_is_that_of_their_bits(words, tmp_path, dtype):
    wide_llama().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    hashes = [weights_hash(load_model(tmp_path, dtype=dtype)[0]) for _ in range(2)]
    assert hashes[0] == hashes[1] is not None
    assert weights_hash(load_model(tmp_path, dtype="float32")[0]) != hashes[0]


def scaled(_module, _inputs, output):
    return output * 2


def swapped(model):
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)


class Own(torch.Tensor):
    """A tensor whose functions may be any."""


def with_other_rotation(model):
    """Since transformers 5.25 a model has its own modules for functions that kernels replace."""
    attention = model.model.layers[0].self_attn
    for own in getattr(attention, "_kernel_funcs", {"forward": attention}).values():
        own.forward = scaled


def parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", nn.Tanh())


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        (lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.1), True),
        (lambda model: setattr(model.model.norm, "variance_epsilon", 0.5), True),
        (lambda model: setattr(model.model.layers[2].mlp, "act_fn", nn.ReLU()), True),
        (lambda model: setattr(model.model.layers[2], "forward", torch.relu), True),
        (lambda model: setattr(model.model.layers[2], "forward", lambda x: x), False),
        (lambda model: setattr(model.lm_head, "forward", partial(scaled, 1, 2)), False),
        (with_other_rotation, False),
        (lambda model: model.lm_head.register_forward_hook(scaled), False),
        (lambda model: model.model.register_forward_pre_hook(lambda *_: None), False),
        (lambda model: setattr(model.config, "_attn_implementation", "eager"), True),
        (lambda model: setattr(model.generation_config, "repetition_penalty", 2.0), True),
        (lambda model: model.model.layers[3].train(), True),
        (swapped, True),
        (parametrized, False),
        (
            lambda model: setattr(
                model.model.norm, "weight", nn.Parameter(torch.ones(32).as_subclass(Own))
            ),
            False,
        ),
        (lambda model: setattr(model, "__class__", type("Own", (type(model),), {})), False),
    ],
)
def test_a_model_that_computes_otherwise_has_another_hash_or_none(change, is_known):
    model = tiny_llama()
    expected = weights_hash(model)
    logits_of(model)
    assert weights_hash(model) == expected
    change(model)
    found = weights_hash(model)
    assert found != expected
    assert (found is not None) == is_known


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (modeling_llama, "apply_rotary_pos_emb"),
        *(  # a module since transformers 5.25
            [(modeling_llama.apply_rotary_pos_emb, "forward")]
            if isinstance(modeling_llama.apply_rotary_pos_emb, nn.Module)
            else []
        ),
        (modeling_llama.LlamaMLP, "forward"),
        (nn.functional, "silu"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_model_of_replaced_code_has_no_hash(monkeypatch, place, name):
    monkeypatch.setattr(place, name, scaled, raising=False)
    assert weights_hash(tiny_llama()) is None


def test_a_tokenizer_is_known_by_all_that_it_does(words):
    def changes():
        yield lambda one: setattr(one, "padding_side", "left")
        yield lambda one: setattr(one, "chat_template", "other")
        yield lambda one: setattr(one, "model_max_length", 3)
        yield lambda one: one.add_tokens(["new"])
        yield lambda one: setattr(one.backend_tokenizer, "normalizer", normalizers.Lowercase())

    expected = structure_of(words)
    words(["w1 w2"], truncation=True, max_length=1, padding=True)
    assert structure_of(words) == expected is not None
    for change in changes():
        other = copy.deepcopy(words)
        change(other)
        assert structure_of(other) not in (expected, None)
    other.encode = lambda _text: [1]
    assert structure_of(other) is None


def test_a_tokenizer_of_replaced_code_is_not_known(words, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", scaled)
    assert structure_of(words) is None


@pytest.mark.parametrize("mode", [TorchFunctionMode, TorchDispatchMode])
def test_a_model_in_memory_is_not_known_within_a_mode_of_torch(llama, mode):
    with mode():
        assert structure_of(llama) is None
    assert structure_of(llama) is not None


def test_a_model_in_memory_is_not_known_while_all_modules_have_a_hook(llama):
    expected = structure_of(llama)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert structure_of(llama) is None
    finally:
        handle.remove()
    assert structure_of(llama) == expected is not None


def test_offloaded_weights_have_no_hash():
    assert weights_hash(tiny_llama().to("meta")) is None


# Mixtures.
DENSE = "4aa16f02f6b1"


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["mixtral", "olmoe", "granitemoe", "qwen2_moe", "dbrx"], ["mixtral", "granitemoe", "dbrx"]
    ),
)
def test_the_fingerprint_counts_experts(name, tmp_path):
    """In memory, on disk and loaded, by the config and by a model that is built of it."""
    model = mixture(name)
    model.save_pretrained(tmp_path / "whole")
    whole = identify(model)
    assert identity_of(tmp_path / "whole").fingerprint == whole.fingerprint
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=some_experts(model))
    cut = identity_of(tmp_path / "cut")
    assert cut.num_layers == whole.num_layers
    assert cut.fingerprint != whole.fingerprint
    sh.drop_experts(model, some_experts(model))
    assert identify(model).fingerprint == cut.fingerprint


def test_the_fingerprint_of_a_dense_model_is_that_of_earlier_versions():
    """Plans and scans of users have it."""
    assert identify(tiny_llama()).fingerprint.startswith(DENSE)

"""Quantised models are cut and saved exactly."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)
from transformers.quantizers.auto import AutoQuantizationConfig

import shallower as sh
from shallower import ModelError, Plan, Recipe, memory_forecast
from shallower.healing.checks import resolve
from shallower.models.architecture import find_layers
from shallower.models.dtypes import stored_quantisation
from shallower.models.identity import stored_dtype
from shallower.models.loading import load_model, load_weights
from shallower.models.source import ModelSource
from tests.conftest import mostly_slow
from tests.cutting.tiny_models import logits_of


# Quantised weights
def stored(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def stock(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def test_quantised_weights_are_small_and_near(wide):
    plain, _ = load_model(wide, "float32")
    expected = logits_of(plain)
    for dtype, size, error in (("nf4", 0.7, 0.5), ("int8", 1.2, 0.1)):
        model, _ = load_model(wide, dtype)
        layers = find_layers(model).modules
        held = sum(p.numel() * p.element_size() for p in layers.parameters())
        assert held < size * sum(p.numel() for p in find_layers(plain).modules.parameters())
        off = (logits_of(model).float() - expected).abs().mean() / expected.abs().mean()
        assert off < error


def test_a_forward_does_not_change_what_would_be_stored(quantised):
    before = stored(quantised)
    first = logits_of(quantised)
    assert_same_state(stored(quantised), before)
    assert torch.equal(logits_of(quantised), first)
    assert_same_state(stored(quantised), before)


@pytest.mark.parametrize("forward_first", mostly_slow([True, False], [True]))
def test_a_cut_quantised_model_comes_back_exactly(quantised, tmp_path, forward_first):
    if forward_first:
        logits_of(quantised)
    sh.drop_layers(quantised, [1, 2])
    expected = logits_of(quantised) if forward_first else None
    sh.save_model(quantised, None, tmp_path / "cut")
    reloaded = stock(tmp_path / "cut")
    assert stored_dtype(reloaded) == stored_dtype(quantised)
    assert torch.equal(logits_of(reloaded), logits_of(quantised))
    assert forward_first is False or torch.equal(logits_of(reloaded), expected)
    assert_same_state(stored(stock(tmp_path / "cut")), stored(quantised))


def test_a_cut_of_a_quantised_model_is_the_model_with_its_layers_skipped(quantised):
    layers = find_layers(quantised).modules
    handles = [
        layers[i].register_forward_hook(lambda _module, args, _output: args[0]) for i in (1, 2)
    ]
    expected = logits_of(quantised)
    for handle in handles:
        handle.remove()
    with sh.without_layers(quantised, [1, 2]):
        assert torch.equal(logits_of(quantised), expected)
    sh.drop_layers(quantised, [1, 2])
    assert torch.equal(logits_of(quantised), expected)


def by_transformers(wide, double=True):
    return AutoModelForCausalLM.from_pretrained(
        wide,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    ).eval()


def assert_saved_exactly_or_refused(model, path, expected):
    """``expected`` is the state dict of the model before its first forward."""
    try:
        sh.save_model(model, None, path)
    except sh.ModelError:
        assert not path.exists()
    else:
        assert_same_state(stored(stock(path)), expected)


@pytest.mark.parametrize(
    ("state_dict_between", "double"),
    mostly_slow(
        [(True, True), (True, False), (False, True), (False, False)], [(True, False), (False, True)]
    ),
)
def test_a_model_that_transformers_loaded_is_saved_exactly_or_refused(
    wide, tmp_path, double, state_dict_between
):
    expected = stored(by_transformers(wide, double))
    model = by_transformers(wide, double)
    logits_of(model)
    if state_dict_between:
        model.state_dict()
    assert_saved_exactly_or_refused(model, tmp_path / "saved", expected)


def test_a_copy_of_a_quantised_model_is_saved_exactly_or_refused(quantised, tmp_path):
    expected = stored(quantised)
    logits_of(quantised)
    for number, model in enumerate((copy.deepcopy(quantised), quantised)):
        logits_of(model)
        assert_saved_exactly_or_refused(model, tmp_path / str(number), expected)


def test_a_quantised_model_moved_in_place_is_saved_exactly_or_refused(quantised, tmp_path):
    expected = stored(quantised)
    logits_of(quantised)
    quantised.to("cpu")
    logits_of(quantised)
    assert_saved_exactly_or_refused(quantised, tmp_path / "saved", expected)


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def stored_as(method, folder, model):
    """A folder of plain weights whose config says that they are quantised."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = METHODS[method]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_name_of_a_stored_quantisation(method):
    assert stored_quantisation(METHODS[method]) == method
    assert stored_quantisation(AutoQuantizationConfig.from_dict(METHODS[method])) == method


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_plain_weights_whose_config_says_bitsandbytes_are_refused(method, tmp_path, llama):
    folder = stored_as(method, tmp_path / "model", llama)
    with pytest.raises(ModelError, match=r"is plain float32\. Remove quantization_config"):
        load_weights(str(folder), torch.float32)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_cannot_be_loaded_here_is_refused_by_its_config(method, tmp_path, llama):
    folder = stored_as(method, tmp_path / "model", llama)
    with pytest.raises(ModelError, match=rf"stored quantised, by {method}, and cannot be loaded"):
        ModelSource(folder, "float32").read_config()
    with pytest.raises(ModelError, match="cannot be quantised to nf4 again"):
        ModelSource(folder, "nf4").read_config()
    plan = Plan.of(6, [2])
    with pytest.raises(ModelError, match="cannot be quantised to nf4 again"):
        resolve(str(folder), plan, Recipe())


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_not_patched(method, tmp_path, llama):
    folder = stored_as(method, tmp_path / "model", llama)
    with pytest.raises(ModelError, match=f"weights of {method} are not patched"):
        memory_forecast(folder, "patch", dtype="float32")

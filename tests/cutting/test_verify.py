"""The verification of a saved cut."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower import Block, ModelError
from shallower.cutting.saving import lend_layers, logits_difference
from tests.documents import PROBE, assert_same, state_of


# Checking a saved cut.
@pytest.fixture
def checkpoint(llama, words, tmp_path):
    """The model without layers 1 and 2, saved."""
    with sh.without_layers(llama, [1, 2]):
        sh.save_model(llama, words, tmp_path / "cut", plan=sh.Plan(6, (Block(1, 3),)))
    return tmp_path / "cut"


def test_a_faithful_checkpoint_passes(llama, words, checkpoint):
    before = state_of(llama)
    assert (
        sh.verify_checkpoint(llama, words, checkpoint, layers=[Block(1, 3)], text="w1 w2 w3")
        <= 1e-5
    )
    assert_same(before, state_of(llama))


def test_other_layers_than_those_dropped_do_not_pass(llama, words, checkpoint):
    with pytest.raises(ModelError, match="logits are off by"):
        sh.verify_checkpoint(llama, words, checkpoint, layers=[Block(2, 4)], text="w1 w2 w3")


@pytest.fixture
def tamper(checkpoint):
    """Change the saved weights."""

    def tampered(change):
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})

    return tampered


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("factor", [1.01, float("nan"), float("inf")])
def test_a_tampered_checkpoint_does_not_pass(llama, words, checkpoint, tamper, factor):
    tamper(lambda weights: weights[NORM].mul_(factor))
    with pytest.raises(ModelError, match=r"cut is not the model.*logits are off by"):
        sh.verify_checkpoint(llama, words, checkpoint, layers=[Block(1, 3)], text="w1 w2 w3")


def test_the_difference_of_logits_is_the_greatest_one(llama, checkpoint):
    changed = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        changed.lm_head.weight[7] *= 2
        expected = changed(input_ids=PROBE).logits
    changed.save_pretrained(checkpoint)
    with torch.inference_mode(), sh.without_layers(llama, [Block(1, 3)]):
        faithful = llama(input_ids=PROBE).logits
    got = logits_difference(llama, checkpoint, [Block(1, 3)], input_ids=PROBE)
    assert got == pytest.approx(float((expected - faithful).abs().max()), abs=1e-6)
    assert got > 1e-3


# On a GPU that has no room for a second model.
@pytest.fixture
def visits(monkeypatch):
    """Where the CPU stands for a GPU: what is moved there, and back, in order."""
    moved = []
    gpu = SimpleNamespace(type="cuda")
    move = torch.nn.Module.to

    def recording(module, device):
        moved.append((type(module).__name__, "gpu" if device is gpu else device))
        return move(module, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", recording)
    return gpu, moved


def test_the_layers_of_a_checkpoint_visit_the_gpu_one_at_a_time(visits, checkpoint):
    gpu, moved = visits
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(input_ids=PROBE).logits
        lend_layers(model, gpu)
        assert moved == [("LlamaForCausalLM", "gpu")]
        got = model(input_ids=PROBE).logits
    assert moved[1:] == [("LlamaDecoderLayer", "gpu"), ("LlamaDecoderLayer", "cpu")] * 4
    assert torch.equal(got, expected)


def test_what_goes_to_the_gpu_for_good_has_no_layers(visits, checkpoint, monkeypatch):
    gpu, _ = visits
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    sent = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, _: sent.extend(module.state_dict()))
    lend_layers(model, gpu)
    assert sorted(sent) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert len(model.model.layers) == 4


def test_a_gpu_without_room_for_the_comparison_is_told(llama, words, checkpoint, monkeypatch):
    def out_of_memory(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("shallower.cutting.saving.lend_layers", out_of_memory)
    with pytest.raises(ModelError, match=r"cut is not verified: .*--device-map cpu"):
        sh.verify_checkpoint(llama, words, checkpoint, layers=[Block(1, 3)], text="w1 w2 w3")

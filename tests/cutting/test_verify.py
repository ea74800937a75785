"""Saving a cut model, and the verification of a saved one."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import shallower as sh
from shallower import Block, ModelError
from shallower.cutting.saving import lend_layers, logits_difference
from shallower.storage import RECORD
from tests.cutting.tiny_models import GATED, logits_of, reload
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


def test_a_checkpoint_is_saved_with_its_tokenizer_and_plan(llama, words, tmp_path):
    plan = sh.drop_layers(llama, [2, 3])
    sh.save_model(llama, words, tmp_path / "deep" / "cut", plan=plan)
    folder = tmp_path / "deep" / "cut"
    assert sh.Plan.load(folder / "shallower_plan.json") == plan
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w6 what")["input_ids"] == words("w5 w6 what")["input_ids"]
    assert torch.equal(logits_of(reload(folder)), logits_of(llama))


def test_without_tokenizer_and_plan_there_are_none(llama, tmp_path):
    sh.save_model(llama, None, tmp_path / "cut")
    names = {file.name for file in (tmp_path / "cut").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", RECORD}


def test_a_tokenizer_saved_after_a_scan_truncates_no_more_than_before(llama, words, tmp_path):
    words.backend_tokenizer.no_truncation()
    sh.scan(llama, words, ["w1 w2 w3 w4 w5", "w6"], max_length=3)
    sh.evaluate_loss(llama, words, ["w1 w2 w3 w4 w5", "w6 w7"], max_length=3)
    sh.save_model(llama, words, tmp_path / "cut")
    stored = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    assert len(stored.encode("w1 w2 w3 w4 w5").ids) == 5


@pytest.mark.parametrize("plan", [[range(2, 4)], "2:4", {"drop": [2]}, 5])
def test_what_is_no_plan_is_refused(llama, tmp_path, plan):
    with pytest.raises(sh.PlanError, match="is no plan: expected a Plan"):
        sh.save_model(llama, None, tmp_path / "cut", plan=plan)
    assert not list(tmp_path.iterdir())


class BrokenTokenizer:
    def save_pretrained(self, folder):
        (folder / "half").write_text("half")
        raise RuntimeError("of the tokenizer")


def broken_plan():
    return sh.Plan(6, (sh.Block(2, 4),), versions={"made by": object()})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("tokenizer", "plan", "error"),
    [(BrokenTokenizer(), None, RuntimeError), (None, broken_plan(), TypeError)],
)
def test_saving_that_fails_midway_leaves_all_as_it_was(
    llama, tmp_path, tokenizer, plan, error, overwrite
):
    if overwrite:
        sh.save_model(llama, None, tmp_path / "cut")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    sh.drop_layers(llama, [sh.Block(2, 4)])
    with pytest.raises(error):
        sh.save_model(llama, tokenizer, tmp_path / "cut", plan=plan, overwrite=overwrite)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert len(list(tmp_path.iterdir())) == len(before and [1])


def test_weights_that_are_not_there_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GATED))
    with pytest.raises(sh.ModelError):
        sh.save_model(model, None, tmp_path / "cut")
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_that_transformers_refuses_are_named(llama, tmp_path):
    llama.generation_config.temperature = 0.6
    with pytest.raises(sh.ShallowerError, match="temperature"):
        sh.save_model(llama, None, tmp_path / "cut")
    assert list(tmp_path.iterdir()) == []

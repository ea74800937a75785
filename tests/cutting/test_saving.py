"""Saving a cut model."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import shallower as sh
from shallower.storage import RECORD
from tests.cutting.tiny_models import GATED, logits_of, reload


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

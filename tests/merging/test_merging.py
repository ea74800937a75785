"""Adapters merged into weights."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import shallower as sh
from tests.conftest import tiny_llama
from tests.families import small_config
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut


def test_experts_that_are_stored_together_are_merged(words, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("mixtral")).to(torch.bfloat16).eval()
    _, cut = save_cut(tmp_path, model, words, [3])
    recipe = replace(QUICK, steps=4, dtype="bfloat16", eval_every=4)
    record = sh.heal(cut, TEXTS, tmp_path / "adapters", recipe=recipe, eval_texts=HELD_OUT)
    assert (recipe.dropout, record.recipe.dropout) == (0.05, 0.0)  # which stacks do not take
    merge = sh.merge(tmp_path / "adapters", tmp_path / "merged").merge
    assert merge.difference <= merge.tolerance
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    loss = sh.evaluate_loss(stock, words, HELD_OUT, max_length=16)
    assert loss.nats == pytest.approx(record.after.nats, abs=0.02)


def test_four_bits_are_merged_into_plain_weights(words, tmp_path):
    _, cut = save_cut(tmp_path, tiny_llama().to(torch.bfloat16), words)
    recipe = replace(QUICK, steps=1, warmup_steps=0, dtype="nf4")
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT, merge=True)
    assert record.recipe.dtype == "nf4"
    assert record.merge.dtype == "bfloat16"
    assert record.merge.difference < record.merge.tolerance
    assert record.merge.trained_difference > record.merge.difference
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.bfloat16
    assert not hasattr(stock.config, "quantization_config")


def test_a_patch_and_a_license_are_carried_over(cut, tmp_path):
    carried = tmp_path / "cut"
    shutil.copytree(cut, carried)
    (carried / "shallower_patch.json").write_text('{"method": "refit"}')
    (carried / "LICENSE.txt").write_text("Do as you like.")
    card = (carried / "README.md").read_text()
    (carried / "README.md").write_text(card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    for name, merge in (("adapters", False), ("merged", True)):
        sh.heal(carried, TEXTS, tmp_path / name, recipe=replace(QUICK, steps=1), merge=merge)
        assert (tmp_path / name / "shallower_patch.json").read_text() == '{"method": "refit"}'
        assert "license: apache-2.0" in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "LICENSE.txt").read_text() == "Do as you like."

"""Adapters merged into weights."""

import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower.models.feed_forward import feed_forward_targets
from tests.conftest import mostly_slow, tiny_llama
from tests.families import small_config
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut

FAMILIES = ["gpt2", "mixtral", "gpt_neox", "opt", "phi", "qwen3_next"]
QUICKLY = {("mixtral", "bfloat16")}
"""Experts that are stored together."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_slow(product(FAMILIES, ("float32", "bfloat16")), QUICKLY),
)
def test_every_kind_of_map_can_be_merged(name, dtype, words, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(name)).to(getattr(torch, dtype)).eval()
    _, cut = save_cut(tmp_path, model, words, [3])
    recipe = replace(QUICK, steps=4, dtype=dtype, eval_every=4)
    record = sh.heal(cut, TEXTS, tmp_path / "adapters", recipe=recipe, eval_texts=HELD_OUT)
    merged = sh.merge(tmp_path / "adapters", tmp_path / "merged")
    assert merged.merge.dtype == dtype
    assert merged.merge.difference <= merged.merge.tolerance
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    base = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32).eval()
    ids = torch.arange(1, 30)[None]
    targets = feed_forward_targets(base)
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        adapted = (
            PeftModel.from_pretrained(base, tmp_path / "adapters").eval()(input_ids=ids).logits
        )
        got = stock.eval()(input_ids=ids).logits
    moved = float((adapted - before).norm())
    off = float((got - adapted).norm())
    assert off < (1e-4 if dtype == "float32" else 0.35) * moved
    assert record.adapted == len(targets) > 0
    loss = sh.evaluate_loss(stock, words, HELD_OUT, max_length=16)
    assert loss.nats == pytest.approx(record.after.nats, abs=1e-5 if dtype == "float32" else 0.02)
    assert record.recipe.dropout == (0.0 if name in ("mixtral", "qwen3_next") else 0.05)


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

"""The training: what it lowers, and what decides its bits."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.numpy import load_file

import shallower as sh
from shallower.healing import bar
from shallower.healing.training import Throughput
from shallower.texts.sequences import order
from tests.healing.cuts import BLOCK, HELD_OUT, QUICK, TEXTS


# Training
def test_healing_lowers_the_held_out_loss(healed, cut):
    out, record = healed
    assert [*record.held_out] == [0, 2, 4, 6]
    losses = [loss.nats for loss in record.held_out.values()]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert (record.best_step, len(record.steps)) == (6, 6)
    model, tokenizer = sh.load_model(cut, dtype="float32")
    options = {"max_length": 16, "batch_size": 8}
    before = sh.evaluate_loss(model, tokenizer, HELD_OUT, **options)
    assert record.before.nats == pytest.approx(before.nats, abs=1e-6)
    adapted = PeftModel.from_pretrained(model, out).eval()
    after = sh.evaluate_loss(adapted.get_base_model(), tokenizer, HELD_OUT, **options)
    assert record.after.nats == pytest.approx(after.nats, abs=1e-6)
    assert record.after.num_tokens == before.num_tokens


def test_adapters_are_a_repository_of_peft(healed, cut):
    out, record = healed
    assert {file.name for file in out.iterdir()} == {
        "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "healing.json",
        "healing.png", "shallower_plan.json", "tokenizer.json", "tokenizer_config.json",
        ".shallower.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 4, 0.05)
    assert config["base_model_name_or_path"] == str(cut)
    weights = load_file(out / "adapter_model.safetensors")
    assert len(weights) == 2 * record.adapted == 2 * 4 * 3
    assert all("mlp" in name and value.dtype == np.float32 for name, value in weights.items())
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert len(model.get_base_model().model.layers) == 4
    card = (out / "README.md").read_text()
    assert "low-rank adapters were trained" in card
    assert "step 6 of 6" in card
    assert str(record.after) in card
    assert sh.Plan.load(out / "shallower_plan.json").blocks == (BLOCK,)
    assert not list(out.parent.glob(".*"))


def test_the_rate_warms_up_and_falls_as_a_cosine(cut, tmp_path):
    recipe = replace(QUICK, steps=8, warmup_steps=3, learning_rate=0.004)
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe)
    expected = [
        0.004 * (k / 3 if k < 3 else 0.5 * (1 + math.cos(math.pi * (k - 3) / 5))) for k in range(8)
    ]
    assert [step.learning_rate for step in record.steps] == pytest.approx(expected, abs=1e-9)
    assert (record.held_out, record.best_step, record.recovered) == ({}, 8, None)


def test_the_first_loss_is_the_mean_over_tokens(cut, words, tmp_path):
    recipe = replace(QUICK, packing=False, steps=1, warmup_steps=0)
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe)
    taken = order(16, 16, 0)
    model, tokenizer = sh.load_model(cut, dtype="float32")
    expected = sh.evaluate_loss(model, tokenizer, [TEXTS[i] for i in taken], max_length=16)
    assert record.steps[0].loss == pytest.approx(expected.nats, rel=1e-5)


def test_the_seed_decides_all(cut, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sh.heal(cut, TEXTS, tmp_path / name, recipe=replace(QUICK, seed=seed, steps=2))
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_recovered_share_is_recorded(both, tmp_path):
    whole, cut = both
    record = sh.heal(
        cut, TEXTS, tmp_path / "out", recipe=QUICK, eval_texts=HELD_OUT, original=whole
    )
    model, tokenizer = sh.load_model(whole, dtype="float32")
    expected = sh.evaluate_loss(model, tokenizer, HELD_OUT, max_length=16)
    assert record.original.nats == pytest.approx(expected.nats, abs=1e-6)
    lost = record.before.nats - record.original.nats
    if lost > 0:
        assert record.recovered == (record.before.nats - record.after.nats) / lost
    else:
        assert record.recovered is None


def test_the_best_step_is_kept(cut, tmp_path):
    """A rate that is far too high after a good start: what is kept is not the last."""
    recipe = replace(QUICK, steps=14, learning_rate=0.35, warmup_steps=10, eval_every=2)
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT)
    losses = {step: loss.nats for step, loss in record.held_out.items() if step}
    assert record.best_step == min(losses, key=losses.get)
    assert record.best_step < 14
    model, tokenizer = sh.load_model(cut, dtype="float32")
    adapted = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    loss = sh.evaluate_loss(adapted.get_base_model(), tokenizer, HELD_OUT, max_length=16)
    assert loss.nats == pytest.approx(losses[record.best_step], abs=1e-5)


@pytest.mark.parametrize(("device", "waited"), [("cpu", []), ("cuda:0", ["cuda:0"])])
def test_a_step_has_ended_when_its_device_has_done_it(monkeypatch, device, waited):
    """Else the time of the last forward and backward would be counted nowhere."""
    calls, now = [], [1.0]

    def clock():
        now[0] += 0.001
        return now[0]

    def synchronize(of):
        calls.append(str(of))
        now[0] += 0.05

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(bar, "time", SimpleNamespace(perf_counter=clock))
    arguments = SimpleNamespace(device=torch.device(device), gradient_accumulation_steps=1)
    state = SimpleNamespace(global_step=1)
    throughput = Throughput(np.array([7]), None)
    throughput.on_step_begin(arguments, state, None)
    throughput.on_step_end(arguments, state, None)
    assert calls == waited
    assert (throughput.tokens_per_second < 7 / 0.05) == bool(waited)


def test_the_config_of_adapters_names_its_matrices_in_order(healed):
    """Peft keeps them in a set, whose order is another in every process."""
    config = json.loads((healed[0] / "adapter_config.json").read_text())
    assert len(config["target_modules"]) > 1
    assert config["target_modules"] == sorted(config["target_modules"])

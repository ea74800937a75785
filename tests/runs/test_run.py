"""The stages joined."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

import shallower as sh
from shallower import Scan, TextsError
from shallower.runs.run import continue_text
from shallower.values.files import PARTIAL_FILE
from tests.documents import (
    HELD_OUT,
    TEXTS,
    Unread,
    assert_same,
    broken_after,
    documents,
    once,
    state_of,
)


# The whole way.
def test_a_run_leaves_what_the_stages_give(llama, words, tmp_path):
    before = state_of(llama)
    done = sh.run(llama, words, once(TEXTS), once(HELD_OUT), tmp_path / "out", [2, 1])
    assert_same(before, state_of(llama))

    scanned = sh.scan(llama, words, TEXTS)
    assert (done.scan.mean() == scanned.mean()).all()
    assert done.plan == scanned.plan(2)
    assert done.comparison == sh.compare_cuts(llama, words, scanned, HELD_OUT, [2, 1])
    assert done.difference <= 1e-5
    assert done.out == tmp_path / "out"

    assert {path.name for path in done.out.iterdir()} == {
        "scan.safetensors",
        "shallower_plan.json",
        "results.json",
        "checkpoint",
    }
    assert (Scan.load(done.out / "scan.safetensors").mean() == scanned.mean()).all()
    assert sh.Plan.load(done.out / "shallower_plan.json") == done.plan
    assert sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json") == done.plan
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results == done.to_json()
    assert results["num_samples"] == len(TEXTS)
    assert len(results["cuts"]) == 4

    reloaded = AutoModelForCausalLM.from_pretrained(done.out / "checkpoint", dtype=torch.float32)
    assert len(reloaded.model.layers) == 4
    kept = [llama.model.layers[index] for index in done.plan.survivors]
    for layer, original in zip(reloaded.model.layers, kept, strict=True):
        for name, weight in original.state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)


def test_a_run_continues_the_prompt_with_and_without_the_layers(llama, words, tmp_path):
    done = sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [3], prompt="w5 w7 w11")
    assert done.before == continue_text(llama, words, "w5 w7 w11")
    with sh.without_layers(llama, done.plan.blocks):
        assert done.after == continue_text(llama, words, "w5 w7 w11")
    assert done.before.startswith("w5 w7 w11 ")


def test_an_interrupted_run_goes_on_where_its_scan_was(llama, words, tmp_path, monkeypatch):
    texts = documents(200)
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(OSError, match="the disk went away"):
        sh.run(llama, words, broken_after(texts, 150), HELD_OUT, tmp_path / "out", [1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PARTIAL_FILE}

    forwards = []
    handle = llama.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sh.scan(llama, words, texts, checkpoint=tmp_path / "out" / PARTIAL_FILE)
    handle.remove()
    assert len(forwards) == (200 - 128) // 8

    done = sh.run(llama, words, texts, HELD_OUT, tmp_path / "out", [1])
    assert done.scan.num_samples == 200
    assert not (tmp_path / "out" / PARTIAL_FILE).exists()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_run_without_texts_leaves_nothing(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.run(llama, words, texts, HELD_OUT, tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("eval_texts", [[], ["w1", ""]])
def test_a_run_without_held_out_texts_is_refused_before_the_scan(
    llama, words, tmp_path, eval_texts
):
    with pytest.raises(TextsError):
        sh.run(llama, words, Unread(), eval_texts, tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()


def test_a_second_run_needs_overwrite_before_any_work(llama, words, tmp_path):
    sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [1])
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(llama, words, Unread(), HELD_OUT, tmp_path / "out", [2])
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    done = sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [2], overwrite=True)
    assert json.loads((done.out / "results.json").read_text()) == done.to_json()
    assert len(sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json").dropped) == 2


# Continuing a text.
def test_a_continuation_is_greedy(llama, words):
    ids = words("w3 w1 w4", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.inference_mode():
            following = llama(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    expected = words.decode(ids[0], skip_special_tokens=True)
    assert continue_text(llama, words, "w3 w1 w4", num_tokens=5) == expected


def test_a_continuation_is_greedy_whatever_the_model_prefers(llama, words):
    expected = continue_text(llama, words, "w3 w1 w4")
    llama.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    assert {continue_text(llama, words, "w3 w1 w4") for _ in range(3)} == {expected}

"""SmolLM2-135M from its GGUF file: the numbers, from the first text to the saved cut."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallower as sh
from shallower.models.identity import identify
from tests import reference

BLOCK = sh.Block(11, 19)
MAX_LENGTH = 32
NUM_TEXTS = 4


@pytest.fixture(scope="module")
def calibration(passages):
    return passages[0][:NUM_TEXTS]


@pytest.fixture(scope="module")
def held_out(passages):
    return passages[1][:4]


@pytest.fixture(scope="module")
def scanned(smol, calibration):
    return sh.scan(*smol, iter(calibration), max_length=MAX_LENGTH, batch_size=NUM_TEXTS)


@pytest.fixture(scope="module")
def own_states(smol, calibration):
    """The states of every text by itself, with hooks of this test's own, (S, 31, 576)."""
    model, tokenizer = smol
    samples = []
    for text in calibration:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :MAX_LENGTH]
        kept = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0])
        )
        with torch.inference_mode():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        hook.remove()
        rows = [state[0, -1] for state in (*hidden[:-1], kept[0])]
        samples.append(torch.stack(rows).numpy())
    return np.stack(samples)


@pytest.fixture(scope="module")
def cut(smol, tmp_path_factory):
    """The folder of the model without its layers 11 .. 18, and the plan."""
    model, tokenizer = smol
    folder = tmp_path_factory.mktemp("real") / "cut"
    plan = sh.Plan(30, (BLOCK,), model=identify(model))
    with sh.without_layers(model, [BLOCK]):
        sh.save_model(model, tokenizer, folder, plan=plan)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reloaded(cut):
    model, info = AutoModelForCausalLM.from_pretrained(
        cut, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


def test_a_scan_is_that_of_a_float64_oracle(scanned, own_states):
    assert (scanned.num_layers, scanned.num_samples, scanned.num_rejected) == (30, NUM_TEXTS, 0)
    for metric in ("angular", "cosine"):
        mean, stderr = reference.mean_and_stderr(own_states, metric)
        assert np.abs(scanned.mean(metric) - mean).max() < 1e-5
        assert np.abs(scanned.stderr(metric) - stderr).max() < 1e-5


def test_the_best_blocks_are_those_of_the_oracle(scanned, own_states):
    mean, _ = reference.mean_and_stderr(own_states, "angular")
    for n in range(1, 30):
        assert scanned.best_block(n).start == reference.best_start(mean, n)


@pytest.mark.slow
def test_a_saved_cut_is_the_model_with_its_layers_skipped(smol, reloaded, held_out):
    model, tokenizer = smol
    ids = tokenizer(held_out[0], return_tensors="pt")["input_ids"][:, :MAX_LENGTH]
    layers = model.model.layers
    hooks = [
        layers[i].register_forward_hook(lambda _module, args, _output: args[0])
        for i in BLOCK.layers
    ]
    with torch.inference_mode():
        skipped = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        whole = model(input_ids=ids, use_cache=False).logits
        got = reloaded(input_ids=ids, use_cache=False).logits
    assert (got - skipped).abs().max() <= 1e-5
    assert (whole - skipped).abs().max() > 1


def test_the_saved_tokenizer_is_the_same(smol, cut, held_out):
    _, tokenizer = smol
    again = AutoTokenizer.from_pretrained(cut)
    odd = "naïve 🙂\t１２  \u200b<|im_start|>user\n"
    assert again([*held_out, odd])["input_ids"] == tokenizer([*held_out, odd])["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_a_cut_costs_loss_and_less_where_the_layers_are_alike(smol, held_out, reloaded):
    model, tokenizer = smol
    options = {"max_length": MAX_LENGTH, "batch_size": 4}
    held_out = held_out[:2]
    before = sh.evaluate_loss(model, tokenizer, held_out, **options)
    with sh.without_layers(model, [BLOCK]):
        without = sh.evaluate_loss(model, tokenizer, held_out, **options)
    with sh.without_layers(model, range(8)):
        headless = sh.evaluate_loss(model, tokenizer, held_out, **options)
    after = sh.evaluate_loss(reloaded, tokenizer, held_out, **options)
    assert after.nats == pytest.approx(without.nats, abs=1e-5)
    assert 1 < before.nats < after.nats < headless.nats
    assert before.vocab_size == 49152


def test_the_loss_is_that_of_transformers(smol, held_out):
    model, tokenizer = smol
    ids = tokenizer(held_out[2], return_tensors="pt")["input_ids"][:, :MAX_LENGTH]
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=ids).loss.item()
    loss = sh.evaluate_loss(model, tokenizer, [held_out[2]], max_length=MAX_LENGTH)
    assert loss.nats == pytest.approx(expected, rel=1e-5)
    assert loss.num_tokens == ids.shape[1] - 1

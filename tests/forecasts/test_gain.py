"""What a cut saves: the published figures of Llama-2-7B, and a small model forecast and timed."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

import shallower as sh
from shallower.results.gain import Gain
from tests.conftest import tiny_llama

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip

PUBLISHED = {0: (7.0, 106.0), 8: (5.3, 79.5), 16: (3.6, 53.0)}
"""Milliseconds of a token and of a prefill on an A100 of 80 GB by the formula of LLM-Viewer
(2402.16363): bfloat16, 2,048 tokens, batch 1, by the number of layers that are gone."""


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_published_figures_of_llama_2_7b(attention):
    """Ours are of datasheets alone. The formula's attention writes its scores, as eager does."""
    config = LlamaConfig(**LLAMA_2_7B, attn_implementation=attention)
    half = sh.gain(config, [range(8, 24)], device="a100-80")
    assert half.before.parameters == 6_738_415_616
    assert half.before.weight_bytes == pytest.approx(13.48e9, rel=1e-3)
    assert half.before.kv_bytes_per_token == 2 * 2 * 32 * 4096
    assert half.before.kv_bytes == 2048 * half.before.kv_bytes_per_token
    one = half.on("a100-80")
    found = {
        0: (one.decode_before, one.prefill_before),
        16: (one.decode_after, one.prefill_after),
    }
    if attention == "eager":
        quarter = sh.gain(config, [range(20, 28)], device="a100-80")
        assert half.before == quarter.before
        other = quarter.on("a100-80")
        found[8] = other.decode_after, other.prefill_after
    for gone, times in found.items():
        for seconds, published, near in zip(times, PUBLISHED[gone], (0.01, 0.06), strict=True):
            assert 1e3 * seconds == pytest.approx(published, rel=near)
    # The written scores are what lies between the two ways, above and below the formula's.
    assert (1e3 * one.prefill_before > 106) == (attention == "eager")


@pytest.mark.usefixtures("hasty")
def test_all_devices_and_this_machine_by_default(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    found = sh.gain(tmp_path / "tiny", [1, range(3, 5)], context=16)
    assert (found.model, found.dropped, found.dtype) == ("tiny", (1, 3, 4), "bfloat16")
    assert (found.before.num_layers, found.after.num_layers) == (6, 3)
    names = [one.device for one in found.forecasts]
    assert names == ["a100-40", "a100-80", "h100", "h200", "l40s", "rtx-4090", "here"]
    assert found.after.kv_bytes == found.before.kv_bytes / 2
    for one in found.forecasts:
        assert 0 < one.decode_after < one.decode_before
        assert one.fits_before
        assert (one.launch > 0) == (one.device == "here")
    assert Gain.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_model_that_does_not_fit_is_told():
    config = LlamaConfig(**{**LLAMA_2_7B, "num_hidden_layers": 4, "hidden_size": 8192,
                            "intermediate_size": 50_000, "vocab_size": 500_000})  # fmt: skip
    found = sh.gain(config, [range(1, 4)], device="rtx-4090", context=8)
    one = found.on("rtx-4090")
    assert found.before.memory > 24e9 > found.after.memory
    assert (one.fits_before, one.fits_after) == (False, True)


def test_the_context_is_within_the_positions_that_are_learned():
    gpt2 = GPT2Config(n_layer=4, n_embd=16, n_head=2, n_positions=48, vocab_size=64)
    assert sh.gain(gpt2, [1], device="h100").context == 47
    with pytest.raises(sh.ModelError, match="context = 48: the model has learned 48 positions"):
        sh.gain(gpt2, [1], device="h100", context=48)
    small = LlamaConfig(**{**LLAMA_2_7B, "num_hidden_layers": 2})
    assert sh.gain(small, [1], device="h100").context == 2048


@pytest.mark.slow
def test_what_is_measured_is_measured_on_both():
    model = tiny_llama()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = sh.gain(model, [range(1, 5)], device="here", context=16, measure=True)
    measured = found.measured
    assert found.dtype == "float32"
    for name in ("prefill", "decode"):
        for phase in ("before", "after"):
            times = getattr(measured, f"{name}_{phase}")
            assert len(times) == 5
            assert all(0 < time < 60 for time in times)
    assert all(map(math.isfinite, measured.decode_ratio))
    gone = found.before.weight_bytes - found.after.weight_bytes
    least = found.before.memory, found.after.memory
    assert measured.peak_before > least[0]
    assert measured.peak_after > least[1]
    assert measured.peak_before - measured.peak_after >= gone
    assert len(model.model.layers) == 6
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "v100"}, sh.ModelError, "unknown device 'v100': expected one of a100-40"),
        ({"drop": [range(6)]}, sh.LayersError, "all 6 layers are named"),
        ({"drop": [range(4, 9)]}, sh.LayersError, "the model has no layer 8"),
        ({"context": 0}, sh.ModelError, r"context = 0: expected at least 1 .*--context"),
        ({"batch": True}, sh.ModelError, r"batch = True: expected at least 1 .*--batch"),
        ({"dtype": "fp8"}, sh.ModelError, "unknown dtype 'fp8'"),
        ({"measure": True}, sh.ModelError, "a config has no weights that could be timed"),
        ({"model": 7}, sh.ModelError, "a int is no model"),
        ({"model": "./nowhere"}, sh.ModelError, "there is no model at nowhere"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    given = {"model": tiny_llama().config, "drop": [2], "device": "h100", "context": 8, **options}
    with pytest.raises(error, match=message):
        sh.gain(given.pop("model"), given.pop("drop"), **given)


def test_a_cut_that_no_config_describes_is_refused():
    from tests.families import small_config

    with pytest.raises(sh.ModelError, match="the nearest 2 layers that could go"):
        sh.gain(small_config("gemma3n_text"), [3, 5], device="h100", context=8)

"""The memory that commands plan with, and the batches that follow."""

import json

import pytest

import shallower as sh

EVAL = pytest.param("eval", marks=pytest.mark.slow)


@pytest.mark.parametrize("command", ["scan", EVAL])
def test_a_dry_run_tells_the_memory(shallower, tiny, jsonl, command):
    out = ("--out", "x") if command == "scan" else ()
    options = (tiny, "--texts", jsonl, *out, "--dry-run", "--max-length", 64)
    memory = shallower(command, *options, "--device-memory", "16GB", "--json").json["memory"]
    assert memory["device_bytes"] == 16 * 10**9
    assert (memory["micro_batch"], memory["gradient_checkpointing"]) == (512, None)
    assert memory["peak_bytes"] == sum(memory["parts"].values()) > 0
    own = shallower(command, *options, "--json").json["memory"]
    assert own["micro_batch"] == 8
    text = shallower(command, *options, "--batch-size", 3, "--device-memory", "16GB").out
    assert "memory: " in text
    assert "; 3 texts a forward\n" in text
    assert "--stream" not in text
    small = (*options, "--device-memory", "10MB")
    assert "way out: stream the layers from disk (--stream)\n" in shallower(command, *small).out
    assert "way out" not in shallower(command, *small, "--stream", "--json").json


@pytest.mark.parametrize("wrong", ["0", "many", "-1", "1.5"])
def test_a_batch_size_is_auto_or_a_number(shallower, tiny, jsonl, wrong):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "x", "--batch-size", wrong)
    assert done.status == 2
    assert "expected auto or an integer of at least 1" in done.err


def test_a_budget_decides_on_the_batch(shallower, tiny, jsonl):
    options = (tiny, "--texts", jsonl, "--max-length", 64, "--dtype", "float32", "--json")
    expected = shallower("eval", *options).json["base"]["nats"]
    found = shallower("eval", *options, "--device-memory", "565MB").json["base"]["nats"]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_forecast_of_a_patch_is_of_plain_weights(tiny):
    with pytest.raises(sh.ModelError, match="weights of nf4 are not patched"):
        sh.memory_forecast(tiny, "patch", dtype="nf4", device_memory="16GB")


@pytest.mark.slow
def test_a_cut_of_the_hub_is_planned_by_the_preset_of_its_uncut_model(tiny, tmp_path, monkeypatch):
    """Its plan lies beside its weights, as in a folder."""
    from transformers.utils import hub

    from shallower.models import loading
    from shallower.settings.recipe import PRESETS, Preset

    cut = tmp_path / "cut"
    sh.prune(tiny, [sh.Block(2, 4)], cut)
    shape = json.loads((cut / "config.json").read_text())
    config = loading.read_config(cut)
    monkeypatch.setattr(loading, "read_config", lambda *_args, **_options: config)
    asked = []

    def cached(*place, **_options):
        asked.append(place)
        return str(cut / "shallower_plan.json")

    monkeypatch.setattr(hub, "cached_file", cached)
    paper = Preset("own", 16, 1e-3, 2, "llama", 32, 6, shape["vocab_size"])
    monkeypatch.setattr("shallower.settings.recipe.PAPER_PRESETS", (paper,))
    monkeypatch.setitem(PRESETS, "own", paper)
    plan, own, small = (
        sh.memory_forecast(place, recipe=sh.Recipe(preset, max_length=16), device_memory="16GB")
        for place, preset in (("who/cut", "auto"), (cut, "own"), (cut, "small"))
    )
    assert plan == own != small
    assert asked == [("who/cut", "shallower_plan.json")]

"""The memory that commands plan with, and the batches that follow."""

import pytest


@pytest.mark.parametrize("command", ["scan", "eval"])
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

"""``shallower gain``."""

import shallower as sh
from shallower.results.gain import Gain


def test_a_table_of_what_a_cut_saves(shallower, tiny):
    done = shallower("gain", tiny, "--drop", "1:3", "--forecast-device", "a100-80", "--context", 16)
    assert done.status == 0, done.err
    shown = " ".join(done.out.split())
    for part in ("tiny without [1, 3)", "one text of 16 tokens", "KV cache a token",
                 "A100 SXM 80GB, prefill", "before", "after", "ratio"):  # fmt: skip
        assert part in shown
    assert "H100" not in shown


def test_json_is_what_python_gives(shallower, tiny, plans):
    options = (
        "--forecast-device",
        "h100",
        "--context",
        16,
        "--batch",
        2,
        "--dtype",
        "float32",
        "--json",
    )
    found = Gain.from_json(shallower("gain", tiny, "--plan", plans / "tiny", *options).json)
    plan = sh.Plan.load(plans / "tiny" / "shallower_plan.json")
    expected = sh.gain(tiny, plan, device="h100", context=16, batch=2, dtype="float32")
    assert found == expected


def test_measured_on_this_machine(shallower, tiny):
    options = ("--drop", "1:3", "--forecast-device", "here", "--context", 16, "--measure")
    done = shallower("gain", tiny, *options)
    assert done.status == 0, done.err
    assert "measured here, peak memory" in done.out

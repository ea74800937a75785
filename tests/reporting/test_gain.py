"""The table of what a cut saves."""

from io import StringIO

from rich.console import Console

from shallower.reporting.gain import gain_table
from tests.values.test_gain import gain


def shown(found):
    console = Console(width=80, record=True, file=StringIO())
    console.print(gain_table(found))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return " ".join(" ".join(lines).split())


def test_before_after_and_ratio():
    text = shown(gain())
    for part in (
        "llama without [8, 16)", "bfloat16, 1 text of 2,048 tokens", "32 │ 24 │ 0.750",
        "6.74B │ 5.12B │ 0.760", "13.5GB │ 10.2GB │ 0.760", "524KB │ 393KB │ 0.750",
        "A100 SXM 80GB, token │ 7.00 ms * │ 5.30 ms │ 0.757", "100 ms * │ 75.00 ms",
        "measured here, prefill │ 3000 ms │ 1800 ms │ 0.600 [0.500, 0.750]",
    ):  # fmt: skip
        assert part in text, part


def test_nothing_is_said_of_what_was_not_measured():
    assert "measured here" not in shown(gain(None))

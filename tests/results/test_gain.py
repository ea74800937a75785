"""Gain: stored and read, ratios, what is damaged refused."""

import contextlib
import json
from dataclasses import asdict

import pytest
from hypothesis import given

from shallower.results.gain import Forecast, Gain, MeasuredGain, Sizes
from tests.values.damage import damaged

BEFORE = Sizes(32, 6_738_415_616, 13_476_831_744, 524_288, 1 << 30, 28 * 10**12, 10**10, 10**10, 5)
AFTER = Sizes(24, 5_119_348_736, 10_238_697_984, 393_216, 3 << 28, 21 * 10**12, 10**9, 10**9, 0)
FORECAST = Forecast(
    "a100-80", "A100 SXM 80GB", "datasheet", 312e12, 2039e9, 80 * 10**9, 0.0,
    prefill_before=0.1, prefill_after=0.075, decode_before=0.007, decode_after=0.0053,
    fits_before=False, fits_after=True,
)  # fmt: skip
MEASURED = MeasuredGain(
    "a CPU", (2.0, 4.0, 3.0), (1.0, 3.0, 1.8), (0.2, 0.2, 0.3), (0.1, 0.1, 0.3), 9, 8
)


def gain(measured=MEASURED):
    return Gain(
        "llama", 32, tuple(range(8, 16)), "bfloat16", 2048, 1, BEFORE, AFTER, (FORECAST,), measured,
        {"torch": "2"},
    )  # fmt: skip


@pytest.mark.parametrize("measured", [MEASURED, None])
def test_a_gain_is_read_as_it_was_stored(measured):
    stored = json.loads(json.dumps(gain(measured).to_json(), allow_nan=False))
    assert Gain.from_json(stored) == gain(measured)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "a gain of version 1"),
        ({"forecasts": [{**asdict(FORECAST), "decode_before": 0}]}, "times above 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Gain.from_json({**gain().to_json(), **change})


def test_ratios():
    found = gain()
    assert found.ratios()["num_layers"] == 0.75
    assert found.ratios()["parameters"] == pytest.approx(0.7597, abs=1e-4)
    assert found.on("a100-80").decode_ratio == pytest.approx(0.0053 / 0.007)
    assert found.on("a100-80").prefill_ratio == pytest.approx(0.75)
    assert found.measured.prefill_ratio == pytest.approx((0.6, 0.5, 0.75))  # paired, then sorted
    assert found.measured.decode_ratio == (0.5, 0.5, 1.0)
    assert found.before.memory == 13_476_831_744 + (1 << 30)
    with pytest.raises(KeyError):
        found.on("h100")


@given(damaged(gain().to_json()))
def test_what_is_damaged_is_refused_or_read(document):
    with contextlib.suppress(KeyError, TypeError, ValueError):
        assert isinstance(Gain.from_json(document).to_json(), dict)

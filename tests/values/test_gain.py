"""Gain: stored and read, ratios, what is damaged refused."""

import contextlib
import json
from dataclasses import asdict

import pytest
from hypothesis import given

from shallower.values.draft import Draft
from shallower.values.gain import Forecast, Gain, Measured, Sizes
from tests.values.damage import damaged

BEFORE = Sizes(32, 6_738_415_616, 13_476_831_744, 524_288, 1 << 30, 28 * 10**12, 10**10, 10**10, 5)
AFTER = Sizes(24, 5_119_348_736, 10_238_697_984, 393_216, 3 << 28, 21 * 10**12, 10**9, 10**9, 0)
FORECAST = Forecast(
    "a100-80", "A100 SXM 80GB", "datasheet", 312e12, 2039e9, 80 * 10**9, 0.0,
    prefill_before=0.1, prefill_after=0.075, decode_before=0.007, decode_after=0.0053,
    fits_before=False, fits_after=True,
)  # fmt: skip
MEASURED = Measured(
    "a CPU", (2.0, 4.0, 3.0), (1.0, 3.0, 1.8), (0.2, 0.2, 0.3), (0.1, 0.1, 0.3), 9, 8
)


def gain(measured=MEASURED, acceptance=None, stderr=None):
    return Gain(
        "llama", 32, tuple(range(8, 16)), "bfloat16", 2048, 1, BEFORE, AFTER, (FORECAST,), measured,
        {"torch": "2"}, acceptance, stderr,
    )  # fmt: skip


@pytest.mark.parametrize("known", [(MEASURED,), (None,), (MEASURED, 0.8, 0.02), (None, 1.0)])
def test_a_gain_is_read_as_it_was_stored(known):
    stored = json.loads(json.dumps(gain(*known).to_json(), allow_nan=False))
    assert Gain.from_json(stored) == gain(*known)


def test_a_gain_of_an_older_version_has_no_acceptance():
    stored = gain(acceptance=0.8).to_json()
    for name in ("acceptance", "acceptance_stderr", "drafts"):
        del stored[name]
    assert Gain.from_json(stored) == gain()


def test_the_cut_as_a_draft():
    found = gain(acceptance=0.8, stderr=0.02)
    forecast, measured = found.drafts()["a100-80"], found.drafts()["measured"]
    assert forecast == Draft(0.0053 / 0.007, 0.8, 0.02)
    assert measured == Draft(0.5, 0.8, 0.02)  # the median of the paired ratios
    assert found.to_json()["drafts"]["measured"] == measured.to_json()
    assert list(gain(None).drafts()) == ["a100-80"]
    assert gain(None).drafts()["a100-80"].speedup is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acceptance": 0}, "acceptance above 0, 1 at most"),
        ({"acceptance": 1.5}, "acceptance above 0, 1 at most"),
        ({"acceptance": 0.5, "acceptance_stderr": -1}, "error of the acceptance of at least 0"),
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


@given(damaged(gain(acceptance=0.8, stderr=0.02).to_json()))
def test_what_is_damaged_is_refused_or_read(document):
    with contextlib.suppress(KeyError, TypeError, ValueError):
        assert isinstance(Gain.from_json(document).to_json(), dict)

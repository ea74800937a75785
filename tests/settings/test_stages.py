"""Settings of a scan and of a patch: what keys have of them, and what is refused."""

import numpy as np
import pytest

import shallower as sh
from shallower.errors import (
    LayersError,
    PatchError,
    PositionsError,
    RecipeError,
    SettingsError,
    TextsError,
)
from shallower.settings.stages import ScanSettings
from shallower.values.positions import Positions

SCAN = {
    "tokens": {"max_length": 256, "batch_size": "auto"},
    "metrics": ["angular", "cosine"],
    "positions": {"kind": "last", "count": 1, "seed": 0},
    "keep_samples": False,
    "until": None,
}
"""What a key of the store has of a scan by default: of another form no cached scan is found."""


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({}, {}),
        ({"threads": 3}, {}),
        ({"experts": True}, {"experts": True}),
        (
            {"positions": "random:2", "seed": 5},
            {"positions": {"kind": "random", "count": 2, "seed": 5}},
        ),
        ({"seed": 5}, {}),
        (
            {"positions": sh.Positions("random", 2, 7)},
            {"positions": {"kind": "random", "count": 2, "seed": 7}},
        ),
        (
            {"until": 0.9, "n": [1, 2], "exact": True},
            {"until": {"confidence": 0.9, "tolerance": 0.005, "sizes": (1, 2), "exact": True}},
        ),
        (
            {"until": sh.Until(0.9)},
            {"until": {"confidence": 0.9, "tolerance": 0.005, "sizes": (), "exact": False}},
        ),
    ],
    ids=str,
)
def test_the_key_of_a_scan_has_what_it_depends_on(options, differs):
    assert sh.ScanSettings(**options).to_json() == SCAN | differs


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        (sh.ScanSettings, {"tolerance": 0.1}, SettingsError, "add --until 0.99, say"),
        (
            sh.ScanSettings,
            {"until": sh.Until(0.9), "exact": True},
            SettingsError,
            "say when a scan",
        ),
        (sh.ScanSettings, {"until": 1}, SettingsError, "which no number of texts reaches"),
        (sh.ScanSettings, {"positions": "first"}, PositionsError, "no positions 'first'"),
        (sh.ScanSettings, {"seed": "x"}, PositionsError, "seed = 'x'"),
        (sh.ScanSettings, {"until": "0.9"}, SettingsError, "until"),
        (sh.ScanSettings, {"until": 0.9, "n": "1,2"}, LayersError, "expected an integer"),
        (sh.ScanSettings, {"n": [1]}, SettingsError, "until"),
        (sh.ScanSettings, {"batch_size": 0}, TextsError, "batch_size must be an integer"),
        (
            sh.PatchSettings,
            {"num_tokens": 0},
            PatchError,
            "num_tokens = 0: expected a whole number",
        ),
        (sh.PatchSettings, {"share": 0}, RecipeError, "share must be above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(kind, options, error, said):
    with pytest.raises(error, match=said):
        kind(**options)


def test_a_keyword_that_is_no_setting_is_named(words):
    with pytest.raises(SettingsError, match="ScanSettings has no setting 'metric': did you mean"):
        sh.scan(None, words, ["a"], metric=["angular"])


def test_a_seed_is_that_of_the_positions():
    settings = ScanSettings(positions="random:2", seed=3)
    assert settings.positions.seed == 3
    assert ScanSettings.of(settings, {"seed": 7}).positions.seed == 7
    assert ScanSettings(positions=Positions("random", 2, 5)).positions.seed == 5


def test_sizes_may_come_in_any_form():
    found = [ScanSettings(until=0.9, n=n) for n in (1, [1], np.array([1]))]
    assert len({*found}) == 1

"""Sizes read and written, and what a plan says."""

import pytest

from shallower.errors import ModelError
from shallower.values.estimates import MemoryPlan, format_size, needed_device, parse_size, usable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("80G", 80 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("512M", 512 * 10**6),
        ("1TB", 10**12),
        ("123", 123),
        (8, 8),
        ("1.5 MB", 1_500_000),
        ("10k", 10_000),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "16 cards", "-1GB", "0GB", "16iB", "1e9", "nan", True, "1e30GB", "99999999TB"],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ModelError, match=r"unknown size .*expected bytes, as 16GB"):
        parse_size(text)


def test_sizes_are_written():
    assert format_size(15_960_000_000) == "16.0 GB"
    assert format_size(5_799_936) == "5.8 MB"


@pytest.mark.parametrize("peak", [10**6, 13_700_000_001, 70 * 10**9])
def test_a_device_is_as_large_as_needed(peak):
    device = needed_device(peak)
    assert peak <= usable(device) <= peak + 2
    assert MemoryPlan(peak, 1, None, device).fits
    assert not MemoryPlan(peak, 1, None, int(0.98 * device) - 2 * 10**6).fits


def test_a_plan_tells_its_parts():
    plan = MemoryPlan(13_000_000_000, 1, False, 16 * 10**9, {"weights": 3 * 10**9, "rest": 10**10})
    assert str(plan) == (
        "13.0 GB of 16.0 GB (weights 3.0 GB, rest 10.0 GB); 1 text a forward, without recomputation"
    )
    assert plan.to_json() == {
        "peak_bytes": 13_000_000_000,
        "micro_batch": 1,
        "gradient_checkpointing": False,
        "device_bytes": 16_000_000_000,
        "parts": {"weights": 3_000_000_000, "rest": 10_000_000_000},
    }
    assert "10.0 GB, which does not fit (" in str(MemoryPlan(13 * 10**9, 8, None, 10**10))


def test_an_unknown_need_is_told_and_fits():
    plan = MemoryPlan(None, 8, None, 10**10)
    assert plan.fits
    assert str(plan) == "unknown for a model of this family, of 10.0 GB; 8 texts a forward"

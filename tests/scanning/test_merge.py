"""Scans that are merged."""

import numpy as np
import pytest

from shallower import RejectedSamplesWarning, Scan, ScanError, StatesError
from tests.scanning.samples import (
    MODEL,
    closed,
    described,
    load,
    model_of,
    random_states,
    scan_of,
    signed,
    word_places,
)


# Merging
@pytest.mark.parametrize(
    "other",
    [
        scan_of(random_states((3, 5, 8), 1)),
        scan_of(random_states((3, 4, 8), 1), ("angular",)),
        scan_of(random_states((3, 4, 8), 1), ("cosine",)),
        scan_of(random_states((3, 4, 8), 1), model=None),
        scan_of(random_states((3, 4, 8), 1), model=model_of(3, "e" * 64)),
    ],
    ids=["layers", "metrics", "other metrics", "no model", "another model"],
)
def test_scans_of_different_things_do_not_merge(other):
    scan = scan_of(random_states((3, 4, 8), 0))
    for scans in ([scan, other], [other, scan], [scan, scan, other]):
        with pytest.raises(ScanError):
            Scan.merge(scans)


@pytest.mark.parametrize("scans", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_scans_do_not_merge(scans):
    with pytest.raises(ScanError, match="no scan"):
        Scan.merge(scans)


def test_more_samples_than_there_is_room_for_do_not_merge():
    header, inner, data = described()
    words = np.frombuffer(data, "<u8").copy()
    words[2] = 2**31
    words[word_places(data)["norms"].stop :] = 0
    scan = load(closed(signed(header, inner, words.tobytes()), words.tobytes()))
    with pytest.raises(StatesError, match="at most 2147483648 samples"):
        Scan.merge([scan, scan])


def test_merged_scans_count_and_name_all_that_were_rejected():
    states = random_states((5, 4, 8), 0)
    states[1, 2] = 0
    with pytest.warns(RejectedSamplesWarning):
        scan = scan_of(states)
    merged = Scan.merge(iter([scan] * 150))
    assert (merged.num_samples, merged.num_rejected) == (600, 150)
    assert len(merged.rejections) == 100
    assert merged.model == MODEL

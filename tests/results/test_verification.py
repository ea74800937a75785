"""What a race of proposals gives: its sentence, its ties, its JSON."""

import json
import math

import pytest

from shallower.results.scores import Difference
from shallower.results.verification import Candidate, Verified
from shallower.values.plan import Plan


def candidate(layers, score, difference, **options):
    return Candidate(
        Plan.of(30, layers), ("angular",), score, 0.06, Difference(*difference), **options
    )


def verified(*candidates, after="patch"):
    return Verified(
        8, after, "loss", "nats a token", candidates, 48, num_proposals=9, layer_forwards=1200,
        seconds=3.5, failed={"cka": "too few texts"},
    )  # fmt: skip


WINNER = candidate([range(12, 20)], 4.052, (0.0, 0.0, 48))
TIE = candidate([5, range(12, 19)], 4.07, (0.018, 0.02, 48))
LOSER = candidate([range(11, 19)], 4.2, (0.148, 0.02, 48))
GIVEN_UP = candidate([range(1, 9)], 4.06, (0.008, 0.02, 8), lost_early=True)
LOST_EARLY = candidate([range(2, 10)], 4.6, (0.55, 0.02, 8), lost_early=True)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((), ""),
        ((LOSER,), ", 0.148 ± 0.020 less than the next"),
        ((TIE, LOSER), ", 0.018 ± 0.020 less than the next; [5, 6) [12, 19) cannot be told "
         "from it"),
        ((TIE, TIE, LOST_EARLY), ", 0.018 ± 0.020 less than the next; [5, 6) [12, 19) and 1 other "
         "cannot be told from it"),
        ((TIE, GIVEN_UP), ", 0.008 ± 0.020 less than the next on 8 texts; [1, 9) and 1 other "
         "cannot be told from it"),
        ((TIE, TIE, TIE), ", 0.018 ± 0.020 less than the next; [5, 6) [12, 19) and 2 others "
         "cannot be told from it"),
        ((candidate([range(1, 9)], 4.04, (-0.01, 0.02, 48)),), ", 0.010 ± 0.020 more than the "
         "next; [1, 9) cannot be told from it"),
    ],
)  # fmt: skip
def test_a_sentence_tells_the_margin_and_the_ties(others, said):
    start = "[12, 20) of 9 proposals: 4.05 ± 0.06 nats a token "
    said = f", on the selection texts{said}"
    assert verified(WINNER, *others).sentence() == f"{start}after a quick patch{said}"
    assert verified(WINNER, *others, after="none").sentence() == f"{start}as it is cut{said}"


def test_the_next_is_the_nearest_by_paired_difference_on_whatever_texts():
    easy = candidate([range(3, 11)], 3.1, (0.068, 0.032, 8), lost_early=True)
    near = candidate([range(4, 12)], 4.9, (0.035, 0.015, 16), lost_early=True)
    found = verified(WINNER, LOSER, easy, near)
    assert found.candidates == (WINNER, near, easy, LOSER)
    assert found.margin == near.difference
    assert "0.035 ± 0.015 less than the next on 16 texts" in found.sentence()
    older = found.to_json() | {"candidates": [one.to_json() for one in (WINNER, LOSER, easy, near)]}
    assert Verified.from_json(older).margin == near.difference


def test_one_rule_tells_ties_however_early_a_cut_was_lost():
    assert verified(WINNER, TIE, LOSER, GIVEN_UP, LOST_EARLY).tied == (GIVEN_UP, TIE)
    assert [one.to_json()["tied"] for one in (LOSER, GIVEN_UP, LOST_EARLY)] == [False, True, False]


def test_it_is_read_as_it_was_written():
    found = verified(WINNER, TIE, candidate([3], math.nan, (0.1, math.nan, 1)))
    again = Verified.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again.candidates[:2] == found.candidates[:2]
    assert math.isnan(again.candidates[2].score)
    assert again.to_json() == found.to_json()
    with pytest.raises(ValueError, match="no candidates"):
        Verified.from_json(found.to_json() | {"candidates": []})

"""A loss that two processes measure together is that of one."""

import json

import pytest

from shallower.evaluation.loss import gathered, rank_and_size
from tests.evaluation.shared_loss import measure_together
from tests.forks import Fork


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What came of every case in both processes."""
    folder = tmp_path_factory.mktemp("group")
    store = str(folder / "store")
    forks = [
        Fork(measure_together, store, rank, 2, folder=folder, name=str(rank)) for rank in (0, 1)
    ]
    assert [fork.ended(120) for fork in forks] == [0, 0], [fork.err for fork in forks]
    return [json.loads(fork.out.splitlines()[-1]) for fork in forks]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_loss_is_the_number_that_one_process_finds(both, batch_size):
    first, second = both
    alone = first[f"alone {batch_size}"]
    assert alone["num_texts"] == 17
    assert first[f"shared {batch_size}"] == second[f"shared {batch_size}"] == alone


def test_a_single_text_is_measured_by_one_of_them(both):
    assert both[0]["one text"] == both[1]["one text"]
    assert both[0]["one text"]["num_tokens"] == 1


def test_nothing_to_predict_is_said_by_all(both):
    for one in both:
        assert one["nothing"].startswith("TextsError: no text has two tokens")


def test_what_fails_in_one_fails_in_all(both):
    first, second = both
    assert first["not finite"] == second["not finite"]
    assert first["not finite"].startswith("ModelError: the loss on text 1 is not finite")
    assert first["one fails"] == second["one fails"] == "TextsError: in the first process"
    assert first["one fails badly"] == "UnpicklableError: this and that"
    assert second["one fails badly"] == (
        "ModelError: another process could not measure its share: UnpicklableError: this and that"
    )
    assert [one["all fail"] for one in both] == ["ValueError: 0", "ValueError: 1"]
    assert first["none fails"] == second["none fails"] == [0, 1]


def test_without_a_group_a_process_measures_alone():
    assert rank_and_size(shared=True) == (0, 1)
    assert gathered(lambda: 3, 1) == [3]

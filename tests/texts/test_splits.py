from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import TextsError
from shallower.texts.splits import three_splits, two_splits


def texts(count, first=0):
    return [f"text {i}" for i in range(first, first + count)]


REPORT = ["one that reports", "another"]


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(4, 30), st.integers(0, 3))
def test_no_text_is_in_two_sets(numbers, num_choosing, seed):
    source = [f"text {i}" for i in numbers]
    report = texts(5)
    own = {text for text in source if text not in report}
    if len(own) < 12:
        with pytest.raises(TextsError, match="too few calibration and selection texts"):
            three_splits(source, report, num_choosing=num_choosing, seed=seed)
        return
    splits = three_splits(source, report, num_choosing=num_choosing, seed=seed)
    assert not set(splits.fit) & set(splits.choose)
    assert set(splits.fit) | set(splits.choose) == own
    assert len(splits.fit) + len(splits.choose) == len(own)
    assert len(splits.choose) == min(num_choosing, len(own) // 3)
    assert len(splits.fit) >= 8
    assert splits.report == report
    assert splits.num_shared == sum(text in report for text in source)
    assert splits.num_shared + splits.num_repeated + len(own) == len(source)


def test_those_that_choose_lie_evenly_among_those_that_fit():
    splits = three_splits(texts(400), REPORT)
    places = sorted(int(text.split()[1]) for text in splits.choose)
    assert [b - a for a, b in pairwise(places)] == [25] * 15
    assert len(splits.fit) == 384
    assert splits.fit == sorted(splits.fit, key=lambda text: int(text.split()[1]))


def test_the_order_of_those_that_choose_is_by_the_seed():
    first, second = (three_splits(texts(400), REPORT, seed=seed).choose for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first == three_splits(texts(400), REPORT).choose
    # The same on every machine and in every version.
    assert [int(text.split()[1]) for text in first[:4]] == [262, 362, 137, 37]


def test_a_text_that_reports_does_nothing_else():
    splits = three_splits(texts(20), [" text 3\n", *texts(5, first=100)])
    assert "text 3" not in splits.fit + splits.choose
    assert splits.num_shared == 1
    assert len(splits.fit) + len(splits.choose) == 19


@pytest.mark.parametrize(
    ("source", "report", "message"),
    [
        (texts(11), REPORT, "11, expected at least 8 and 4; .*--texts"),
        (texts(12), texts(2), "10 beside 2 test texts, expected"),
        (texts(11) * 2, REPORT, "11 and 11 given twice, expected"),
        (texts(12), ["one"], "1 different text, expected at least 2; .*--eval-texts"),
        (texts(12), ["one", "one "], "1 different text, "),
        ([], [], "0 different texts, "),
        ("a string", REPORT, "an iterable of strings"),
        ([*texts(12), 3], REPORT, "an iterable of strings"),
    ],
)
def test_too_few_texts_are_refused(source, report, message):
    with pytest.raises(TextsError, match=message):
        three_splits(source, report)


def test_a_healing_trains_on_texts_that_nothing_was_fitted_on_first():
    splits = three_splits(texts(13), [*REPORT, "text 40"])
    beyond = ["text 20", splits.choose[0] + " ", "text 40", "text 21"]
    assert [*splits.training(iter(beyond))] == ["text 20", "text 21", *splits.fit[::-1]]


def test_a_number_that_cannot_choose_is_refused():
    with pytest.raises(TextsError, match="expected at least 4 selection texts, got 3"):
        three_splits(texts(20), REPORT, num_choosing=3)


def test_items_are_divided_into_halves():
    items = list(range(9)) * 2
    choose, report = two_splits(items)
    assert sorted(choose + report) == list(range(9))
    assert (len(choose), len(report)) == (5, 4)
    assert two_splits(items, seed=1) != (choose, report)


def test_too_few_items_are_refused():
    with pytest.raises(TextsError, match="7 distinct, expected at least 8"):
        two_splits([*range(7), 0])

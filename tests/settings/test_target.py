"""What is asked of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import LayersError
from shallower.settings.target import Target, parse_count, parse_share


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("100M", 10**8),
        ("6.7B", 6_700_000_000),
        (" 12 k", 12_000),
        ("5", 5),
        ("1.5t", 15 * 10**11),
        ("1" + 400 * "0", 10**400),
    ],
)
def test_numbers_of_parameters_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "1e8", "100 MB", "1.2.3M", "0.2"])
def test_what_is_no_number_of_parameters_is_refused(text):
    with pytest.raises(LayersError, match="--params"):
        parse_count(text)


def test_shares_are_read():
    assert [parse_share(text) for text in ("0.8x", "0.8", " 0.25 X")] == [0.8, 0.8, 0.25]
    for text in ("", "x", "80%", "-0.5", "1/2"):
        with pytest.raises(LayersError, match="--target-latency"):
            parse_share(text)


def test_a_wish_is_told_and_stored():
    target = Target(latency=0.8, device="h100", context=512)
    assert str(target) == "a token in at most 0.8 of the time, as forecast on h100 at 512 tokens"
    assert str(Target(memory=12 * 10**9)) == (
        "at most 12.0 GB of weights and cache, at 2,048 tokens"
    )
    assert Target(**target.to_json()) == target
    assert Target(n=2, context=7).size(6) == 2
    assert Target(context=7).is_none
    assert not target.is_none
    assert target.size(6) is None


@given(fraction=st.floats(0.001, 0.999), num_layers=st.integers(2, 200))
def test_a_fraction_is_the_least_number_of_layers_that_is_so_many(fraction, num_layers):
    target = Target(fraction=fraction)
    try:
        n = target.size(num_layers)
    except LayersError:
        assert fraction * num_layers > num_layers - 1
        return
    assert n / num_layers >= fraction - 1e-9
    assert n == 1 or (n - 1) / num_layers < fraction


def test_a_fraction_that_is_a_whole_number_of_layers_is_that_number():
    assert [Target(fraction=tenths / 10).size(30) for tenths in range(1, 10)] == [
        3, 6, 9, 12, 15, 18, 21, 24, 27,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"n": 4, "fraction": 0.5}, "n and fraction are given: expected one of"),
        ({"n": 0}, r"n = 0: expected at least 1 \(n, --n\)"),
        ({"n": True}, "expected a whole number"),
        ({"fraction": 1.0}, r"fraction = 1.0: .*--fraction"),
        ({"fraction": 0}, "above 0"),
        ({"params": -3}, "--params"),
        ({"max_loss": 0.0}, r"max_loss = 0.0: expected nats a token above 0 .*--max-loss"),
        ({"max_loss": float("nan")}, "expected a number"),
        ({"fraction": 10**400}, "above 0"),
        ({"latency": 1.0}, r"latency = 1.0: expected a share .*--target-latency"),
        ({"memory": 0}, r"memory = 0: expected at least 1 .*--target-memory"),
        ({"memory": 10, "latency": 0.5}, "latency and memory are given: expected one of n"),
        ({"memory": 10, "context": 0}, r"context = 0: expected at least 1 .*--context"),
        ({"memory": 10, "device": "h100"}, "device = 'h100' without a latency"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(target, message):
    with pytest.raises(LayersError, match=message):
        Target(**target)


def test_more_layers_than_there_are_cannot_be_wished_for():
    with pytest.raises(LayersError, match=r"n = 6 .*1 <= n <= 5"):
        Target(n=6).size(6)
    with pytest.raises(LayersError, match=r"fraction = 0\.99: these are all 6"):
        Target(fraction=0.99).size(6)
    with pytest.raises(LayersError, match="n = 10000"):
        Target(n=10**400).size(6)
    assert Target(params=5).size(6) is None

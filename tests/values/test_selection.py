"""The deepest-n heuristic, and layers and sizes read from text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import Block, LayersError, deepest_block
from shallower.values.layers import parse_layers, parse_sizes

SPACES = st.sampled_from(["", " ", "  ", "\t"])


@st.composite
def layer_texts(draw):
    """Blocks, and a text that names them."""
    blocks, parts = [], []
    for start in draw(st.lists(st.integers(0, 999_999_998), min_size=1, max_size=6)):
        space = draw(SPACES)
        if draw(st.booleans()):
            stop = draw(st.integers(start + 1, 999_999_999))
            parts.append(f"{space}{start}{space}:{space}{stop}{space}")
        else:
            stop = start + 1
            parts.append(f"{space}{start}{space}")
        blocks.append(Block(start, stop))
    return blocks, ",".join(parts)


@given(st.integers(2, 200), st.data())
def test_the_deepest_block_spares_the_last_layer_alone(num_layers, data):
    n = data.draw(st.integers(1, num_layers - 1))
    block = deepest_block(num_layers, n)
    assert len(block) == n
    assert block.stop == num_layers - 1
    assert block.start == num_layers - 1 - n


@pytest.mark.parametrize("n", [0, -1, 6, 10**30, True, 2.5, "3", None])
def test_a_deepest_block_that_is_none_or_all_or_no_number_is_refused(n):
    with pytest.raises(LayersError):
        deepest_block(6, n)


def test_layers_are_indices_and_half_open_ranges():
    assert parse_layers("3,12:20") == [Block(3, 4), Block(12, 20)]
    for printed in ("[3, 4) [12, 20)", "[3,4), [12,20)", " [3, 4) [12, 20) "):
        assert parse_layers(printed) == [Block(3, 4), Block(12, 20)]
    with pytest.raises(LayersError, match="did you mean 12:21, which ends with layer 20"):
        parse_layers("3,12-20")


@given(layer_texts())
def test_layers_come_back_from_text(case):
    blocks, text = case
    assert parse_layers(text) == blocks


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "3,", ",3", "3,,4", "a", "-1", "+1", "1.0", "1e3", "0x3", "3-5", "3;5",
        "3 4", "1:2:3", ":", "3:", ":3", "::", "5:5", "5:4", "-1:2", "1:-2", "1: -2", "[3,4]",
        "[3,4", "3,4)",
        "٣", "３", "²", "1٣", "3:٤", "१:२", "1_000", "1234567890", "0:1234567890", "3\x00", "1\n2",
        "nan", "None", "True",
    ],
)  # fmt: skip
def test_text_that_names_no_layers_is_refused(text):
    with pytest.raises(LayersError):
        parse_layers(text)


@given(st.text(alphabet="0123456789:,- .٣²\n\t", max_size=12))
def test_any_text_names_blocks_or_is_refused(text):
    try:
        blocks = parse_layers(text)
    except LayersError:
        return
    numbers = [int(number) for part in text.split(",") for number in part.split(":")]
    assert text.isascii()
    assert {block.start for block in blocks} <= set(numbers)
    assert len(blocks) == text.count(",") + 1


@given(st.lists(st.integers(1, 999_999_999), min_size=1, max_size=8), SPACES)
def test_sizes_come_back_ascending_and_once_each(sizes, space):
    text = ",".join(f"{space}{size}{space}" for size in sizes)
    assert parse_sizes(text) == sorted(set(sizes))


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "1,", ",1", "1,,2", "0", "1,0", "-1", "+1", "01", "1.0", "1e3", "1:3",
        "a", "٣", "３", "²", "1٣", "1 2", "1_0", "1234567890", "1\x00", "nan", "None",
    ],
)  # fmt: skip
def test_text_that_holds_no_sizes_is_refused(text):
    with pytest.raises(LayersError):
        parse_sizes(text)


@given(st.text(max_size=12))
def test_any_text_holds_positive_sizes_or_is_refused(text):
    try:
        sizes = parse_sizes(text)
    except LayersError:
        return
    assert sizes
    assert all(size > 0 for size in sizes)

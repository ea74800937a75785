"""Texts to batches: read once, in constant memory, padded on the right, nothing silent."""

import copy
from contextlib import nullcontext, suppress
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from shallower.errors import TextsError
from shallower.texts.batches import WINDOW, TokenBatches
from shallower.values.plan import NAMED_REJECTIONS
from shallower.values.tokens import Tokens

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=80)


def sentence(length, start=0):
    return " ".join(f"w{(start + i) % 97}" for i in range(length))


def sentences(lengths):
    return [sentence(length, start) for start, length in enumerate(lengths)]


def rows(batches):
    """The token ids of every sample, without padding, by sample."""
    return {
        int(sample): ids[mask.astype(bool)].tolist()
        for batch in batches
        for sample, ids, mask in zip(
            batch.samples, batch.input_ids, batch.attention_mask, strict=True
        )
    }


def framed(words):
    """The tokenizer of the tests with a special token before and after every text."""
    tokenizer = copy.deepcopy(words)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


@given(LENGTHS, st.integers(1, 9), st.integers(1, 14))
def test_every_text_comes_out_once_truncated_or_is_rejected(words, lengths, batch_size, limit):
    batches = TokenBatches(words, iter(sentences(lengths)), Tokens(limit, batch_size))
    got = rows(batches)
    expected = {
        index: [(index + i) % 97 for i in range(min(length, limit))]
        for index, length in enumerate(lengths)
        if length
    }
    assert got == expected
    assert batches.num_texts == len(lengths)
    assert batches.num_rejected == lengths.count(0)


@given(LENGTHS, st.integers(1, 9))
def test_batches_are_full_padded_on_the_right_and_longest_first(words, lengths, batch_size):
    for window in TokenBatches(words, sentences(lengths), Tokens(16, batch_size)).windows():
        sizes = [len(batch) for batch in window]
        assert all(size == batch_size for size in sizes[:-1])
        tokens = [n for batch in window for n in batch.attention_mask.sum(axis=1)]
        assert tokens == sorted(tokens, reverse=True)
        for batch in window:
            assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64
            assert batch.input_ids.shape == batch.attention_mask.shape
            assert batch.attention_mask.any(axis=0).all()
            assert (np.diff(batch.attention_mask, axis=1) <= 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right_whatever_the_tokenizer_says(words, side):
    tokenizer = copy.deepcopy(words)
    tokenizer.padding_side = side
    (batch,) = TokenBatches(tokenizer, ["w1 w2 w3", "w4"], Tokens(8, 2))
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.input_ids[1, 0] == 4


def test_texts_are_read_a_window_at_a_time(words):
    taken = count()
    texts = (sentence(3 + next(taken) % 5) for _ in iter(int, 1))
    batches = iter(TokenBatches(words, texts, Tokens(8, 2)))
    next(batches)
    assert next(taken) == WINDOW * 2
    list(islice(batches, WINDOW))
    assert next(taken) <= 2 * WINDOW * 2 + 1


def test_an_error_of_the_texts_themselves_passes_through(words):
    def broken():
        yield "w1"
        raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        list(TokenBatches(words, broken(), Tokens(8, 2)))


def test_empty_and_wordless_texts_are_rejected_and_named(words):
    batches = TokenBatches(words, ["w1", "", "w2", "  \n"], Tokens(8, 2))
    assert sorted(rows(batches)) == [0, 2]
    assert [(r.sample, r.reason) for r in batches.rejections] == [
        (1, "empty text"),
        (3, "0 tokens"),
    ]


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_a_text_of_special_tokens_alone_is_rejected(words, text):
    batches = TokenBatches(framed(words), ["w1", text], Tokens(8, 2))
    assert sorted(rows(batches)) == [0]
    assert batches.num_rejected == 1


def test_rejections_are_counted_without_end_and_named_up_to_a_limit(words):
    batches = TokenBatches(words, [""] * 250 + ["w1"], Tokens(8, 4))
    assert sorted(rows(batches)) == [250]
    assert batches.num_rejected == 250
    assert [r.sample for r in batches.rejections] == list(range(NAMED_REJECTIONS))


def test_texts_with_too_few_tokens_are_rejected(words):
    batches = TokenBatches(words, ["w1", "w1 w2", "w1 w2 w3"], Tokens(8, 2), min_tokens=2)
    assert sorted(rows(batches)) == [1, 2]
    assert [(r.sample, r.reason) for r in batches.rejections] == [(0, "1 token")]


@pytest.mark.parametrize("wrong", [None, 7, b"w1", ["w1"], float("nan")])
def test_a_text_that_is_no_string_is_named(words, wrong):
    with pytest.raises(TextsError, match=f"text 5 is of type {type(wrong).__name__}"):
        list(TokenBatches(words, ["w1"] * 5 + [wrong], Tokens(8, 2)))


@pytest.mark.parametrize("texts", ["w1 w2", b"w1 w2", None, 3])
def test_texts_that_are_one_string_or_nothing_are_refused(words, texts):
    with pytest.raises(TextsError, match="must be an iterable of strings"):
        TokenBatches(words, texts, Tokens(8, 2))


@pytest.mark.parametrize("name", ["max_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "3", None])
def test_a_limit_that_is_no_positive_integer_is_refused(words, name, value):
    with pytest.raises(TextsError, match=f"{name} must be an integer of at least 1"):
        TokenBatches(words, ["w1"], Tokens(**{"max_length": 4, "batch_size": 2, name: value}))


def test_a_lone_surrogate_is_refused_with_its_place(words):
    with pytest.raises(TextsError, match=r"cannot tokenise a text among 2 \.\. 3"):
        list(TokenBatches(words, ["w1", "w2", "\ud800", "w3"], Tokens(8, 2)))


def test_a_tokenizer_without_pad_token_will_do(words):
    tokenizer = copy.deepcopy(words)
    tokenizer.pad_token = None
    (batch,) = TokenBatches(tokenizer, ["w3 w4", "w5"], Tokens(8, 2))
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.input_ids[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_no_text_is_longer_than_max_length_with_special_tokens(words, limit):
    with suppress(TextsError) if limit < 3 else nullcontext():
        for batch in TokenBatches(framed(words), ["w1 w2 w3 w4", "w5"], Tokens(limit, 2)):
            assert batch.input_ids.shape[1] <= limit


def test_reading_leaves_the_tokenizer_as_it_was(words):
    tokenizer = copy.deepcopy(words)
    tokenizer.backend_tokenizer.no_truncation()
    before = tokenizer.backend_tokenizer.to_str()
    list(TokenBatches(tokenizer, ["w1 w2 w3 w4 w5"], Tokens(3, 2)))
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.to_str() == before


def identity(words, texts, max_length=8, batch_size=4):
    batches = TokenBatches(words, texts, Tokens(max_length, batch_size))
    list(batches)
    return batches.identity


@given(LENGTHS, st.integers(1, 50), st.integers(1, 50))
def test_the_identity_does_not_depend_on_the_batch_size(words, lengths, one, other):
    texts = sentences(lengths)
    assert identity(words, texts, batch_size=one) == identity(words, texts, batch_size=other)


@pytest.mark.parametrize(
    "texts",
    [
        ["w2", "w1", "w3"],
        ["w1", "w2"],
        ["w1 w2", "w3"],
        ["w1", "w2", "w3", ""],
        ["", "w1", "w2", "w3"],
        ["w1", "w2", "w4"],
    ],
)
def test_the_identity_tells_other_texts(words, texts):
    known = identity(words, ["w1", "w2", "w3"])
    assert known.num_texts == 3
    assert identity(words, texts).fingerprint != known.fingerprint


def test_the_identity_tells_another_length_limit(words):
    texts = ["w1 w2", "w3"]
    one, other = identity(words, texts, max_length=4), identity(words, texts, max_length=5)
    assert one.fingerprint != other.fingerprint
    assert (one.max_length, other.max_length) == (4, 5)


@given(LENGTHS, st.data())
def test_skipping_reads_the_same_and_goes_on_where_it_stopped(words, lengths, data):
    texts = sentences(lengths)
    some = data.draw(st.integers(0, len(texts)))
    whole = TokenBatches(words, texts, Tokens(8, 3))
    expected = {sample: ids for sample, ids in rows(whole).items() if sample >= some}
    resumed = TokenBatches(words, iter(texts), Tokens(8, 5))
    assert resumed.skip(some) == identity(words, texts[:some])
    assert resumed.num_texts == some
    assert rows(resumed) == expected
    assert resumed.identity == whole.identity
    assert resumed.num_rejected == whole.num_rejected
    assert resumed.rejections == whole.rejections


def test_skipping_past_the_end_says_how_far_it_came(words):
    batches = TokenBatches(words, ["w1", "w2"], Tokens(8, 3))
    assert batches.skip(1000).num_texts == 2
    assert rows(batches) == {}

"""Training sequences from texts."""

from operator import length_hint

import numpy as np
import pytest

import shallower as sh
from shallower.texts.sequences import ReadOnce, Sample, collate, order, read_samples
from tests.healing.cuts import TEXTS


# Sequences
def documents(words, texts):
    """The token ids of texts, each with the end-of-text token behind it."""
    return [[*words(text)["input_ids"], words.eos_token_id] for text in texts]


def packed_slowly(documents, max_length):
    """Sequences that begin with a document, token by token; and what did not fit of the last."""
    rows, row, rests = [], [], []
    for document in documents:
        for token in document:
            (row if len(row) < max_length else rests).append(token)
        if len(row) == max_length:
            rows.append(row)
            row = []
    return rows, row + rests


def test_packed_sequences_begin_with_a_document(words):
    samples = read_samples(words, iter(TEXTS), max_length=16, packing=True, num_samples=10**6)
    rows, rest = packed_slowly(documents(words, TEXTS), 16)
    assert len(rows) > 16
    assert len(rest) > 16
    rows += [rest[i : i + 16] for i in range(0, len(rest) - 15, 16)]
    assert [row.ids.tolist() for row in samples.rows] == rows
    assert samples.identity.num_texts == len(TEXTS)
    assert samples.identity.max_length == 16


def test_rests_are_taken_where_texts_are_too_few(words):
    rows, rest = packed_slowly(documents(words, TEXTS), 16)
    for wanted in (len(rows) - 1, len(rows), len(rows) + 1):
        samples = read_samples(words, TEXTS, max_length=16, packing=True, num_samples=wanted)
        assert [row.ids.tolist() for row in samples.rows] == [*rows, rest[:16]][:wanted]


def test_a_long_document_makes_many_sequences(words):
    text = " ".join(f"w{number % 50}" for number in range(1000))
    (document,) = documents(words, [text])
    for wanted in (20, 10**6):
        samples = read_samples(words, [text], max_length=16, packing=True, num_samples=wanted)
        assert len(samples) == min(wanted, 1001 // 16)
        assert (
            np.concatenate([row.ids for row in samples.rows]).tolist()
            == document[: 16 * len(samples)]
        )


def test_no_more_texts_are_read_than_are_needed(words):
    endless = (TEXTS[i % len(TEXTS)] for i in iter(int, 1))
    assert len(read_samples(words, endless, max_length=16, packing=True, num_samples=40)) == 40
    assert len(read_samples(words, endless, max_length=16, packing=False, num_samples=40)) == 40


def test_truncated_sequences_are_texts(words):
    texts = ["w1", "", *TEXTS]
    samples = read_samples(words, texts, max_length=8, packing=False, num_samples=10**6)
    expected = [words(text)["input_ids"][:8] for text in TEXTS]
    assert [row.ids.tolist() for row in samples.rows] == expected


@pytest.mark.parametrize(
    ("texts", "packing", "message"),
    [
        ([], True, "there are no texts to heal with"),
        (["w1 w2 w3"] * 40, True, r"40 texts make 10 sequences of 16 tokens, .* takes 16: give"),
        (["w1 w2"] * 15 + ["w1"], False, r"make 15 texts of at least two tokens.*sample 15: 1 tok"),
        (["w1", 7], True, r"text 1 is of type int"),
        ("w1 w2", True, r"iterable of strings, got str"),
    ],
)
def test_too_few_texts_are_refused(words, texts, packing, message):
    with pytest.raises(sh.TextsError, match=message):
        read_samples(words, texts, max_length=16, packing=packing, num_samples=10**6)


def test_packing_needs_an_end_of_text(words):
    ending, words.eos_token = words.eos_token, None
    try:
        with pytest.raises(sh.TextsError, match=r"no end-of-text token .* --no-packing"):
            read_samples(words, TEXTS, max_length=16, packing=True, num_samples=10**6)
    finally:
        words.eos_token = ending


def test_every_sample_is_taken_once_before_any_is_taken_again():
    taken = order(10, 35, seed=3)
    assert all(sorted(taken[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert len(set(taken[30:])) == 5
    assert not np.array_equal(taken[:10], taken[10:20])
    assert np.array_equal(taken, order(10, 35, seed=3))
    assert not np.array_equal(taken, order(10, 35, seed=4))
    assert np.array_equal(taken[:20], order(10, 20, seed=3))


def test_padding_and_first_tokens_are_not_predicted():
    batch = dict(
        collate([Sample(np.array([5, 6, 7], np.uint32)), Sample(np.array([8, 9], np.uint32))])
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_texts_are_read_from_their_source_once():
    read = []

    def source():
        for number in range(6):
            read.append(number)
            yield f"w{number}"

    texts = ReadOnce(source())
    assert [text for text, _ in zip(texts, range(2), strict=False)] == ["w0", "w1"]
    assert list(zip(texts, range(4), strict=False))[-1] == ("w3", 3)
    assert list(texts.last_pass()) == [f"w{number}" for number in range(6)]
    assert read == list(range(6))
    assert (length_hint(texts), length_hint(ReadOnce(["w1", "w2"]))) == (0, 2)
    for wrong in ("w1 w2", b"w1", 7):
        with pytest.raises(sh.TextsError, match="iterable of strings"):
            ReadOnce(wrong)

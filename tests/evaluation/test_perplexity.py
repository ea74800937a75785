"""Perplexity in windows and bits a byte: those of a plain float64 computation."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import shallower as sh
from shallower.errors import TextsError
from shallower.results.perplexity import Perplexity
from shallower.texts.sources import read_whole
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import TEXTS
from tests.evaluation.answering import log_softmax, plain_logits

TEXT = "".join(chr(97 + (7 * i + i * i // 5) % 26) for i in range(333)) + "äöß漢字 \n"


def bytes_tokenizer(bos):
    """A tokenizer of bytes, with or without a beginning-of-text token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {one: index for index, one in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(names, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def sharp():
    model = tiny_llama(3, initializer_range=0.3)
    model.resize_token_embeddings(258)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def plain_nats(model, ids):
    """The nats of all tokens but the first, in float64."""
    logs = log_softmax(plain_logits(model, ids))
    return -logs[range(len(ids) - 1), ids[1:]].sum()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_stand_side_by_side(sharp, own, bos):
    tokenizer = bytes_tokenizer(own)
    found = sh.evaluate_perplexity(sharp, tokenizer, TEXT, context=50, bos=bos, batch_size=3)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize(TEXT)]
    assert len(ids) == len(TEXT.encode())
    stride = 49 if bos else 50
    starts = range(0, len(ids) - stride + 1, stride)
    windows = [([0] if bos else []) + ids[start : start + stride] for start in starts]
    nats = np.array([plain_nats(sharp, window) for window in windows])
    np.testing.assert_allclose(found.by_window.sums, nats, rtol=1e-6)
    assert found.nats == pytest.approx(nats.mean() / 49, rel=1e-6)
    assert found.value == pytest.approx(math.exp(nats.sum() / (49 * len(windows))), rel=1e-6)
    assert found.stderr == pytest.approx(
        found.value * nats.std(ddof=1) / 49 / math.sqrt(len(windows)), rel=1e-5
    )
    assert (found.stride, found.context, found.bos) == (stride, 50, bos)
    assert found.num_tokens == 49 * len(windows)
    assert found.num_rest == len(ids) - stride * len(windows)


def test_two_cuts_are_paired_by_window(sharp):
    tokenizer = bytes_tokenizer(False)
    base = sh.evaluate_perplexity(sharp, tokenizer, TEXT, context=20)
    with sh.without_layers(sharp, [1]):
        cut = sh.evaluate_perplexity(sharp, tokenizer, TEXT, context=20)
    lost = cut.minus(base)
    assert math.exp(lost.mean) == pytest.approx(cut.value / base.value, rel=1e-12)
    differences = cut.by_window.sums - base.by_window.sums
    rng = np.random.default_rng(0)
    draws = differences[rng.integers(0, len(differences), (4000, len(differences)))]
    assert lost.stderr == pytest.approx(draws.mean(axis=1).std() / 19, rel=0.1)
    for options in ({"context": 30}, {"context": 20, "bos": True}):
        with pytest.raises(TextsError, match="cannot be paired"):
            cut.minus(sh.evaluate_perplexity(sharp, tokenizer, TEXT, **options))
    data = json.loads(json.dumps(cut.to_record(), allow_nan=False))
    again = Perplexity.from_json(data)
    assert again.to_record() == cut.to_record()
    for change in ({"bos": 1}, {"by_window": {"sums": [1.0]}}, {"context": "9"}):
        with pytest.raises((KeyError, TypeError)):
            Perplexity.from_json({**data, **change})
    with pytest.raises(ValueError, match="1 sums"):
        Perplexity.from_json({**data, "by_window": {"sums": [1.0], "weights": [1.0, 2.0]}})


def test_texts_and_windows_that_do_not_fit_are_refused(sharp, words, tmp_path):
    tokenizer = bytes_tokenizer(False)
    with pytest.raises(TextsError, match="has 5 tokens and fills no window of 6"):
        sh.evaluate_perplexity(sharp, tokenizer, "short", context=6)
    with pytest.raises(TextsError, match="at least 2 tokens"):
        sh.evaluate_perplexity(sharp, tokenizer, TEXT, context=1)
    with pytest.raises(TextsError, match="no beginning-of-text token"):
        sh.evaluate_perplexity(sharp, words, "w1 w2 w3", context=3, bos=True)
    with pytest.raises(TextsError, match="cannot read a text"):
        read_whole(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(TextsError, match="no text in UTF-8"):
        read_whole(tmp_path / "latin.txt")
    (tmp_path / "text.txt").write_bytes(b" a\r\nb\n")
    assert read_whole(tmp_path / "text.txt") == " a\r\nb\n"
    write_jsonl(tmp_path / "two.jsonl", ["one\n", "two"])
    assert read_whole(tmp_path / "two.jsonl") == "one\n\n\ntwo"


@pytest.mark.filterwarnings("default:.*samples rejected")
@pytest.mark.parametrize(("own", "max_length"), [(False, 256), (True, 256), (False, 7), (True, 7)])
def test_bits_a_byte_of_a_tokenizer_of_bytes(sharp, own, max_length):
    """A token is a byte here, so that bytes are counted by tokens."""
    texts = ["the thin thread", "漢字", "a", "äb", "ba\n\n"]
    tokenizer = bytes_tokenizer(own)
    loss = sh.evaluate_loss(sharp, tokenizer, texts, max_length=max_length)
    nats, counts = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_length]
        if len(ids) > 1:
            nats.append(plain_nats(sharp, ids))
            counts.append(len(ids) - 1)
    # A character that is divided counts with the first of its tokens, or with the last kept one.
    by_hand = {
        (False, 256): [14, 3, 1, 4 - 1], (True, 256): [15, 6, 1, 3, 4],
        (False, 7): [6, 3, 1, 3], (True, 7): [6, 6, 1, 3, 4],
    }[own, max_length]  # fmt: skip
    assert loss.bytes_by_text.tolist() == by_hand
    bits = sum(nats) / math.log(2) / sum(by_hand)
    assert loss.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert loss.to_json()["num_bytes"] == sum(by_hand)
    assert loss.num_tokens == sum(counts)
    residuals = np.array(nats) / math.log(2) - bits * np.array(by_hand)
    size = len(by_hand)
    error = math.sqrt(size / (size - 1) * (residuals**2).sum()) / sum(by_hand)
    assert loss.to_json()["bits_per_byte_stderr"] == pytest.approx(error, rel=1e-4)
    assert sh.Loss.from_json(loss.to_record()).to_record() == loss.to_record()


def test_bits_a_byte_of_words_count_the_space_between(llama, words):
    loss = sh.evaluate_loss(llama, words, ["w1 w23  w4", *TEXTS[:2]], max_length=50)
    assert loss.bytes_by_text[0] == len(" w23  w4")
    cut = sh.evaluate_loss(llama, words, ["w1 w23  w4"], max_length=2)
    assert cut.bytes_by_text.tolist() == [len(" w23")]


@pytest.mark.slow
def test_bits_a_byte_of_a_real_model(smol, passages):
    """Against the bytes of decoded tokens: of byte-level BPE those are the text's own."""
    model, tokenizer = smol
    texts = [text for some in passages[:1] for text in list(some)[:3]]
    loss = sh.evaluate_loss(model, tokenizer, texts, max_length=64)
    sizes = [
        len(tokenizer.decode(tokenizer(text)["input_ids"][:64][1:]).encode()) for text in texts
    ]
    assert loss.bytes_by_text.tolist() == sizes

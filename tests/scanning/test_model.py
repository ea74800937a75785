"""The scan of a model, against a float64 oracle and against its own resumption."""

import copy

import numpy as np
import pytest
import torch

import shallower as sh
from tests import reference
from tests.conftest import edited, mostly_slow, tiny_llama
from tests.documents import HELD_OUT
from tests.scanning.batches import embeddings, interrupted, plain_states


def oracle(model, tokenizer, texts, max_length=256):
    """Every state of every text by itself, (S, L+1, D)."""
    return np.stack(
        [
            plain_states(model, tokenizer(text)["input_ids"][:max_length])[0].numpy()
            for text in texts
        ]
    )


TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 97}" for j in range(1 + i % 11)) for i in range(23)]


@pytest.mark.parametrize(
    ("batch_size", "side"),
    mostly_slow(
        [(1, "left"), (1, "right"), (16, "left"), (16, "right")], [(16, "left"), (16, "right")]
    ),
)
def test_a_scan_is_that_of_a_float64_oracle(llama, words, side, batch_size):
    tokenizer = copy.deepcopy(words)
    tokenizer.padding_side = side
    states = oracle(llama, words, TEXTS, max_length=8)
    scanned = sh.scan(llama, tokenizer, TEXTS, max_length=8, batch_size=batch_size)
    assert scanned.num_samples == len(TEXTS)
    for metric in ("angular", "cosine"):
        mean, stderr = reference.mean_and_stderr(states, metric)
        np.testing.assert_allclose(scanned.mean(metric), mean, atol=2e-7, rtol=0)
        np.testing.assert_allclose(scanned.stderr(metric), stderr, atol=2e-7, rtol=0)
    angular = reference.mean_and_stderr(states, "angular")[0]
    for n in range(1, 6):
        assert scanned.best_block(n).start == reference.best_start(angular, n)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_text_without_usable_states_is_counted_and_named(llama, words, value):
    texts = [text.replace("w96", "w1") for text in TEXTS]
    clean = sh.scan(llama, words, texts)
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = value
    with pytest.warns(
        sh.RejectedSamplesWarning, match="1 of 24 samples rejected: sample 5: state 0"
    ):
        scanned = sh.scan(llama, words, [*texts[:5], "w1 w96", *texts[5:]])
    assert scanned.num_rejected == 1
    assert [rejection.sample for rejection in scanned.rejections] == [5]
    assert np.array_equal(scanned.mean(), clean.mean())


def test_rejections_of_both_kinds_are_counted_together(llama, words):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    with pytest.warns(sh.RejectedSamplesWarning, match="3 of 6 samples rejected"):
        scanned = sh.scan(llama, words, ["w96", "", "w1", "w2 w3", "   ", "w4"], batch_size=2)
    assert (scanned.num_samples, scanned.num_rejected) == (3, 3)
    assert [rejection.sample for rejection in scanned.rejections] == [0, 1, 4]


def test_a_pad_token_that_the_model_does_not_know_does_no_harm(llama, words):
    tokenizer = copy.deepcopy(words)
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    assert tokenizer.pad_token_id >= llama.config.vocab_size
    expected = sh.scan(llama, words, TEXTS)
    assert np.array_equal(sh.scan(llama, tokenizer, TEXTS).mean(), expected.mean())


MANY = TEXTS * 5
WITH_REJECTED = [*MANY[:40], "", *MANY[40:70], "w5 w96", *MANY[70:], "w96"]


def bits(scanned):
    sums = scanned.contents.sums.to_bytes()
    return sums, scanned.num_samples, scanned.num_rejected, scanned.rejections, scanned.texts


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1.0)


@pytest.mark.usefixtures("hurried")
@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize(
    ("at", "batch_size", "options"),
    mostly_slow(
        table := [
            (33, 2, {}),
            (33, 2, {"positions": "random:2", "keep_samples": True}),
            (64, 5, {"positions": "random:3"}),
            *((at, 2, {"positions": "all"}) for at in (1, 64, 100)),
        ],
        table[:3],
    ),
)
def test_a_resumed_scan_has_the_bits_of_an_uninterrupted_one(
    llama, words, tmp_path, at, batch_size, options
):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    checkpoint, parts = tmp_path / "partial", interrupted(WITH_REJECTED, at)
    whole = sh.scan(llama, words, WITH_REJECTED, batch_size=2, **options)
    with pytest.raises(KeyboardInterrupt):
        sh.scan(llama, words, parts, batch_size=2, checkpoint=checkpoint, **options)
    assert checkpoint.exists() == (at > 32)
    resumed = sh.scan(
        llama, words, WITH_REJECTED, batch_size=batch_size, checkpoint=checkpoint, **options
    )
    assert bits(resumed)[1:] == bits(whole)[1:]
    assert bits(resumed) == bits(whole) or batch_size != 2
    np.testing.assert_allclose(resumed.mean(), whole.mean(), atol=1e-6)
    if whole.keeps_samples:
        np.testing.assert_array_equal(resumed.samples(), whole.samples())


@pytest.mark.usefixtures("hurried")
def test_a_resumed_scan_does_not_run_again_what_is_done(llama, words, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sh.scan(llama, words, interrupted(MANY, 70), batch_size=2, checkpoint=tmp_path / "partial")
    with embeddings() as found:
        sh.scan(llama, words, MANY, batch_size=2, checkpoint=tmp_path / "partial")
    assert len(found) == -(-(len(MANY) - 64) // 2)


@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
def test_a_checkpoint_of_all_texts_counts_its_rejections_once(llama, words, tmp_path, monkeypatch):
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    texts = [*TEXTS, "", "w1"]
    done = sh.scan(llama, words, texts, checkpoint=tmp_path / "done")
    assert sh.Scan.load(tmp_path / "done").num_samples == 24
    again = sh.scan(llama, words, texts, checkpoint=tmp_path / "done")
    assert (again.num_samples, again.num_rejected) == (24, 1)
    assert again.rejections == done.rejections


def test_a_scan_does_not_go_on_from_another_one(llama, words, tmp_path):
    sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    before = (tmp_path / "partial").read_bytes()
    others = [
        (llama, words, HELD_OUT, {}),
        (llama, words, TEXTS[:-1], {}),
        (llama, words, ["w1", *TEXTS[1:]], {}),
        (llama, words, TEXTS, {"max_length": 5}),
        (llama, words, TEXTS, {"metrics": ("cosine",)}),
        (llama, words, TEXTS, {"positions": "last:5"}),
        (llama, words, TEXTS, {"keep_samples": True}),
        (tiny_llama(num_layers=5), words, TEXTS, {}),
        (edited(llama), words, TEXTS, {}),
        (copy.deepcopy(llama).bfloat16(), words, TEXTS, {}),
    ]
    for model, tokenizer, texts, options in others:
        with pytest.raises(sh.ScanError, match=r"partial.*delete it to start anew"):
            sh.scan(model, tokenizer, texts, checkpoint=tmp_path / "partial", **options)
        assert (tmp_path / "partial").read_bytes() == before


def test_a_checkpoint_of_the_first_texts_goes_on_to_more(llama, words, tmp_path):
    checkpoint = tmp_path / "partial"
    sh.scan(llama, words, TEXTS[:16], batch_size=1, checkpoint=checkpoint)
    more = sh.scan(llama, words, TEXTS, batch_size=1, checkpoint=checkpoint)
    whole = sh.scan(llama, words, TEXTS, batch_size=1)
    assert bits(more) == bits(whole)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], sh.TextsError, "no texts"),
        (["", ""], sh.StatesError, "2 of 2 samples rejected: sample 0: empty text"),
    ],
)
def test_a_scan_of_nothing_is_refused_and_leaves_no_checkpoint(
    llama, words, tmp_path, texts, error, message
):
    with pytest.raises(error, match=message):
        sh.scan(llama, words, texts, checkpoint=tmp_path / "partial")
    assert list(tmp_path.iterdir()) == []

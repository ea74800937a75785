"""The next-token loss: that of a plain float64 computation, whatever the batch."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import shallower as sh
from shallower.evaluation.loss import next_token_losses
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.evaluation.answering import log_softmax, plain_logits
from tests.evaluation.texts import TEXTS


@pytest.fixture(scope="module")
def sharp():
    """A model that is far from uniform, so that a wrong token shows."""
    model = tiny_llama(3, initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def plain_losses(model, tokenizer, texts, max_length=256):
    """The summed loss and the number of predicted tokens of every text, one by one."""
    sums, counts = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_length]
        logs = log_softmax(plain_logits(model, ids))
        sums.append(-sum(logs[t, ids[t + 1]] for t in range(len(ids) - 1)))
        counts.append(len(ids) - 1)
    return np.array(sums), np.array(counts)


def plain_stderr(sums, counts):
    ratio = sums.sum() / counts.sum()
    size = len(sums)
    return math.sqrt(size / (size - 1) * ((sums - ratio * counts) ** 2).sum()) / counts.sum()


@pytest.mark.parametrize("max_length", [2, 5, 256])
def test_the_loss_is_that_of_a_plain_float64_computation(sharp, words, max_length):
    sums, counts = plain_losses(sharp, words, TEXTS, max_length)
    loss = sh.evaluate_loss(sharp, words, iter(TEXTS), max_length=max_length, batch_size=4)
    assert loss.nats == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)
    assert loss.stderr == pytest.approx(plain_stderr(sums, counts), rel=1e-5)
    assert loss.num_tokens == counts.sum()
    assert loss.num_texts == len(TEXTS)
    assert loss.num_rejected == 0
    assert loss.vocab_size == 100
    assert loss.normalized == loss.nats / math.log(100)
    assert loss.normalized_stderr == loss.stderr / math.log(100)


@pytest.mark.filterwarnings("default:.*samples rejected")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_is_known_by_text_in_their_order(sharp, words, batch_size):
    texts = [*TEXTS[:3], "w1", *TEXTS[3:]]  # one is left out
    loss = sh.evaluate_loss(sharp, words, texts, batch_size=batch_size)
    sums, counts = plain_losses(sharp, words, TEXTS)
    np.testing.assert_allclose(loss.by_text.sums, sums, rtol=1e-5)
    np.testing.assert_array_equal(loss.by_text.weights, counts)
    with sh.without_layers(sharp, [1]):
        cut = sh.evaluate_loss(sharp, words, texts)
    found = cut.minus(loss)
    without = cut.by_text.sums - sums
    assert found.mean == pytest.approx(without.sum() / counts.sum(), rel=1e-5)
    assert found.stderr == pytest.approx(plain_stderr(without, counts), rel=1e-5)


@pytest.fixture(scope="module")
def expected(sharp, words):
    """The loss, text by text."""
    return sh.evaluate_loss(sharp, words, TEXTS, batch_size=1)


@settings(max_examples=settings.default.max_examples // 2)
@given(st.permutations(range(len(TEXTS))), st.integers(1, 20))
def test_neither_order_nor_batch_size_changes_the_loss(sharp, words, expected, order, batch_size):
    loss = sh.evaluate_loss(sharp, words, [TEXTS[i] for i in order], batch_size=batch_size)
    assert loss.nats == pytest.approx(expected.nats, rel=1e-6)
    assert loss.stderr == pytest.approx(expected.stderr, rel=1e-5)
    assert loss.num_tokens == expected.num_tokens


def test_a_single_text_has_no_standard_error(sharp, words):
    loss = sh.evaluate_loss(sharp, words, ["w1 w2 w3"])
    assert math.isnan(loss.stderr)
    assert loss.num_tokens == 2
    assert loss.to_json()["stderr"] is None


def test_texts_without_a_token_to_predict_are_counted_and_left_out(sharp, words):
    with pytest.warns(sh.RejectedSamplesWarning, match="3 of .* rejected: sample 0: "):
        loss = sh.evaluate_loss(sharp, words, ["w4", *TEXTS, "", "   "], batch_size=3)
    expected = sh.evaluate_loss(sharp, words, TEXTS, batch_size=3)
    assert (loss.num_texts, loss.num_rejected) == (len(TEXTS), 3)
    assert loss.nats == pytest.approx(expected.nats, rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["w1", "", "w2"], "3 of 3 samples rejected"), ([], "there are no texts to predict")],
)
def test_texts_that_all_have_nothing_to_predict_are_refused(sharp, words, texts, message):
    with pytest.raises(sh.TextsError, match=message):
        sh.evaluate_loss(sharp, words, texts)


def test_the_text_whose_logits_are_no_numbers_is_named(llama, words):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    texts = ["w1 w2", "w3 w4 w5", "w1 w96 w2", "w6 w7"]
    with pytest.raises(sh.ModelError, match="text 2 is not finite"):
        sh.evaluate_loss(llama, words, texts)


def test_the_model_is_left_in_its_modes(llama, words):
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]
    sh.evaluate_loss(llama, words, TEXTS)
    with pytest.raises(sh.TextsError):
        sh.evaluate_loss(llama, words, ["w1 w2", None])
    assert [module.training for module in llama.modules()] == modes


def test_dropout_is_off(words):
    model = tiny_llama(attention_dropout=0.5).train()
    assert sh.evaluate_loss(model, words, TEXTS) == sh.evaluate_loss(model, words, TEXTS)


@pytest.mark.parametrize("in_cache", [1, 99, 250, 1 << 20])
def test_the_losses_of_tokens_in_whatever_parts(monkeypatch, in_cache):
    monkeypatch.setattr("shallower.evaluation.loss.LOGITS_PER_CHUNK", in_cache)
    logits = torch.randn((7, 100), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.arange(7) * 13
    wide = logits.double()
    losses = wide.logsumexp(-1) - wide[torch.arange(7), expected]
    found = next_token_losses(logits, expected)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_are_summed_in_more(sharp, words):
    model = copy.deepcopy(sharp).bfloat16()
    sums, counts = plain_losses(model.float(), words, TEXTS)
    loss = sh.evaluate_loss(model.bfloat16(), words, TEXTS)
    assert loss.nats == pytest.approx(sums.sum() / counts.sum(), rel=0.02)


class Capped(LlamaForCausalLM):
    """A model whose forward casts and caps its logits, as Gemma 2's does."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = 3 * torch.tanh(output.logits.float() / 3)
        return output


def loss_of_all_logits(model, tokenizer, texts, tokens):
    """The loss from (B, T, V) logits, padding and all."""
    sums, counts = [], []
    for batch in TokenBatches(tokenizer, texts, tokens, min_tokens=2):
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            losses = next_token_losses(logits[row, : length - 1], ids[row, 1:length])
            sums.append(float(losses.double().sum()))
            counts.append(length - 1)
    nats = math.fsum(sums) / sum(counts)
    squares = math.fsum((s - nats * n) ** 2 for s, n in zip(sums, counts, strict=True))
    stderr = math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
    return sh.Loss(nats, stderr, sum(counts), len(sums), 0, logits.shape[-1])


@pytest.fixture(scope="module")
def shallow(smol):
    """Four layers of a real model, with the whole of its vocabulary, and its tokenizer."""
    model, tokenizer = smol
    with sh.without_layers(model, range(2, 28)):
        yield model, tokenizer


@pytest.mark.parametrize("batch_size", mostly_slow([1, 3, 8], [3]))
def test_the_loss_is_that_of_all_logits_at_once(monkeypatch, shallow, passages, batch_size):
    model, tokenizer = shallow
    texts = [text[: 80 + 20 * i] for i, text in enumerate(passages[1][:4])]
    texts += ["One.", "Two of them.", "And a third"]
    tokens = Tokens(64, batch_size)
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 30 * 49152)
    found = sh.evaluate_loss(model, tokenizer, texts, max_length=64, batch_size=batch_size)
    expected = loss_of_all_logits(model, tokenizer, texts, tokens)
    # A product of fewer rows may be summed in another order, by the processor.
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-5)
    assert replace(found, nats=expected.nats, stderr=expected.stderr) == expected


@pytest.mark.parametrize("in_parts", [False, True])
def test_logits_are_the_models_own(monkeypatch, words, in_parts):
    torch.manual_seed(0)
    model = Capped(tiny_llama(3, initializer_range=1.0).config).bfloat16().eval()
    if in_parts:
        monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 400)
    found = sh.evaluate_loss(model, words, TEXTS, batch_size=5)
    expected = loss_of_all_logits(model, words, TEXTS, Tokens(256, 5))
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)
    plain = LlamaForCausalLM(model.config).bfloat16().eval()
    plain.load_state_dict(model.state_dict())
    assert sh.evaluate_loss(plain, words, TEXTS).nats > 1.01 * found.nats


def test_a_model_that_runs_as_a_whole_does_so_in_few_texts(monkeypatch, sharp, words):
    expected = sh.evaluate_loss(sharp, words, TEXTS, batch_size=8)
    monkeypatch.setattr("shallower.models.head._agree", lambda *_: False)
    assert sh.evaluate_loss(sharp, words, TEXTS, batch_size=8) == expected
    monkeypatch.setattr("shallower.evaluation.loss.LOGITS_AT_ONCE", 3 * 10 * 100)
    sizes = []
    hook = sharp.register_forward_hook(lambda _m, _a, output: sizes.append(output.logits.numel()))
    found = sh.evaluate_loss(sharp, words, TEXTS, batch_size=8)
    hook.remove()
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.num_tokens == expected.num_tokens
    assert max(sizes) <= 3 * 10 * 100 < 8 * 10 * 100


def test_too_many_texts_for_the_memory_are_halved(sharp, words):
    expected = sh.evaluate_loss(sharp, words, TEXTS, batch_size=8)
    sizes = []

    def short_of_memory(_module, args, _options):
        sizes.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("a GPU's")

    layer = sharp.model.layers[1]
    hook = layer.register_forward_pre_hook(short_of_memory, with_kwargs=True)
    with pytest.warns(UserWarning, match="going on with"):
        found = sh.evaluate_loss(sharp, words, TEXTS, batch_size=8)
    hook.remove()
    assert {8, 4} < set(sizes)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (found.num_tokens, found.num_texts) == (expected.num_tokens, expected.num_texts)

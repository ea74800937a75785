"""Judges: each against plain float64 arithmetic on the logits of a model that was cut."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import shallower as sh
from shallower.errors import CriterionError, ModelError, TextsError
from shallower.judgement.judges import JUDGES
from shallower.judgement.judges.judge import KLJudge, LossJudge, divergences, judged_batches
from shallower.judgement.judges.options import OptionsJudge
from shallower.models.layerwise import Layerwise
from shallower.texts.options import OptionItem
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import TEXTS

DROPPED = (1, 3)


class WithInputs(LlamaForCausalLM):
    """A model whose logits depend on the token itself, beside the states."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits + 0.01 * input_ids[..., None] * output.logits
        return output


@pytest.fixture(scope="module", params=["by rows", "as a whole"])
def sharp(request):
    """A model far from uniform; the second has to be run as a whole for logits."""
    model = tiny_llama(5, initializer_range=0.3)
    if request.param == "as a whole":
        whole = WithInputs(model.config).eval()
        whole.load_state_dict(model.state_dict())
        model = whole
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert Layerwise(model).head.by_rows == (request.param == "by rows")
    return model


def measured(judge, model, dropped):
    """The sums over all items of the model without some layers."""
    layerwise = Layerwise(model)
    for index, batch in enumerate(judge.batches):
        whole = layerwise.run(batch, layerwise.embed(batch), range(len(layerwise)))
        judge.prepare(layerwise, index, whole)
        with torch.inference_mode():
            whole.fill_(torch.nan)  # as a caller may who uses his memory again
    sums = np.full(judge.num_items, np.nan)
    for index, batch in enumerate(judge.batches):
        layers = [layer for layer in range(len(layerwise)) if layer not in dropped]
        states = layerwise.run(batch, layerwise.embed(batch), layers)
        with layerwise.starting_from(states, ()):
            sums[judge.items[index]] = judge.measure(layerwise.head, index)
    return sums


@torch.no_grad()
def log_probabilities(model, ids):
    """(T, V) float64 log-probabilities of one text by itself."""
    logits = model(torch.tensor([list(ids)])).logits[0].numpy().astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def cut(model, dropped=DROPPED):
    """Log-probabilities by the model that was cut, not skipped."""

    def run(ids):
        if not dropped:
            return log_probabilities(model, ids)
        with sh.without_layers(model, dropped):
            return log_probabilities(model, ids)

    return run


def test_every_judge_is_in_the_table():
    assert list(JUDGES) == ["loss", "kl", "options", "speech"]
    assert all(JUDGES[name].name == name for name in JUDGES)


def rows(batches):
    """The token ids of every text."""
    return [
        ids[mask > 0].tolist()
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


# Texts.
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_texts_are_looked_at_in_their_order(words, at_once):
    batches = judged_batches(words, ["w1", *TEXTS[:19], ""], Tokens(256, at_once))
    assert np.concatenate([b.samples for b in batches]).tolist() == list(range(19))
    assert max(map(len, batches)) <= at_once
    assert rows(batches) == [words(text)["input_ids"] for text in TEXTS[:19]]
    if at_once == 8:
        assert [len(b) for b in batches] == [2, 2, 4, 8, 3]


def test_texts_of_which_none_can_be_judged_are_refused(words):
    with pytest.raises(TextsError, match="no text that a cut could be judged on has two tokens"):
        judged_batches(words, ["w1", ""], Tokens())


# The loss.
@pytest.mark.parametrize("at_once", mostly_slow([1, 8], [8]))
def test_the_loss_of_a_cut_by_text(sharp, words, at_once):
    judge = LossJudge(judged_batches(words, TEXTS, Tokens(12, at_once)))
    run, expected = cut(sharp), []
    for text in TEXTS:
        ids = words(text)["input_ids"][:12]
        expected.append(-run(ids)[np.arange(len(ids) - 1), ids[1:]].sum())
    np.testing.assert_allclose(measured(judge, sharp, DROPPED), expected, rtol=1e-5)
    lengths = [min(12, len(text.split())) for text in TEXTS]
    np.testing.assert_array_equal(judge.weights, np.array(lengths) - 1.0)


def test_the_mean_loss_is_that_of_an_evaluation(sharp, words):
    judge = LossJudge(judged_batches(words, TEXTS, Tokens()))
    found = measured(judge, sharp, ()).sum() / judge.weights.sum()
    assert found == pytest.approx(sh.evaluate_loss(sharp, words, TEXTS).nats, rel=1e-6)
    assert judge.accuracy(np.zeros(3)) is judge.chance is None


@pytest.mark.parametrize("judge", [LossJudge, KLJudge])
def test_the_text_with_a_score_that_is_not_finite_is_named(llama, words, judge):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    texts = ["w1 w2", "w3 w4 w5", "w1 w96 w2", "w6 w7"]
    with pytest.raises(ModelError, match=r"item 2 is not finite: .* in torch\.float32; load"):
        measured(judge(judged_batches(words, texts, Tokens())), llama, DROPPED)


# The divergence.
@pytest.mark.parametrize("at_once", mostly_slow([1, 8], [8]))
def test_the_divergence_of_a_cut_by_text(monkeypatch, sharp, words, at_once):
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 500)
    judge = KLJudge(judged_batches(words, TEXTS, Tokens(12, at_once)))
    whole, without, expected = cut(sharp, ()), cut(sharp), []
    for text in TEXTS:
        ids = words(text)["input_ids"][:12]
        p, q = whole(ids)[:-1], without(ids)[:-1]
        expected.append((np.exp(p) * (p - q)).sum())
    found = measured(judge, sharp, DROPPED)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert min(found / judge.weights) > 0.1
    np.testing.assert_array_equal(judge.weights, [min(12, len(t.split())) - 1 for t in TEXTS])


def test_the_whole_model_does_not_diverge_from_itself(sharp, words):
    judge = KLJudge(judged_batches(words, TEXTS, Tokens()))
    assert (measured(judge, sharp, ()) == 0).all()


def test_no_more_logits_are_made_at_once_than_are_allowed(monkeypatch, llama, words):
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 500)
    seen = []

    def note(*pair):
        seen.append([tuple(logits.shape) for logits in pair])
        return divergences(*pair)

    monkeypatch.setattr("shallower.judgement.judges.judge.divergences", note)
    measured(KLJudge(judged_batches(words, TEXTS, Tokens())), llama, DROPPED)
    assert all(whole == cut == (len_, 100) for whole, cut in seen for len_ in [whole[0]])
    assert len(seen) > 3
    assert max(rows for (rows, _), _ in seen) <= 8


def test_a_judge_without_the_whole_model_says_so(llama, words):
    judge = KLJudge(judged_batches(words, TEXTS, Tokens()))
    with pytest.raises(CriterionError, match="call prepare before measure"):
        judge.measure(Layerwise(llama).head, 0)


@given(st.integers(0, 2**31), st.floats(-4, 1.5), st.sampled_from([1, 150, 1 << 20]))
def test_a_divergence_is_that_in_float64(seed, magnitude, in_cache):
    generator = torch.Generator().manual_seed(seed)
    whole = 4 * torch.randn((5, 70), generator=generator)
    other = whole + 10**magnitude * torch.randn((5, 70), generator=generator)
    whole[:, 3] = other[:, 3] = whole[2, 5] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shallower.judgement.judges.judge.LOGITS_PER_CHUNK", in_cache)
        found = divergences(whole, other)
        assert (divergences(whole, whole) == 0).all()
    log_p, log_q = whole.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q).nan_to_num(0, 0, 0)).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-7)
    assert found.min() > -2e-7


def test_what_the_cut_makes_impossible_is_infinitely_far():
    whole, other = torch.zeros(1, 4), torch.tensor([[0, 0, 0, -torch.inf]])
    assert divergences(whole, other).isinf().all()


# Options.
def item(context, *options, answer=0, line=0):
    return OptionItem(context, options, answer, line)


ITEMS = [
    item("w1 w2 w3", "w4 w5", "w6", "w7 w8 w9", answer=1),
    item("w9 w8", "w7", "w6", answer=0),
    item("w4 w4 w4 w4 w4 w4", "w1 w2 w3 w4 w5", "w5 w5", answer=1),
    *(item(f"w{i} w{2 * i}", f"w{3 * i}", f"w{i} w1", answer=i % 2) for i in range(7)),
]


def margins(run, tokenizer, items):
    """How much likelier the right option is, item by item."""
    found = []
    for one in items:
        context = tokenizer(one.context)["input_ids"]
        nats = []
        for option in one.options:
            ids = context + tokenizer(option)["input_ids"]
            places = np.arange(len(context), len(ids))
            nats.append(run(ids)[places - 1, np.array(ids)[places]].sum())
        found.append(nats[one.answer] - max(n for i, n in enumerate(nats) if i != one.answer))
    return np.array(found)


@pytest.mark.parametrize("at_once", mostly_slow([1, 8, 64], [8]))
def test_the_margin_of_the_right_option(sharp, words, at_once):
    judge = OptionsJudge(ITEMS, words, tokens=Tokens(256, at_once))
    found = measured(judge, sharp, DROPPED)
    expected = margins(cut(sharp), words, ITEMS)
    np.testing.assert_allclose(found, -expected, rtol=1e-4, atol=1e-5)
    assert judge.accuracy(found) == np.mean(expected > 0)
    assert judge.chance == pytest.approx((1 / 3 + 9 / 2) / 10)
    np.testing.assert_array_equal(judge.weights, np.ones(10))
    np.testing.assert_array_equal(np.concatenate(judge.items), np.arange(10))


def test_all_options_of_an_item_are_in_one_batch(words):
    judge = OptionsJudge(ITEMS, words, tokens=Tokens(256, 8))
    assert [len(items) for items in judge.items] == [2, 2, 2, 2, 2]
    assert [len(batch) for batch in judge.batches] == [5, 4, 4, 4, 4]
    for batch, items in zip(judge.batches, judge.items, strict=True):
        assert sorted(set(batch.samples.tolist())) == items.tolist()


def test_ties_count_half(words):
    judge = OptionsJudge([item("w1", "w2", "w2")], words, tokens=Tokens())
    assert judge.accuracy(np.array([-1.0, 0, 2, np.nan])) == 0.5
    assert np.isnan(judge.accuracy(np.array([np.nan])))


def test_a_long_context_loses_its_start_and_no_option(words):
    long = item("w1 w2 w3 w4 w5 w6", "w7 w8", "w9", answer=0)
    judge = OptionsJudge([long], words, tokens=Tokens(4, 8))
    assert rows(judge.batches) == [[5, 6, 7, 8], [4, 5, 6, 9]]
    assert judge.batches[0].given.tolist() == [2, 3]


def with_start(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    parts = {"single": "<eos> $A <pad>", "pair": "$A $B"}
    special = [("<eos>", 99), ("<pad>", 98)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**parts, special_tokens=special)
    return tokenizer


def test_special_tokens_at_the_start_stay_there(words):
    tokenizer = with_start(words)
    assert tokenizer("w5")["input_ids"] == [99, 5, 98]
    long = item("w1 w2 w3 w4", "w7 w8", "w9", answer=0)
    judge = OptionsJudge([long, item("", "w1", "w2")], tokenizer, tokens=Tokens(4, 2))
    assert rows(judge.batches) == [[99, 4, 7, 8], [99, 3, 4, 9], [99, 1], [99, 2]]


def test_a_text_never_begins_with_its_option(words):
    judge = OptionsJudge([item(" ", "w1", "w2")], words, tokens=Tokens())
    assert rows(judge.batches) == [[99, 1], [99, 2]]
    tokenizer = copy.deepcopy(words)
    tokenizer.eos_token = None
    with pytest.raises(TextsError, match="line 7: the context has no tokens, and the tokenizer no"):
        OptionsJudge([item("", "w1", "w2", line=7)], tokenizer, tokens=Tokens())


@pytest.mark.parametrize(
    ("context", "option"),
    [("The sky is", "blue"), ("The sky is ", "blue"), ("The sky is", " blue")],
)
def test_white_space_belongs_to_the_option(smol, context, option):
    _, tokenizer = smol
    judge = OptionsJudge([item(context, option, "red")], tokenizer, tokens=Tokens())
    assert rows(judge.batches)[0] == tokenizer("The sky is blue")["input_ids"]
    assert judge.batches[0].given[0] == len(tokenizer("The sky is")["input_ids"])


@pytest.mark.parametrize(
    ("max_length", "message"),
    [(2, "line 3: option 1 has 2 tokens, expected 1 to 1 beside its context .*--max-length")],
)
def test_an_option_that_does_not_fit_is_refused(words, max_length, message):
    items = [item("w1", "w2", "w3", line=1), item("w1", "w2", "w3 w4", line=3)]
    with pytest.raises(TextsError, match=message):
        OptionsJudge(items, words, tokens=Tokens(max_length))
    OptionsJudge(items, words, tokens=Tokens(3))


def test_no_items_are_refused(words):
    with pytest.raises(TextsError, match="no items that a cut could be judged on"):
        OptionsJudge([], words, tokens=Tokens())

"""The judge of speech, against plain float64 loops over what the whole model says."""

import json

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.errors import TextsError
from shallower.evaluation.answers import write_answers
from shallower.judgement.judges.judge import LossJudge, SpeechJudge, judged_batches
from shallower.judgement.racing import race
from shallower.judgement.trials import Trials, judge_inputs
from shallower.judgement.verifying import Verifier
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.results.verification import Verified
from shallower.texts.splits import Splits
from shallower.values.plan import Plan
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import documents
from tests.judgement.test_judges import cut, log_probabilities, measured, rows
from tests.judgement.test_verifying import MemoryStore

DROPPED = (1, 3)


def said_by(model, tokenizer, count=11, num_tokens=9):
    """What a model says to prompts of one to six tokens, greedily and drawn."""
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 90, 1 + i % 6) for i in range(count)]
    ways = [
        write_answers(Decoder.of(model), tokenizer, prompts, num_tokens=num_tokens, seed=seed)
        for seed in (None, 0)
    ]
    return [*zip(*ways, strict=True)]


@pytest.fixture(scope="module")
def sharp():
    """A model far from uniform."""
    return tiny_llama(5, initializer_range=0.3)


@pytest.fixture(scope="module")
def said(sharp, words):
    return said_by(sharp, words)


def plain_divergences(whole, without, said):
    """By prompt the divergence at the tokens of both answers, one text and one token at a time."""
    found = []
    for answers in said:
        total = 0.0
        for one in answers:
            p, q = (run(one.given + one.written) for run in (whole, without))
            for place in range(len(one.given), len(one.given) + len(one.written)):
                total += sum(np.exp(p[place - 1]) * (p[place - 1] - q[place - 1]))
        found.append(total)
    return found


@pytest.mark.parametrize("at_once", mostly_slow([1, 4, 64], [4]))
def test_it_is_the_divergence_at_the_tokens_of_both_answers(sharp, said, at_once):
    judge = SpeechJudge(said, tokens=Tokens(64, at_once))
    found = measured(judge, sharp, DROPPED)
    expected = plain_divergences(cut(sharp, ()), cut(sharp), said)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    lengths = [sum(len(one.written) for one in answers) for answers in said]
    np.testing.assert_array_equal(judge.weights, lengths)
    assert min(found / judge.weights) > 0.01


def test_prompts_are_looked_at_in_their_order_with_both_answers(said):
    judge = SpeechJudge(said, tokens=Tokens(64, 8))
    assert [items.tolist() for items in judge.items] == [
        [0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10]
    ]  # fmt: skip
    ids = [list(one.given + one.written) for answers in said for one in answers]
    assert rows(judge.batches) == ids
    for batch, items in zip(judge.batches, judge.items, strict=True):
        assert batch.samples.tolist() == [item for item in items for _ in range(2)]


def test_other_words_are_other_items(said):
    judge, other = (SpeechJudge(some, tokens=Tokens(64, 8)) for some in (said, said[1:]))
    other_last = [*said[:-1], (said[-1][0], said[-1][0])]
    third = SpeechJudge(other_last, tokens=Tokens(64, 8))
    known = [json.dumps(judge_inputs(one)) for one in (judge, other, third)]
    assert len(set(known)) == 3
    assert judge_inputs(SpeechJudge(said, tokens=Tokens(64, 8))) == judge_inputs(judge)


def test_no_prompts_are_refused():
    with pytest.raises(TextsError, match="no prompts that a cut could be judged on"):
        SpeechJudge([], tokens=Tokens())


# In a race.
SPLITS = Splits(documents(40, seed=5)[:16], [], [], 0)


def verifier(model, tokenizer, said, **options):
    return Verifier(
        Decoder.of(model), tokenizer, SPLITS, judge=SpeechJudge(said, tokens=Tokens(64, 8)),
        store=options.pop("store", MemoryStore()), texts="texts", tokens=Tokens(64, 4),
        progress=False, **options,
    )  # fmt: skip


def test_after_a_patch_it_is_the_divergence_of_the_patched_cut(sharp, said, words):
    made = verifier(sharp, words, said)
    whole = {
        one: log_probabilities(sharp, one.given + one.written) for some in said for one in some
    }
    plan = Plan.of(5, [2, 3])
    with made.patch.patched(plan), sh.without_layers(sharp, plan):
        texts = {one.given + one.written: whole[one] for one in whole}
        expected = plain_divergences(texts.get, lambda ids: log_probabilities(sharp, ids), said)
    found = made.scores(plan.dropped, after="patch")
    np.testing.assert_allclose(found.sums, expected, rtol=1e-4)
    assert made.scores((), after="none").mean == 0


@pytest.mark.parametrize("after", ["none", "patch"])
def test_proposals_are_raced_by_it(sharp, said, words, after):
    made = verifier(sharp, words, said, after=after)
    found = made.verify(2)
    assert (found.judge, found.unit, found.num_items) == ("speech", "nats a token", len(said))
    for one in found.candidates:
        if not one.lost_early:
            scores = made.scores(one.plan.dropped, after=after)
            assert one.score == pytest.approx(scores.mean, rel=1e-12)
    assert "nats a token of divergence from the whole model on its own words" in found.sentence()
    assert Verified.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_race_that_is_known_runs_nothing(sharp, said, words, monkeypatch):
    store = MemoryStore()
    first = verifier(sharp, words, said, store=store).verify(2)
    store.results = {key: one for key, one in store.results.items() if key[0] != "choice"}
    monkeypatch.setattr(Trials, "measure_states", lambda *_: pytest.fail("again"))
    again = verifier(sharp, words, said, store=store).verify(2)
    assert again.to_json() | {"seconds": 0} == first.to_json() | {"seconds": 0}


# A model whose texts and whose own words need different layers.
def two_tongues():
    """Two layers: one acts on tokens below 50 alone, the other on those from 50 on; no token of one
    tongue is followed by one of the other.
    """
    model = tiny_llama(2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tongue, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                matrix.weight.zero_()
            layer.mlp.gate_proj.weight[0, tongue] = layer.mlp.up_proj.weight[0, tongue] = 2.0
            layer.mlp.down_proj.weight[2:, 0] = torch.randn(30, generator=generator)
        codes = torch.randn((100, 30), generator=generator)
        ones = (torch.arange(100)[:, None] // 50 == torch.arange(2)).float()
        model.model.embed_tokens.weight.copy_(torch.cat([2 * ones, codes], dim=1))
        model.lm_head.weight.copy_(torch.cat([400 * ones, 2 * codes.roll(-1, 0)], dim=1))
    return model


def test_what_chooses_by_speech_is_not_what_chooses_by_the_loss(words):
    model = two_tongues()
    starts = [np.array([number]) for number in range(0, 48, 4)]
    ways = {"num_tokens": 12}
    texts = write_answers(Decoder.of(model), words, starts, **ways)
    asked = write_answers(Decoder.of(model), words, [start + 50 for start in starts], **ways)
    assert max(max(one.written) for one in texts) < 50 <= min(min(one.written) for one in asked)
    lines = [" ".join(f"w{token}" for token in one.given + one.written) for one in texts]
    loss = Trials(Layerwise(model), LossJudge(judged_batches(words, lines, Tokens())))
    speech = Trials(Layerwise(model), SpeechJudge([(one,) for one in asked], tokens=Tokens()))
    cuts = [(0,), (1,)]
    assert race(loss, cuts, alpha=0) == 1
    assert race(speech, cuts, alpha=0) == 0
    assert loss.scores((1,)).mean == pytest.approx(loss.scores(()).mean, abs=1e-12)
    assert loss.scores((0,)).mean > loss.scores(()).mean + 0.1
    assert speech.scores((0,)).mean == 0
    assert speech.scores((1,)).mean > 0.1

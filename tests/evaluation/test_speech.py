"""Speech: the measures of a plain float64 computation, prompt by prompt and token by token."""

import copy
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower.evaluation import speech as module
from shallower.evaluation.speech import Reference, Speaking
from shallower.models.decoder import Decoder
from shallower.models.offload import reading_of, stored_bytes
from shallower.results.speech import MEASURES, OF_OWN, OF_WHOLE, ON_WORDS, WAYS, Speech
from shallower.texts.prompts import given_prompts, prompt_ids
from tests.conftest import mostly_slow, tiny_llama, word_tokenizer
from tests.evaluation.answering import log_softmax, plain_answer, plain_logits

PROMPTS = [" ".join(f"w{(5 * i + 11 * j) % 97}" for j in range(2 + 3 * i % 11)) for i in range(16)]
ENDS = [*range(0, 97, 9), 99]
COUNT, NUM_TOKENS, SEED = len(PROMPTS), 6, 5
WORDS = word_tokenizer()
OPTIONS = {"num_tokens": NUM_TOKENS, "seed": SEED, "progress": False}
BY_TOKEN = ("agreement", "acceptance", "divergence", "loss")


@pytest.fixture(scope="module")
def sharp():
    """A model that is far from uniform, so that another token shows, and ends some answers."""
    model = tiny_llama(2, initializer_range=0.15)
    model.generation_config.eos_token_id = ENDS[:-1]
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def cut(sharp):
    """A cut of it."""
    model = copy.deepcopy(sharp)
    sh.drop_layers(model, [1])
    return model


@pytest.fixture(scope="module")
def plain(sharp, cut):
    """All measures, by way, of every prompt."""
    ids = [WORDS(text)["input_ids"] for text in PROMPTS]
    return {
        way: [plain_prompt(sharp, cut, one, seed) for one in ids]
        for way, seed in zip(WAYS, (None, SEED), strict=True)
    }


def plain_prompt(whole, cut, ids, seed):
    """The measures of one prompt: lists by token, and (sum, weight) of the others."""
    words = plain_answer(whole, ids, NUM_TOKENS, ends=ENDS, seed=seed)
    own = plain_answer(cut, ids, NUM_TOKENS, ends=ENDS, seed=seed)
    text = [*ids, *words.written]
    of_whole, of_cut = (log_softmax(plain_logits(model, text)) for model in (whole, cut))
    found = {name: [] for name in BY_TOKEN}
    departure = None
    for number, word in enumerate(words.written):
        p, q = (one[len(ids) - 1 + number] for one in (of_whole, of_cut))
        agrees = p.argmax() == q.argmax()
        departure = number if departure is None and not agrees else departure
        found["agreement"].append(float(agrees))
        found["acceptance"].append(np.minimum(np.exp(p), np.exp(q)).sum())
        found["divergence"].append((np.exp(p) * (p - q)).sum())
        found["loss"].append(-q[word])
    judged = log_softmax(plain_logits(whole, [*ids, *own.written]))
    nats = [-judged[len(ids) - 1 + i, word] for i, word in enumerate(own.written)]
    return {
        **found,
        "departure": (len(words.written) if departure is None else departure, 1),
        "ends": (words.ended == own.ended, 1),
        "loss_under_whole": (sum(nats), len(nats)),
        "repetition": plain_repetition(own.written),
        "length": (len(own.written), 1),
        "whole": {
            "repetition": plain_repetition(words.written),
            "length": (len(text) - len(ids), 1),
        },
    }


def plain_repetition(words):
    """The 4-grams that were there before, and all of them."""
    grams = [words[i : i + 4] for i in range(len(words) - 3)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)), len(grams)


@pytest.fixture(scope="module")
def measured(sharp, cut):
    return sh.evaluate_speech(cut, WORDS, PROMPTS, whole=sharp, **OPTIONS)


def test_measures_by_token_are_those_of_a_plain_float64_computation(measured, plain):
    for way in WAYS:
        for name in BY_TOKEN:
            tolerance = 0 if name == "agreement" else 2e-5
            for found, one in zip(measured.by_token[way][name], plain[way], strict=True):
                np.testing.assert_allclose(found, one[name], rtol=tolerance, atol=tolerance)
    agreement = np.concatenate([one for way in WAYS for one in measured.by_token[way]["agreement"]])
    assert 0.1 < agreement.mean() < 0.9
    assert {len(one) for one in measured.by_token["sampled"]["loss"]} > {1, NUM_TOKENS}


def test_measures_by_prompt_are_those_of_a_plain_float64_computation(measured, plain):
    for way in WAYS:
        for name in MEASURES:
            found = measured.scores[way][name]
            pairs = [one[name] for one in plain[way]]
            if name in BY_TOKEN:
                pairs = [(sum(values), len(values)) for values in pairs]
            check(found, pairs, exact=name not in (*BY_TOKEN[1:], "loss_under_whole"))
        for name in OF_WHOLE:
            check(measured.whole[way][name], [one["whole"][name] for one in plain[way]], exact=True)
    sums = measured.of("repetition").sums
    assert sums.any()
    assert {0.0, 1.0} == {*measured.of("ends", "sampled").sums}


def check(found, pairs, *, exact):
    sums, weights = np.array(pairs, np.float64).T
    tolerance = 0 if exact else 1e-4
    np.testing.assert_allclose(found.sums, sums, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found.weights, weights)


def test_a_mean_is_a_ratio_over_both_ways_and_its_error_over_prompts(measured, plain):
    for name in MEASURES:
        by_prompt = []
        for both in zip(*(plain[way] for way in WAYS), strict=True):
            pairs = [one[name] for one in both]
            if name in BY_TOKEN:
                pairs = [(sum(values), len(values)) for values in pairs]
            by_prompt.append(np.sum(np.array(pairs, np.float64), axis=0))
        sums, weights = np.array(by_prompt).T
        mean = sums.sum() / weights.sum()
        error = (
            math.sqrt(COUNT / (COUNT - 1) * ((sums - mean * weights) ** 2).sum()) / weights.sum()
        )
        assert measured.mean(name) == pytest.approx(mean, rel=1e-5)
        assert measured.of(name).stderr == pytest.approx(error, rel=1e-4)


def test_no_measure_depends_on_batches_or_on_the_order(sharp, cut, measured):
    alone = sh.evaluate_speech(cut, WORDS, PROMPTS[:4], whole=sharp, batch_size=1, **OPTIONS)
    for name in MEASURES:
        np.testing.assert_allclose(alone.of(name).sums, measured.of(name).sums[:4], rtol=1e-3)
    back = sh.evaluate_speech(cut, WORDS, PROMPTS[::-1], whole=sharp, batch_size=7, **OPTIONS)
    assert back.words != measured.words
    for name in MEASURES:
        np.testing.assert_allclose(back.of(name).sums[::-1], measured.of(name).sums, rtol=1e-3)


def assert_near(one, other, rtol=1e-3):
    for way in WAYS:
        for name in MEASURES:
            first, second = one.scores[way][name], other.scores[way][name]
            np.testing.assert_allclose(first.sums, second.sums, rtol=rtol, atol=1e-5)
            np.testing.assert_array_equal(first.weights, second.weights)


def assert_equal(one, other):
    assert one.words == other.words
    for way in WAYS:
        for name in MEASURES:
            first, second = one.scores[way][name], other.scores[way][name]
            np.testing.assert_array_equal(first.sums, second.sums, err_msg=name)
            np.testing.assert_array_equal(first.weights, second.weights)
        for name in OF_WHOLE:
            np.testing.assert_array_equal(one.whole[way][name].sums, other.whole[way][name].sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_speaks_as_itself(sharp, dtype):
    model = copy.deepcopy(sharp).to(dtype)
    speech = sh.evaluate_speech(model, WORDS, PROMPTS, whole=model, **OPTIONS)
    for way in WAYS:
        for name, value in (("agreement", 1), ("acceptance", 1), ("divergence", 0)):
            assert {*np.concatenate(speech.by_token[way][name])} == {value}
        assert speech.of("ends", way).mean == 1
        np.testing.assert_array_equal(
            speech.of("departure", way).sums, speech.of_whole("length", way).sums
        )
        for name in OF_WHOLE:
            assert speech.of(name, way).mean == speech.of_whole(name, way).mean
        # Judged in batches of its own words, which are those of the other measures.
        own, judged = speech.of("loss", way), speech.of("loss_under_whole", way)
        np.testing.assert_allclose(own.sums, judged.sums, rtol=1e-5)
    assert not speech.repeats


# Where the two are not in memory together.
def reference_of(model, **options):
    ids = prompt_ids(WORDS, given_prompts(PROMPTS))
    return Reference.of(Speaking(WORDS, ids, **OPTIONS, **options), Decoder.of(model))


def in_place(model, layers, **options):
    reference = reference_of(model, **options)
    with sh.without_layers(model, layers):
        spoken = reference.compare(Decoder.of(model))
    return reference.judged(spoken, Decoder.of(model))


@pytest.mark.parametrize("batch_size", mostly_slow(["auto", 3], ["auto"]))
def test_a_cut_in_place_speaks_as_one_beside_the_whole_model(sharp, cut, batch_size):
    together = sh.evaluate_speech(
        cut, WORDS, PROMPTS, whole=sharp, batch_size=batch_size, **OPTIONS
    )
    assert_equal(in_place(sharp, [1], batch_size=batch_size), together)


def test_the_reference_outlives_the_whole_model(sharp, cut, measured):
    whole = copy.deepcopy(sharp)
    reference = reference_of(whole)
    with torch.no_grad():
        for weight in whole.parameters():
            weight.zero_()
    spoken = reference.compare(Decoder.of(cut))
    assert_equal(reference.judged(spoken, Decoder.of(sharp)), measured)


def test_another_head_needs_both_models(sharp, cut, measured):
    reference = reference_of(sharp)
    other = copy.deepcopy(cut)
    with torch.no_grad():
        other.lm_head.weight[7, 3] += 1
    with pytest.raises(
        sh.ModelError, match=r"another head, or another dtype, .* both are needed in memory"
    ):
        reference.compare(Decoder.of(other))
    with pytest.raises(sh.ModelError, match="another head, or another dtype"):
        reference.compare(Decoder.of(copy.deepcopy(cut).bfloat16()))
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(sh.ModelError, match="another head, or another dtype"):
        reference.compare(Decoder.of(LlamaForCausalLM(config).eval()))
    spoken = reference.compare(Decoder.of(other), Decoder.of(sharp))
    assert_near_by_token(spoken[0], plain_rows(sharp, other, reference.words))


def plain_rows(whole, model, words):
    """The acceptance by token of words that were said."""
    rows = {}
    for way in WAYS:
        rows[way] = []
        for one in words[way]:
            text = [*one.given, *one.written]
            place = slice(len(one.given) - 1, -1)
            p, q = (np.exp(log_softmax(plain_logits(each, text)))[place] for each in (whole, model))
            rows[way].append(np.minimum(p, q).sum(axis=1))
    return rows


def assert_near_by_token(speech, expected):
    for way in WAYS:
        for found, one in zip(speech.by_token[way]["acceptance"], expected[way], strict=True):
            np.testing.assert_allclose(found, one, rtol=2e-5, atol=2e-5)


def test_a_head_that_needs_the_whole_model_is_compared_as_well(sharp, cut, monkeypatch):
    expected = sh.evaluate_speech(cut, WORDS, PROMPTS[:5], whole=sharp, **OPTIONS)
    monkeypatch.setattr(module.Head, "of", classmethod(lambda cls, one: cls.probe(one)[0].whole()))
    found = sh.evaluate_speech(cut, WORDS, PROMPTS[:5], whole=sharp, **OPTIONS)
    assert_near(found, expected, rtol=1e-5)


def test_models_of_two_dtypes_are_compared_in_memory(sharp, cut, measured):
    model = copy.deepcopy(cut).bfloat16()
    speech = sh.evaluate_speech(model, WORDS, PROMPTS, whole=sharp, **OPTIONS)
    assert speech.words == measured.words
    assert speech.mean("acceptance") == pytest.approx(measured.mean("acceptance"), abs=0.05)


def test_training_modes_stay(sharp, cut, measured):
    models = [copy.deepcopy(one).train() for one in (sharp, cut)]
    speech = sh.evaluate_speech(models[1], WORDS, PROMPTS, whole=models[0], **OPTIONS)
    assert_equal(speech, measured)
    assert all(module.training for one in models for module in one.modules())


def test_out_of_memory_goes_on_with_smaller_batches(sharp, cut, measured, monkeypatch):
    plain, most = module._Spans.states, 3

    def states(spans, head):
        if len(spans.batch) > most:
            raise torch.OutOfMemoryError("no memory")
        return plain(spans, head)

    reference = reference_of(sharp)
    monkeypatch.setattr(module._Spans, "states", states)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spoken = reference.compare(Decoder.of(cut))  # of batches that the whole model could
        again = sh.evaluate_speech(cut, WORDS, PROMPTS, whole=sharp, **OPTIONS)
    assert told
    assert all("not enough memory" in str(one.message) for one in told)
    assert_near(reference.judged(spoken, Decoder.of(sharp)), measured)
    assert_near(again, measured)


def test_logits_of_a_large_vocabulary_are_compared_in_pieces(sharp, cut, measured, monkeypatch):
    for name in ("LOGITS_PER_CHUNK", "_ON_CARDS"):
        monkeypatch.setattr(module, name, 300)  # three rows
    assert_near(sh.evaluate_speech(cut, WORDS, PROMPTS, whole=sharp, **OPTIONS), measured, 1e-12)


# Prompts.
def test_prompts_are_given_as_texts_objects_or_a_file(sharp, cut, tmp_path):
    file, few, options = tmp_path / "prompts.jsonl", PROMPTS[:3], {**OPTIONS, "num_tokens": 2}
    file.write_text("".join(f'{{"prompt": "{one}"}}\n' for one in few))
    expected = sh.evaluate_speech(cut, WORDS, few, whole=sharp, **options)
    assert_equal(sh.evaluate_speech(cut, WORDS, file, whole=sharp, **options), expected)
    for given in (file, str(file), iter(few), [{"prompt": one} for one in few]):
        assert [one.text for one in given_prompts(given)] == few


# What cannot be.
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([3], {}, "prompt 0: expected a JSON object"),
        (["w1", " "], {}, "prompt 1: the field `prompt` is blank"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], {}, "prompt 0 is a chat"),
        (PROMPTS, {"num_tokens": 0}, "num_tokens must be an integer of at least 1, got 0"),
        (PROMPTS, {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        (PROMPTS, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_what_no_model_can_answer_is_refused(llama, prompts, options, message):
    with pytest.raises(sh.TextsError, match=message):
        sh.evaluate_speech(llama, WORDS, prompts, whole=llama, **{**OPTIONS, **options})


def test_another_vocabulary_is_refused(llama):
    other = tiny_llama(2)
    other.resize_token_embeddings(104)
    with pytest.raises(sh.ModelError, match="predicts over 104 tokens, and the whole model over"):
        sh.evaluate_speech(other, WORDS, PROMPTS, whole=llama, **OPTIONS)


@pytest.mark.parametrize(
    ("which", "value"),
    mostly_slow(
        itertools.product(["model", "whole"], [math.nan, math.inf]),
        [("model", math.nan), ("whole", math.inf)],
    ),
)
def test_logits_that_are_no_numbers_are_refused(llama, which, value):
    models = {"model": copy.deepcopy(llama), "whole": llama}
    with torch.no_grad():
        models[which].model.norm.weight.fill_(value)
    with pytest.raises(sh.ModelError, match=r"overflow or are NaN in torch.float32: load both as"):
        sh.evaluate_speech(models["model"], WORDS, PROMPTS, whole=models["whole"], **OPTIONS)


def test_a_whole_model_that_overflows_on_the_cuts_words_is_refused(sharp, cut, monkeypatch):
    reference = reference_of(sharp)
    spoken = reference.compare(Decoder.of(cut))
    broken = copy.deepcopy(sharp)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(sh.ModelError, match="overflow or are NaN"):
        reference.judged(spoken, Decoder.of(broken))


@pytest.mark.parametrize("away", mostly_slow(["whole", "cut", "both", "itself"], ["both"]))
def test_layers_on_disk_are_compared_on_the_words_of_the_whole_model(sharp, cut, tmp_path, away):
    models, plain = {"whole": sharp, "cut": cut}, {"whole": sharp, "cut": cut}
    for name, model in models.items():
        sh.save_model(model, WORDS, tmp_path / name)
        if away in (name, "both", "itself"):
            models[name], _ = sh.load_model(tmp_path / name, "float32", "stream", progress=False)
    if away == "itself":
        models["cut"], plain["cut"] = models["whole"], sharp
    expected = sh.evaluate_speech(plain["cut"], WORDS, PROMPTS, whole=sharp, **OPTIONS)
    found = sh.evaluate_speech(models["cut"], WORDS, PROMPTS, whole=models["whole"], **OPTIONS)
    assert found.words == expected.words
    speaks = away in ("whole", "itself")
    for name in MEASURES if speaks else ON_WORDS:
        for way in WAYS:
            one, other = found.of(name, way), expected.of(name, way)
            np.testing.assert_allclose(one.sums, other.sums, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(one.weights, other.weights)
    for name in () if speaks else OF_OWN:
        assert math.isnan(found.mean(name))
        assert name not in found.to_json()
        assert math.isnan(found.minus(expected)[name].mean)
    again = Speech.from_json(found.to_record())
    assert again.to_record() == found.to_record()
    assert not again.repeats
    if away == "both":
        reading = reading_of(models["cut"])
        assert reading.bytes_read == sum(map(stored_bytes, models["cut"].model.layers))
        assert reading_of(models["whole"]).passes == 2 * NUM_TOKENS + 1


def test_speech_of_other_words_is_not_paired(sharp, cut, measured):
    again = sh.evaluate_speech(sharp, WORDS, PROMPTS, whole=sharp, **OPTIONS)
    lost = measured.minus(again)
    assert lost["agreement"].mean == pytest.approx(measured.mean("agreement") - 1)
    assert lost["divergence"].mean == measured.mean("divergence")
    other = sh.evaluate_speech(sharp, WORDS, PROMPTS, whole=sharp, **{**OPTIONS, "seed": 6})
    with pytest.raises(sh.TextsError, match="speech of different words"):
        measured.minus(other)
    assert replace(other, words=measured.words).minus(measured)

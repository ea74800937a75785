"""Healings on answers of the uncut model, beside texts or alone."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import shallower as sh
from shallower.healing import heal as healing
from shallower.healing import training
from shallower.healing.job import describe_job
from shallower.healing.losses import TrainingLoss
from shallower.merging.merge import healing_command
from shallower.models.decoder import Decoder
from shallower.models.head import Head
from shallower.reporting.stories.stages import healing_parts
from shallower.results.speech import Answer
from shallower.texts.sequences import Sample, collate, mixed_order, read_samples
from tests.conftest import mostly_slow, tiny_llama
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, kill_after_two_steps

ALONE = replace(QUICK, share=1.0, dropout=0.0)
BOTH = replace(QUICK, share=0.5, dropout=0.0)


PROMPTS = 90
"""The first of the words that prompts are made of."""


def said(count, seed):
    """Answers, and prompts of few words: both would be learnt soon."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        given = tuple(source.randint(PROMPTS, PROMPTS + 4) for _ in range(source.randint(2, 6)))
        start = source.randrange(8)
        written = tuple(range(start, start + source.randint(3, 8)))
        found.append(Answer(given, written, False))
    return found


ANSWERS = said(60, 0)


def first_step(cut, recipe, texts=()):
    """The token ids and labels of the first step, as the recipe divides them."""
    _, tokenizer = sh.load_model(cut, dtype="float32")
    samples = read_samples(
        tokenizer, texts, max_length=16, packing=recipe.packing, num_samples=16 * recipe.steps,
        answers=ANSWERS, share=recipe.share,
    )  # fmt: skip
    taken = mixed_order(samples, 16 * recipe.steps, share=recipe.share, seed=recipe.seed)[:16]
    batch = dict(collate(samples.rows[index] for index in taken))
    return {name: torch.from_numpy(values) for name, values in batch.items()}


# What is learnt


@pytest.mark.parametrize("by_rows", [True, False])
def test_the_gradient_is_that_of_written_tokens_alone(by_rows):
    model = tiny_llama(3)
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers" in name)
    rows = [Sample(np.array([*one.given, *one.written], np.uint32),
                   np.arange(len(one.given) + len(one.written)) >= len(one.given))
            for one in ANSWERS[:5]]  # fmt: skip
    batch = {name: torch.from_numpy(values) for name, values in collate(rows)}
    labels = batch.pop("labels")
    count = sum(len(one.written) for one in ANSWERS[:5])
    assert (labels >= 0).sum() == count
    loss_of = TrainingLoss(model)
    if not by_rows:
        loss_of._head = Head.of(Decoder.of(model)).whole()
    with loss_of.made_inside(labels, count):
        outputs = model(**batch, use_cache=False)
    loss = TrainingLoss.of(outputs, labels, count)
    loss.backward()
    exact = tiny_llama(3).double()
    expected = 0.0
    for one in ANSWERS[:5]:
        logits = exact(torch.tensor([[*one.given, *one.written]])).logits[0, len(one.given) - 1 :]
        for row, token in zip(logits, one.written, strict=False):
            expected = expected - torch.log_softmax(row, -1)[token]
    (expected / count).backward()
    assert loss.item() == pytest.approx(expected.item() / count, rel=1e-5)
    for name, weight in exact.named_parameters():
        if "layers" in name:
            found = model.get_parameter(name).grad
            assert (found - weight.grad).abs().max() < 1e-5 * weight.grad.abs().max(), name


@pytest.mark.parametrize("objective", ["lm", "kd"])
def test_the_first_loss_is_the_mean_over_written_tokens(both, tmp_path, objective):
    whole, cut = both
    recipe = replace(ALONE, steps=1, warmup_steps=0, objective=objective)
    original = None if objective == "lm" else whole
    record = sh.heal(cut, [], tmp_path / "out", recipe=recipe, answers=ANSWERS, original=original)
    batch = first_step(cut, recipe)
    models = [sh.load_model(path, dtype="float32")[0] for path in (cut, whole)]
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        log_q, log_p = (torch.log_softmax(m(**given).logits.double(), -1) for m in models)
    labels = batch["labels"][:, 1:]
    log_q, log_p = (of[:, :-1][labels >= 0] for of in (log_q, log_p))
    p = log_p.exp()
    expected = {
        "lm": -log_q.gather(1, labels[labels >= 0][:, None])[:, 0],
        "kd": (p * (log_p - log_q)).sum(-1),
    }
    assert record.steps[0].loss == pytest.approx(float(expected[objective].mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "packing"),
    mostly_slow(
        [("lm", True), ("lm", False), ("kd", True)], quick=[("lm", True)],
    ),
)  # fmt: skip
def test_the_forward_may_be_of_any_size(both, tmp_path, objective, packing):
    """However few tokens of a forward are predicted, a step is one mean over all of them."""
    whole, cut = both
    recipe = replace(BOTH, objective=objective, packing=packing, steps=2)
    original = None if objective == "lm" else whole
    results = []
    for size in (1, 16):
        out = tmp_path / str(size)
        record = sh.heal(
            cut, TEXTS, out, recipe=replace(recipe, batch_size=size), answers=ANSWERS,
            original=original,
        )  # fmt: skip
        results.append((load_file(out / "adapter_model.safetensors"), record))
    (first, record), (weights, other) = results
    assert [s.loss for s in other.steps] == pytest.approx([s.loss for s in record.steps], 1e-4)
    for name, value in weights.items():
        assert np.abs(value - first[name]).max() < 2e-4 * max(1, np.abs(value).max())


def test_each_step_has_texts_and_answers(cut, tmp_path, monkeypatch):
    taken = []

    def watched(rows):
        rows = list(rows)
        taken.extend(row.predicted is not None for row in rows)
        return collate(rows)

    monkeypatch.setattr(training, "collate", watched)
    recipe = replace(BOTH, share=0.25, steps=3)
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, answers=ANSWERS)
    assert taken == [False, False, False, True] * 12


# The record
def test_the_record_and_the_card_tell_of_answers(cut, tmp_path):
    out = tmp_path / "out"
    recipe = replace(BOTH, steps=2)
    record = sh.heal(cut, TEXTS, out, recipe=recipe, answers=ANSWERS, eval_texts=HELD_OUT)
    known = record.answers
    assert known.num_answers == len(ANSWERS)
    assert known.num_tokens == sum(min(16 - len(a.given), len(a.written)) for a in ANSWERS)
    assert record.recipe.share == 0.5
    assert sh.Healing.load(out) == record
    card = (out / "README.md").read_text()
    row = f"60 answers of {known.num_tokens} tokens, 50 % of the sequences, packed to 16 tokens"
    assert f"| answers | {row} |" in card
    assert "| texts | " in card
    (line,) = [one for one in healing_parts(record) if str(one).startswith("trained on")]
    assert line == f"trained on 60 answers of {known.num_tokens} tokens"  # whoever wrote them
    assert "--texts TEXTS --answers ANSWERS" in healing_command(record)
    assert " --share 0.5 " in healing_command(record)
    again = json.loads((out / "healing.json").read_text())
    again["answers"]["num_answers"] = "60"
    with pytest.raises(TypeError, match="num_answers: expected int"):
        sh.Healing._from_json(again)


def test_a_healing_of_texts_tells_of_none(healed):
    out, record = healed
    data = json.loads((out / "healing.json").read_text())
    assert (record.answers, record.recipe.share) == (None, None)
    assert "answers" not in data
    assert "share" not in data["recipe"]
    assert "answers" not in (out / "README.md").read_text()
    assert not {"--answers", "--share"} & set(healing_command(record).split())
    assert "answers" not in json.loads(describe_job(record, None, merge=False))


# Killed
@pytest.mark.parametrize(
    ("recipe", "answers"),
    [
        pytest.param(BOTH, [*ANSWERS[:-1], replace(ANSWERS[-1], ended=True)], id="other answers"),
        pytest.param(replace(BOTH, seed=7), None, id="seed"),
        pytest.param(replace(BOTH, share=0.25), None, id="share", marks=pytest.mark.slow),
    ],
)
def test_another_job_starts_anew(cut, tmp_path, monkeypatch, recipe, answers):
    first, again = (replace(one, steps=3) for one in (BOTH, recipe))
    kill_after_two_steps(monkeypatch, cut, tmp_path / "out", recipe=first, answers=ANSWERS)
    began = []
    train = healing.train

    def watched(training, *args):
        began.append(list(training.folder.glob("*")))
        return train(training, *args)

    monkeypatch.setattr(healing, "train", watched)
    assert [*tmp_path.glob(".out.partial/folder/training/checkpoint-2")]
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=again, answers=answers or ANSWERS)
    assert began == [[]]


# Refusals
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": BOTH}, sh.TextsError, r"no texts to heal with: give some, or .* alone \(share"),
        (
            {"recipe": ALONE, "original": "whole", "from_patch": True}, sh.TextsError,
            r"no texts to heal with: a patch is fitted on some \(from_patch, --from-patch\)",
        ),
        (
            {"recipe": ALONE, "answers": [Answer((1,), (), True)]}, sh.TextsError,
            r"no answers to learn from: 1 of 1 sample rejected: sample 0: no token of the answer",
        ),
        (
            {"recipe": ALONE, "answers": [Answer((1,), (100,), True)]}, sh.TextsError,
            r"the answers hold token 100, and the model has 100: they are of another model",
        ),
        ({"recipe": replace(ALONE, share=2)}, sh.RecipeError, r"share must be above 0"),
    ],
    ids=["no texts", "from a patch", "no token", "unknown", "share"],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(cut, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        sh.heal(cut, [], tmp_path / "out", **{"answers": ANSWERS, **options})
    assert not list(tmp_path.iterdir())

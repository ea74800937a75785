"""The objectives that compare with the uncut model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.healing.losses import TrainingLoss, summed_loss, teach
from shallower.models.decoder import Decoder
from shallower.models.head import Head
from tests.conftest import tiny_llama
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS

KD = replace(QUICK, objective="kd", dropout=0.0, steps=4)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected_losses(student, teacher, labels):
    """The summed loss and its gradient to the student's logits, in float64."""
    log_q, log_p = (log_softmax(np.asarray(z.double())) for z in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    total, gradient = 0.0, np.zeros_like(q)
    for text, position in np.argwhere(labels[:, 1:] >= 0):
        here = text, position
        total += (p[here] * (log_p[here] - log_q[here])).sum()
        gradient[here] = q[here] - p[here]
    return total, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_are_those_of_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    student = (4 * torch.randn(3, 70, 50, generator=generator)).to(dtype).requires_grad_()
    teacher = (4 * torch.randn(3, 70, 50, generator=generator)).to(dtype)
    labels = torch.randint(0, 50, (3, 70), generator=generator)
    labels[1, 40:] = labels[:, 0] = -100
    given = teacher.clone()
    loss = summed_loss(student, labels, lambda tokens: teacher.flatten(0, 1)[tokens])
    (0.25 * loss).backward()
    total, gradient = expected_losses(student.detach(), teacher, labels.numpy())
    assert loss.item() == pytest.approx(total, rel=1e-6)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    found = student.grad.double().numpy()
    assert np.abs(found - 0.25 * gradient).max() <= tolerance * np.abs(gradient).max()
    assert torch.equal(teacher, given)
    assert not student.grad[1, 39:].any()


def test_a_teacher_that_agrees_teaches_nothing():
    logits = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.ones(2, 9, dtype=torch.long)
    loss = summed_loss(logits, labels, lambda tokens: logits.detach().flatten(0, 1)[tokens])
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() < 1e-7


def test_what_a_teacher_excludes_is_no_divergence():
    """A logit of -inf is a probability of 0, which adds nothing."""
    student = torch.zeros(1, 2, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    loss = summed_loss(student, torch.tensor([[0, 1]]), lambda _: teacher.expand(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3 / 2), rel=1e-6)
    assert student.grad[0, 0].tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3], rel=1e-5)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("whole_teacher", [True, False])
def test_the_loss_inside_the_forward_is_that_of_all_logits(monkeypatch, by_rows, whole_teacher):
    monkeypatch.setattr("shallower.models.head.LOGITS_AT_ONCE", 3 * 13 * 100)
    student, teacher = tiny_llama(3, seed=1), tiny_llama(5, seed=2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (3, 21), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    labels = ids.where(mask.bool(), -100)
    for name, weight in student.named_parameters():
        weight.requires_grad_("layers" in name)
    teaching = Head.of(Decoder.of(teacher))
    if whole_teacher:
        teaching = teaching.whole()
    loss_of = TrainingLoss(student)
    if not by_rows:
        loss_of._head = Head.of(Decoder.of(student)).whole()
    with loss_of.made_inside(labels, 50, teach(teaching, ids, mask)):
        outputs = student(input_ids=ids, attention_mask=mask, use_cache=False)
    assert set(outputs) == {"loss"}
    TrainingLoss.of(outputs, labels, 50).backward()
    weight = student.model.layers[0].mlp.down_proj.weight
    found = weight.grad.clone()
    weight.grad = None
    with torch.no_grad():
        wanted = teacher(input_ids=ids, attention_mask=mask).logits
    logits = student(input_ids=ids, attention_mask=mask).logits
    total, gradient = expected_losses(logits.detach(), wanted, labels.numpy())
    assert outputs["loss"].item() == pytest.approx(total / 50, rel=1e-5)
    logits.backward(torch.from_numpy(gradient / 50).float())
    assert (found - weight.grad).abs().max() < 1e-5 * weight.grad.abs().max()


def divergence(model, teacher, tokenizer):
    ids = tokenizer(" ".join(HELD_OUT), return_tensors="pt")["input_ids"][:, :64]
    with torch.inference_mode():
        log_q, log_p = (torch.log_softmax(m(ids).logits.double(), -1) for m in (model, teacher))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_the_cut_comes_closer_to_the_uncut_model(patchable, tmp_path):
    whole, cut = patchable
    recipe = replace(KD, steps=8)
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, original=whole, merge=True)
    assert record.recipe.objective == "kd"
    assert sh.Healing.load(tmp_path / "out") == record
    assert "| objective | kd |" in (tmp_path / "out" / "README.md").read_text()
    teacher, tokenizer = sh.load_model(whole, dtype="float32")
    before, after = (
        divergence(sh.load_model(path, dtype="float32")[0], teacher, tokenizer)
        for path in (cut, tmp_path / "out")
    )
    assert after < 0.95 * before


@pytest.mark.parametrize("objective", ["KD", "", None, 1, ["kd"], "lm+kd", "reconstruct"])
def test_an_unknown_objective_is_refused(objective):
    with pytest.raises(sh.RecipeError, match=r"unknown objective .*: expected one of lm, kd$"):
        replace(KD, objective=objective).check()

"""The training losses against those of torch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import shallower as sh
from shallower.healing.distillation import Distillation
from shallower.healing.losses import summed_loss
from shallower.texts.sequences import collate
from tests.conftest import tiny_llama


# Losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 70, 50, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 70), generator=generator)
    labels[1, 40:] = labels[:, 0] = -100
    as_given = logits.detach().clone()
    loss = summed_loss(logits, labels)
    (0.25 * loss).backward()
    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(
        exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    (0.25 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.detach(), as_given)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (logits.grad - exact.grad).abs().max() <= tolerance * exact.grad.abs().max()
    assert not logits.grad[1, 39:].any()


@pytest.mark.parametrize("blocks", [[(2, 4)], [(1, 2), (3, 5)], [(3, 6)], [(0, 2)]])
def test_distillation_matches_the_state_behind_the_block(words, blocks):
    teacher, student = tiny_llama(6), tiny_llama(6)
    plan = sh.drop_layers(student, [sh.Block(*block) for block in blocks])
    batch = dict(collate([np.arange(1, 12), np.arange(20, 27)]))
    ids, mask = (torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask"))
    distillation = Distillation(student, teacher, plan)
    ran = []
    for index, layer in enumerate(teacher.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with distillation.watching():
        student(input_ids=ids, attention_mask=mask)
    got = distillation.summed(ids, mask)
    assert ran == list(range(blocks[-1][1]))
    expected = []
    for start, stop in blocks:
        wanted = state(teacher, stop, ids, mask)
        here = state(student, sum(layer < start for layer in plan.survivors), ids, mask)
        error = (here - wanted).square().sum(-1) / wanted.square().sum(-1)
        expected.append(float(error[0, 1:].sum() + error[1, 1:7].sum()))
    assert got.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    if blocks[0][0]:  # else the embedding alone could change the state, and it does not
        got.backward()
        below = plan.survivors.index(blocks[-1][0] - 1)
        assert student.model.layers[below].mlp.down_proj.weight.grad.abs().sum() > 0


def state(model, number, ids, mask):
    """x^(number) by the model's own list, or from below the norm if it is the last."""
    kept = []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    hook.remove()
    return (*states[:-1], kept[0])[number].double()

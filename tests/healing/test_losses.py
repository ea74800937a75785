"""The training losses against those of torch."""

import pytest
import torch
from torch.nn import functional

from shallower.healing.losses import summed_loss


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

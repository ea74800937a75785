"""The stage is as strict as CUDA: what may not meet there does not meet here."""

import numpy as np
import pytest
import torch

from shallower.models.architecture import find_layers
from tests.devices.batches import inputs
from tests.devices.stage import Stage, is_about_devices

ZERO, ONE = "cuda:0", "cuda:1"
MIXED = {
    "a sum": lambda: torch.ones(3, device=ZERO) + torch.ones(3),
    "a sum on two cards": lambda: torch.ones(3, device=ZERO) + torch.ones((), device=ONE),
    "a product": lambda: torch.ones(3, 3, device=ZERO) @ torch.ones(3, 3),
    "numpy's array": lambda: torch.ones(3, device=ZERO) * torch.from_numpy(np.ones(3)),
    "in place": lambda: torch.ones(3, device=ZERO).add_(torch.ones(3)),
    "rows": lambda: torch.stack([torch.ones((), device=ZERO), torch.ones(())]),
    "columns": lambda: torch.cat([torch.ones(3, device=ZERO), torch.ones(3, device=ONE)]),
    "an index": lambda: torch.ones(3, device=ONE)[torch.ones(2, dtype=torch.long, device=ZERO)],
    "a mask": lambda: torch.ones(3, device=ONE)[torch.ones(3, dtype=torch.bool, device=ZERO)],
    "chosen rows": lambda: torch.ones(3, device=ZERO).index_select(0, torch.zeros(1).long()),
    "a comparison": lambda: torch.equal(torch.ones(3, device=ZERO), torch.ones(3)),
    "a generator": lambda: torch.rand(3, generator=torch.Generator(), device=ZERO),
    "an array": lambda: torch.ones(3, device=ZERO).numpy(),
    "pinned": lambda: torch.ones(3, device=ZERO).pin_memory(),
}


@pytest.mark.parametrize("meeting", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_do_not_meet(meeting):
    with Stage(2).open(), pytest.raises((RuntimeError, TypeError)) as error:
        meeting()
    assert is_about_devices(error.value)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_inputs_of_a_model_are_where_it_begins(stage, name):
    with stage.open():
        given = inputs(ZERO)
        del given["labels"]
        given[name] = given[name].cpu()
        with pytest.raises(RuntimeError, match="an input on device cpu"):
            find_layers(stage.model()).runner(**given)


def test_what_torch_allows_is_allowed():
    with Stage(2).open():
        some = torch.ones(3, device=ZERO)
        assert (some * torch.ones(())).device == torch.device(ZERO)
        assert some[torch.tensor([0, 1])].shape == (2,)
        assert torch.ones(3).copy_(some).device == torch.device("cpu")
        assert some.to(ONE).device == torch.device(ONE)


def test_values_that_are_read_fall():
    with Stage(1).open(named=(1.0, 2.0)):
        first, second = (float(torch.ones(3, device=ZERO).sum()) for _ in range(2))
        assert 0 < second < first
        assert bool(torch.ones((), device=ZERO) > 0)

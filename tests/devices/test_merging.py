"""The sum of weight and adapter, and its check, on fake CUDA devices."""

import numpy as np
import pytest
import torch

from shallower.merging import merging
from shallower.merging.low_rank import LowRank, deviation
from tests.conftest import word_tokenizer
from tests.devices.conftest import on_devices
from tests.devices.test_healing import adapted, recipe, refused


def low_rank(dtype):
    """An adapter of rank 2, for a stack of two weights of (1100, 1200)."""
    left, right = torch.ones(2, 1100, 2), torch.ones(2, 2, 1200)
    return LowRank("down_proj", left, right, 1.0, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_merged_a_few_rows_at_a_time(stage, dtype):
    with stage.open():
        parts = list(low_rank(dtype).changed(bytearray, stage.last))
        assert len(parts) == 4
        assert {part.dtype for part in parts} == {np.dtype(np.uint8)}
        assert sum(part.size for part in parts) == 2 * 1100 * 1200 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_checked(stage, dtype):
    with stage.open():
        assert deviation(low_rank(dtype), bytearray, bytearray, device=stage.last)[0] > 0


@on_devices
def test_the_logits_of_the_best_adapters(stage):
    if refused(stage):
        return
    with stage.open():
        _, model = adapted(stage)
        model.load_adapter = lambda *_: None  # from a file
        found = merging.trained_logits(model, word_tokenizer(), recipe(), checkpoint="best")
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")

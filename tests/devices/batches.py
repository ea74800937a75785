"""Batches and labels for models without values: only shapes and padding count."""

import numpy as np
import torch

from shallower.texts.batches import Batch

TEXTS = [" ".join(f"w{i}" for i in range(n)) for n in (9, 6, 5, 7)]
"""Of the tokenizer of words."""


def batch(left=False):
    """Three texts of 9, 6 and 5 tokens, padded on the right, or on the left."""
    mask = np.ones((3, 9), np.int64)
    mask[1, 6:] = mask[2, 5:] = 0
    if left:
        mask = np.ascontiguousarray(mask[:, ::-1])
    return Batch(np.arange(27).reshape(3, 9) * mask, mask, np.arange(3))


def inputs(device):
    """Token ids, their mask and their labels on a device, as the Trainer gives them."""
    one = batch()
    mask = torch.from_numpy(one.attention_mask)
    ids = torch.from_numpy(one.input_ids)
    labels = ids.masked_fill(mask == 0, -100)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in named.items()}

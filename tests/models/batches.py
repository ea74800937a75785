"""A batch of tokens."""

import numpy as np

from shallower.texts.batches import Batch


def batch(rows=3, length=9, vocabulary=90):
    generator = np.random.default_rng(0)
    ids = generator.integers(1, vocabulary, (rows, length))
    mask = np.arange(length) < generator.integers(2, length + 1, (rows, 1))
    return Batch(ids * mask, mask.astype(np.int64), np.arange(rows))

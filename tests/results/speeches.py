"""Speech of random numbers."""

from dataclasses import replace

import numpy as np

from shallower.results.scores import Scores
from shallower.results.speech import MEASURES, OF_WHOLE, WAYS, Speech


def made(prompts=5, seed=0, **changed):
    """Speech of any seed on the same words of the whole model."""
    tokens = np.random.default_rng(0).integers(4, 30, (2, prompts)).astype(float)
    generator = np.random.default_rng(seed)

    def some(name, weights):
        own = name not in ("agreement", "acceptance", "divergence", "loss")
        weights = generator.integers(4, 30, prompts).astype(float) if own else weights
        weights = np.ones(prompts) if name in ("departure", "length", "ends") else weights
        return Scores(generator.random(prompts) * weights, weights)

    scores = {
        way: {name: some(name, of_way) for name in MEASURES}
        for way, of_way in zip(WAYS, tokens, strict=True)
    }
    whole = {way: {name: some(name, tokens[0]) for name in OF_WHOLE} for way in WAYS}
    return replace(Speech(16, 0, "0" * 64, scores, whole), **changed)

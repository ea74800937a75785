"""Stored states at the border: the core against the obvious torch, answers asserted first."""

import numpy as np
import pytest
import torch

import shallower as sh
from shallower import _reference

SHAPES = {"31x576": (256, 31, 576), "33x4096": (32, 33, 4096)}


def torch_obvious(states):
    """Normalise, batched Gram, arccos, mean; in float32 as peers do."""
    units = torch.nn.functional.normalize(states.float(), dim=-1)
    cosine = torch.bmm(units, units.transpose(1, 2)).clamp(-1, 1)
    return (torch.arccos(cosine) / torch.pi).mean(dim=0)


def shallower_all(states):
    return sh.analyse_states(states).mean("angular")


@pytest.fixture(params=sorted(SHAPES))
def states(request):
    """Residual streams: a shared direction, growing steps, two massive channels; bfloat16."""
    generator = torch.Generator().manual_seed(0)
    samples, num_states, width = SHAPES[request.param]
    steps = torch.randn(samples, num_states, width, generator=generator)
    states = steps.cumsum(dim=1) + 3 * torch.randn(samples, 1, width, generator=generator)
    states[..., :2] *= 300
    return states.to(torch.bfloat16)


@pytest.mark.parametrize("engine", [shallower_all, torch_obvious], ids=lambda f: f.__name__)
def test_all_pairs(benchmark, engine, states):
    expected, _ = _reference.mean_and_stderr(states[:8].float().numpy(), "angular")
    tolerance = 1e-7 if engine is shallower_all else 1e-3
    assert np.abs(np.asarray(engine(states[:8])) - expected).max() < tolerance
    benchmark.group = f"{states.shape[1]}x{states.shape[2]} bfloat16, {len(states)} samples"
    benchmark(engine, states)

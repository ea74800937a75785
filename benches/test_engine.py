"""Stored states at the border, one thread: each tier of the core against torch and numkong,
answers asserted first. States are bfloat16, and once float32.

numkong computes the Gram matrices alone. torch depends on its batch: the best is taken.
"""

import time

import numkong
import numpy as np
import pytest
import torch

import shallower as sh
from shallower import _core
from tests import reference

SHAPES = {"31x576": (512, 31, 576), "33x4096": (48, 33, 4096), "81x8192": (8, 81, 8192)}
FLOAT32 = "31x576 float32"


def torch_obvious(states):
    """Normalise, batched Gram, arccos; in float32 as peers do."""
    units = torch.nn.functional.normalize(states.float(), dim=-1)
    cosine = torch.bmm(units, units.transpose(1, 2)).clamp(-1, 1)
    return torch.arccos(cosine) / torch.pi


def torch_tuned(states):
    """The same with nothing allocated twice."""
    units = states.to(torch.float32, copy=True)
    units /= torch.linalg.vector_norm(units, dim=-1, keepdim=True)
    return torch.bmm(units, units.transpose(1, 2)).clamp_(-1, 1).arccos_().div_(torch.pi)


def torch_medium(states):
    """The tuned one with products of float32 in bfloat16, where torch does that."""
    torch.set_float32_matmul_precision("medium")
    try:
        return torch_tuned(states)
    finally:
        torch.set_float32_matmul_precision("highest")


def best_batch(engine, states):
    """The batch size at which the engine is fastest."""

    def seconds(size):
        parts = states.split(size)
        engine(parts[0])
        begin = time.perf_counter()
        for part in parts:
            engine(part)
        return time.perf_counter() - begin

    return min([1, 2, 4, 8, 16, 32, 64, 128], key=seconds)


def mean_angles(engine, states, size):
    return sum(engine(part).sum(dim=0) for part in states.split(size)) / len(states)


def numkong_gram(states):
    """Gram matrices, one sample at a time, as the function takes them."""
    return [numkong.dots_symmetric(sample, dtype="bfloat16") for sample in states]


@pytest.fixture(params=[*SHAPES, FLOAT32])
def states(request):
    """Residual streams: a shared direction, growing steps, two massive channels."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape, _, dtype = request.param.partition(" ")
    samples, num_states, width = SHAPES[shape]
    steps = torch.randn(samples, num_states, width, generator=generator)
    states = steps.cumsum(dim=1) + 3 * torch.randn(samples, 1, width, generator=generator)
    states[..., :2] *= 300
    return states if dtype else states.to(torch.bfloat16)


def group_of(states):
    dtype = str(states.dtype).removeprefix("torch.")
    return f"{states.shape[1]}x{states.shape[2]} {dtype}, {len(states)} samples, one thread"


def angular_means(states):
    return np.mean([reference.angular(sample) for sample in states.double().numpy()], axis=0)


@pytest.mark.parametrize("tier", [name for name, _ in _core.tiers()])
def test_shallower(benchmark, monkeypatch, states, tier):
    if not dict(_core.tiers())[tier]:
        pytest.skip(f"this machine has no {tier}")
    monkeypatch.setenv("SHALLOWER_TIER", tier)
    mean = sh.analyse_states(states[:4], threads=1).mean()
    assert np.abs(mean - angular_means(states[:4])).max() < 1e-7
    benchmark.group = group_of(states)
    benchmark(lambda: sh.analyse_states(states, threads=1))


@pytest.mark.parametrize("engine", [torch_obvious, torch_tuned, torch_medium])
def test_torch(benchmark, states, engine):
    mean = mean_angles(engine, states[:4], 4).numpy()
    allowed = 0.05 if engine is torch_medium else 1e-3
    off_diagonal = ~np.eye(len(mean), dtype=bool)
    assert np.abs(mean - angular_means(states[:4]))[off_diagonal].max() < allowed
    size = best_batch(engine, states)
    benchmark.group = group_of(states)
    benchmark.extra_info["batch"] = size
    benchmark(mean_angles, engine, states, size)


@pytest.mark.parametrize("states", SHAPES, indirect=True)
def test_numkong(benchmark, states):
    samples = list(states.view(torch.uint16).numpy())
    gram = np.triu(np.asarray(numkong_gram(samples[:1])[0]))
    exact = states[0].double().numpy()
    expected = np.triu(exact @ exact.T)
    assert np.abs(gram - expected).max() < 1e-3 * np.abs(expected).max()
    benchmark.group = group_of(states)
    benchmark(numkong_gram, samples)

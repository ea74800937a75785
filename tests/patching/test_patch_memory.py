"""What a patch takes beside its model."""

import errno
import os
import tempfile

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower.memory.budget import BUDGET
from shallower.patching import least_squares, solver
from shallower.patching.least_squares import NormalEquations, solver_bytes
from shallower.patching.memory import temporary_bytes
from shallower.patching.patch import CPU_TOKENS
from tests.examples import sentences
from tests.peaks import tensors_peak


def patch_of(words, width, intermediate, texts):
    """The patch of a model of four layers that has learned nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=intermediate,
            num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip
    sh.evaluate_loss(model, words, texts[:16])  # a forward, so that its buffers exist

    def work():
        try:
            sh.patch(model, words, [range(1, 2)], texts=texts, progress=False)
        except sh.PatchError as error:
            assert "does not help" in str(error)  # noqa: PT017

    return work


def test_a_solution_takes_one_copy_of_the_sums():
    inputs, outputs, tokens, kept = 1800, 200, 256, 64
    plan = solver_bytes(inputs, outputs, batch_tokens=tokens, kept_tokens=kept, value_bytes=4)
    assert plan < 2.4 * 8 * inputs**2
    generator = torch.Generator().manual_seed(0)

    def work():
        sums = NormalEquations.empty(inputs, outputs, torch.device("cpu"))
        for rows, add in ((tokens, sums.add), (kept, sums.keep)):
            add(*(torch.randn(rows, n, generator=generator) for n in (inputs, outputs)))
        penalty = sums.scale.expand(inputs)
        for weight in (0.01, 1.0):
            assert sums.solve(0.03, penalty, weight).isfinite().all()

    assert 0.9 * plan < tensors_peak(work) <= plan


def test_a_70b_is_patched_beside_half_of_a_card():
    """A layer of Llama-2-70B: 8,192 channels of attention, 28,672 of the feed-forward."""
    plan = solver_bytes(8192 + 28672, 8192, batch_tokens=4096, kept_tokens=512, value_bytes=2)
    assert plan < 32e9


@pytest.mark.slow
@pytest.mark.parametrize(("width", "intermediate"), [(256, 8192)])
def test_a_patch_stays_within_its_plan(width, intermediate, words, monkeypatch):
    length, batch = 32, 16
    plan = solver_bytes(
        width + intermediate, width, batch_tokens=batch * length, kept_tokens=56, value_bytes=4,
        held_tokens=8 * length,
    )  # fmt: skip
    # Beside the equations there are states of a layer: three of the width of its feed-forward.
    forward = 4 * batch * length * (4 * intermediate + 8 * width)
    monkeypatch.setattr(BUDGET, "share", lambda _: 0)  # no graph is kept only as there is room
    monkeypatch.setattr(solver, "FIRST_WEIGHTS", (0.01,))
    monkeypatch.setattr(least_squares, "RIDGES", (0.03,))
    texts = sentences(64, length=length)
    patch_of(words, width, width, texts)()  # so that modules, threads and buffers are there
    found = tensors_peak(patch_of(words, width, intermediate, texts))
    # One more copy of the sums takes a half more.
    assert 0.9 * plan < found < plan + forward


def test_the_files_of_states_take_no_more_than_was_counted(words, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken, allocate = [], os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda file, *span: taken.append(span[1]) or allocate(file, *span)
    )
    texts = sentences(60)
    work = patch_of(words, 32, 64, texts)
    work()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))
    how = {"num_tokens": CPU_TOKENS, "max_length": 256}
    counted = temporary_bytes(model, texts, **how)
    assert sum(taken) <= counted < temporary_bytes(model, **how)
    assert not any(tmp_path.iterdir())

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(sh.OutputError, match=r"temporary files in .* \(TMPDIR\): no space left"):
        work()
    assert not any(tmp_path.iterdir())

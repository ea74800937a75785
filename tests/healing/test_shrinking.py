"""Trainings that run out of memory, and the GPU of a process."""

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import LlamaModel, TrainingArguments

import shallower as sh
from shallower.healing import training
from shallower.healing.ranks import own_device_map, warn_of_idle_gpus
from shallower.memory import retry
from shallower.settings.recipe import Resolved
from tests.healing.cuts import FACTS, HELD_OUT, QUICK, TEXTS

AUTOMATIC = replace(QUICK, batch_size=None, steps=4)


@pytest.fixture
def device(monkeypatch):
    """A device that runs out of memory in trainings above so many sequences, as CUDA does."""
    forward = LlamaModel.forward
    free = retry.free_memory

    class Device:
        rows, recomputed_rows, forwards, room = 16, 16, 0, 0

        def __init__(self):
            self.held = []

    own = Device()

    def limited(model, input_ids=None, **options):
        if model.training and torch.is_grad_enabled():
            own.forwards += 1
            recomputes = model.is_gradient_checkpointing
            most = own.recomputed_rows if recomputes else own.rows
            if own.forwards > own.room and len(input_ids) > most:
                activations = torch.ones(100)
                own.held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried {activations.shape}")
        return forward(model, input_ids=input_ids, **options)

    def freed():
        assert [held() for held in own.held] == [None] * len(own.held), "a traceback holds it"
        free()

    monkeypatch.setattr(LlamaModel, "forward", limited)
    monkeypatch.setattr(retry, "free_memory", freed)
    return own


def heal(cut, out, recipe, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        record = sh.heal(cut, TEXTS, out, recipe=recipe, eval_texts=HELD_OUT, **options)
    return record, [str(w.message) for w in told if "memory" in str(w.message)]


def adapters(out):
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_smaller_forward_gives_what_it_gives_from_the_start(cut, tmp_path, device):
    expected, told = heal(cut, tmp_path / "one", replace(AUTOMATIC, batch_size=1))
    assert told == []
    device.rows = 1
    record, told = heal(cut, tmp_path / "out", AUTOMATIC)
    assert told == [
        f"there is not enough memory to train on {n} sequences in one forward: going on with "
        f"{n // 2} (batch_size, --batch-size), from the last checkpoint"
        for n in (4, 2)
    ]
    assert (record.recipe.batch_size, record.recipe.recompute) == (1, False)
    assert adapters(tmp_path / "out") == adapters(tmp_path / "one")
    assert record.steps == expected.steps
    assert record.after.nats == pytest.approx(expected.after.nats, abs=1e-6)
    assert sh.Healing.load(tmp_path / "out").recipe == record.recipe


@pytest.mark.slow
def test_activations_are_recomputed_when_one_sequence_is_too_many(cut, tmp_path, device):
    device.rows, device.recomputed_rows = 0, 1
    record, told = heal(cut, tmp_path / "out", AUTOMATIC)
    assert (record.recipe.batch_size, record.recipe.recompute) == (1, True)
    assert len(told) == 3
    assert "with activations recomputed (recompute, --gradient-checkpointing)" in told[-1]
    device.recomputed_rows = 0
    with pytest.raises(sh.RecipeError, match=r"set --dtype nf4 \(dtype\), or a --max-length"):
        heal(cut, tmp_path / "none", AUTOMATIC)


def test_the_training_goes_on_from_its_last_checkpoint(cut, tmp_path, device):
    """Three steps are done, two are kept: the two others are of the smaller forward."""
    device.rows, device.room = 2, 3 * 4
    expected, _ = heal(cut, tmp_path / "whole", replace(QUICK, batch_size=2, steps=4))
    device.forwards = 0
    record, told = heal(cut, tmp_path / "out", AUTOMATIC)
    assert len(told) == 1
    # Twelve forwards of three steps, one that failed, and eight each of the steps 3 and 4.
    assert device.forwards == 12 + 1 + 8 + 8
    losses = [step.loss for step in record.steps]
    assert losses == pytest.approx([step.loss for step in expected.steps], rel=1e-2)
    assert [*record.held_out] == [0, 2, 4]


def test_a_batch_size_that_was_given_is_kept(cut, tmp_path, device):
    device.rows = 4
    with pytest.raises(sh.RecipeError) as refused:
        heal(cut, tmp_path / "out", replace(QUICK, recompute=False))
    assert str(refused.value) == (
        "there is not enough memory for the training: set --batch-size 4 (batch_size), or "
        "--gradient-checkpointing (recompute), or --dtype nf4 (dtype), or a --max-length "
        "(max_length) of less than 16"
    )
    assert not (tmp_path / "out").exists()


def test_processes_that_train_together_keep_their_forwards(cut, tmp_path, device, monkeypatch):
    """They would have to begin again together."""
    monkeypatch.setattr(training, "num_processes", lambda: 2)
    accumulation = Resolved.accumulation
    monkeypatch.setattr(Resolved, "accumulation", lambda recipe, _: accumulation(recipe, 1))
    device.rows = 1
    with pytest.raises(sh.RecipeError, match="set --batch-size 2"):
        heal(cut, tmp_path / "out", AUTOMATIC)


def test_a_process_trains_on_one_of_the_gpus_that_it_sees(cut, tmp_path, monkeypatch):
    """Several would be one model in copies (DataParallel), and a batch so much larger."""
    model, _ = sh.load_model(cut, dtype="float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    plain = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    recipe = QUICK.resolve(FACTS)
    ours = training.trainer_arguments(training.Training(model, None, recipe, tmp_path))
    assert (plain.n_gpu, ours.n_gpu) == (2, 1)
    assert ours.train_batch_size == 8
    assert (str(ours.device), ours.optim) == ("cuda:0", "adamw_torch")


@pytest.mark.parametrize(("rank", "place"), [(None, 0), (0, 0), (1, 1)])
def test_every_process_has_a_gpu_of_its_own(monkeypatch, rank, place):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert own_device_map() == {"": place}
    assert chosen == [place]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(sh.ProcessesError, match=r"as there are GPUs, 2 \(--nproc_per_node 2\)"):
        own_device_map()


def test_a_process_among_several_gpus_is_warned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, most in ((6, 4), (2, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.warns(UserWarning, match=f"one of {count} GPUs: .*--nproc_per_node {most} "):
            warn_of_idle_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    warn_of_idle_gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    warn_of_idle_gpus()

"""Texts in one forward: as many as a device has room for, and no result depends on it."""

import itertools

import pytest
import torch

import shallower as sh
from shallower.evaluation.loss import FORWARD, fitting_tokens
from shallower.memory import plan as planning
from shallower.memory.budget import limit
from shallower.memory.device import Room
from shallower.memory.plan import Forward, ForwardStep, fitting, peak_of, plan_forward
from shallower.models.decoder import Decoder
from shallower.scanning.hidden_states import forward
from shallower.values.estimates import needed_device
from shallower.values.positions import Positions
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import documents
from tests.memory_oracle import shape, tracked_forward

SHAPES = (
    "llama-2-70b", "qwen2.5-7b", "phi-2", "gpt2-xl", "llama-2-7b", "llama-2-13b", "mistral-7b"
)  # fmt: skip


def planned(name, kind, texts, length=1024, device=80 * 10**9, card=True):
    config, _ = shape(name, 2)
    return plan_forward(
        config, "bfloat16", kind, tokens=Tokens(length, texts), room=Room(device, card)
    )


@pytest.mark.parametrize(
    ("name", "logits"),
    mostly_slow(
        itertools.product(SHAPES, [False, True]),
        [("phi-2", True)],
    ),
)
def test_a_forward_is_within_15_percent_of_the_tracker(name, logits):
    plan = planned(name, FORWARD if logits else forward(), 4, card=False)
    assert plan.peak_bytes == pytest.approx(tracked_forward(name, 2, 4, 1024, logits), rel=0.15)


def test_states_of_all_tokens_count_twice():
    def live(positions):
        return planned("phi-2", forward(Positions.parse(positions)), 4).parts["activations"]

    states = 3 * 4 * 1024 * 2560 * 2  # of a batch, in bfloat16
    assert live("all") - live("last") == pytest.approx(2 * states, rel=0.02)
    assert live("last:512") - live("last") == pytest.approx(states, rel=0.02)


@pytest.mark.slow
def test_a_gpu_takes_as_many_texts_as_fit():
    kind = forward()
    assert planned("phi-2", kind, "auto", length=256).micro_batch == 128
    assert planned("phi-2", kind, "auto", length=1000).micro_batch == 32
    assert planned("phi-2", kind, "auto", length=40_000).micro_batch == 1
    whole = planned("phi-2", kind, 16, length=1024).peak_bytes
    assert planned("phi-2", kind, "auto", 1024, needed_device(whole)).micro_batch == 16
    assert planned("phi-2", kind, "auto", 1024, needed_device(whole) - 10**7).micro_batch == 8
    nothing = planned("phi-2", kind, "auto", 1024, 10**9)
    assert (nothing.micro_batch, nothing.fits) == (1, False)
    assert planned("phi-2", kind, 3, 1024, 10**9).micro_batch == 3


# On a CPU
def test_a_cpu_takes_eight_without_a_rehearsal(llama, monkeypatch):
    monkeypatch.setattr(planning, "plan_forward", None)
    decoder = Decoder.of(llama)
    assert fitting(decoder, Tokens(128), forward()) == Tokens(128, 8)
    assert fitting_tokens(decoder, Tokens(128)) == Tokens(128, 8)
    assert fitting(decoder, Tokens(128, 3), forward()) == Tokens(128, 3)


@pytest.fixture
def two_layers():
    return tiny_llama(2)


def test_a_cpu_takes_fewer_where_memory_is_short(two_layers, monkeypatch):
    decoder = Decoder.of(two_layers)
    step = ForwardStep(two_layers.config, "float32", forward(), length=128, card=False, loaded=True)
    for texts in (4, 1):
        room = needed_device(peak_of(step.parts, (texts, None)))
        monkeypatch.setattr(planning, "available_bytes", lambda _, room=room: room)
        assert fitting(decoder, Tokens(128), forward()) == Tokens(128, texts)


def test_a_limit_is_planned_with_like_memory_that_is_short(two_layers):
    step = ForwardStep(two_layers.config, "float32", forward(), length=128, card=False, loaded=True)
    with limit(needed_device(peak_of(step.parts, (4, None)))):
        assert fitting(Decoder.of(two_layers), Tokens(128), forward()) == Tokens(128, 4)


def test_a_family_that_cannot_be_rehearsed_takes_eight(llama, monkeypatch):
    def fails(_decoder, batch):
        raise RuntimeError("its shapes depend on values")

    plan = plan_forward(
        llama.config, "float32", Forward(fails), tokens=Tokens(128), room=Room(10**9, card=True)
    )
    assert (plan.peak_bytes, plan.micro_batch, plan.fits) == (None, 8, True)


# Results
def test_a_scan_has_the_same_bytes_as_with_eight(llama, words, tmp_path):
    texts = documents(40)
    sh.scan(llama, words, texts).save(tmp_path / "auto")
    sh.scan(llama, words, texts, batch_size=8).save(tmp_path / "eight")
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "eight").read_bytes()


def test_minibatches_of_cka_do_not_depend_on_the_device(llama, words, monkeypatch):
    texts = documents(40)
    expected = sh.scan(llama, words, texts, cka_batch=8, batch_size=8).cka
    monkeypatch.setattr(planning, "DEFAULT_BATCH", 2)
    assert (sh.scan(llama, words, texts, cka_batch=8).cka == expected).all()


def test_a_loss_is_the_same_at_every_batch_size(llama, words):
    texts = documents(20)
    losses = [sh.evaluate_loss(llama, words, texts, batch_size=size) for size in (1, 8, "auto")]
    assert losses[1] == losses[2]
    assert losses[0].nats == pytest.approx(losses[2].nats, abs=1e-6)


@pytest.mark.slow
def test_float16_and_quantised_models_are_rehearsed(monkeypatch):
    model = tiny_llama().to(torch.float16)
    room = Room(10**10, card=True)
    plan = plan_forward(model.config, "float16", FORWARD, tokens=Tokens(64), room=room)
    four = plan_forward(model.config, "nf4", FORWARD, tokens=Tokens(64), room=room)
    assert 0 < four.parts["weights"] < plan.parts["weights"]
    assert plan.micro_batch == four.micro_batch == 512

"""Fake devices and their streams are as late as CUDA may be: who does not wait is refused."""

import pytest
import torch

from shallower.errors import ModelError
from tests.conftest import mostly_slow
from tests.devices.mutations import is_order, moves, without
from tests.devices.stage import DeviceError, Stage
from tests.devices.test_streaming import check, scan
from tests.devices.timeline import OrderError

CARD = torch.device("cuda:0")


def side():
    """A stream beside the one that computes, behind all that is asked of that one so far."""
    stream = torch.cuda.Stream(CARD)
    stream.wait_stream(torch.cuda.current_stream(CARD))
    return stream


def reads_what_is_computed():
    states = torch.ones(3, device=CARD)
    other = torch.cuda.Stream(CARD)
    with torch.cuda.stream(other):
        states + 1


def computes_with_what_comes():
    states, other = torch.empty(3, device=CARD), side()
    with torch.cuda.stream(other):
        states.copy_(torch.ones(3).pin_memory(), non_blocking=True)
    states + 1


def reads_what_leaves():
    kept = torch.empty(3, pin_memory=True)
    kept.copy_(torch.ones(3, device=CARD), non_blocking=True)
    kept.numpy()


def fills_what_is_on_its_way():
    kept = torch.ones(3).pin_memory()
    kept.to(CARD, non_blocking=True)
    kept.zero_()


def gives_back_what_is_on_its_way():
    states, other = torch.empty(3, device=CARD), side()
    with torch.cuda.stream(other):
        states.copy_(torch.ones(3).pin_memory(), non_blocking=True)


EARLY = [
    reads_what_is_computed, computes_with_what_comes, reads_what_leaves, fills_what_is_on_its_way,
    gives_back_what_is_on_its_way,
]  # fmt: skip


def act(work):
    with Stage(1).open():
        work()


@pytest.mark.parametrize("work", EARLY)
def test_what_is_early_is_refused(work):
    with pytest.raises((OrderError, DeviceError), match=r"has not waited for|gets back"):
        act(work)


def test_who_waits_may_go_on():
    with Stage(1).open():
        states, other = torch.empty(3, device=CARD), side()
        with torch.cuda.stream(other):
            states.copy_(torch.ones(3).pin_memory(), non_blocking=True)
        torch.cuda.current_stream(CARD).wait_event(other.record_event())
        kept = torch.empty(3, pin_memory=True)
        kept.copy_(states + 1, non_blocking=True)
        torch.cuda.current_stream(CARD).record_event().synchronize()
        kept.numpy()
        torch.empty(3).copy_(states).numpy()  # which blocks


WAITS = [
    move
    for move in moves(is_order)
    if move.file == "models/transfers.py" and move.function != "SideStreams.send"
]
"""Not those of token ids, which a model in memory gets: nobody waits for them."""


@pytest.mark.parametrize("wait", mostly_slow(WAITS, WAITS[::3]), ids=str)
def test_a_wait_that_is_taken_out_or_a_copy_that_blocks_is_missed(wait):
    refused = AssertionError, OrderError, DeviceError
    with without(wait), pytest.raises((*refused, ModelError)) as error:
        check(scan)
    assert isinstance(error.value.__cause__ or error.value, refused)

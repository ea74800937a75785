"""States on their way to the CPU: a stand-in for CUDA copies as late as it may, and records."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from shallower.models import transfers
from shallower.models.transfers import Gathered, HostCopies
from shallower.scanning.hidden_states import stream
from shallower.values.positions import Positions
from tests.conftest import tiny_llama
from tests.models.late_streams import LateStreams
from tests.scanning.test_hidden_states import SEQUENCES, batched

ALL = Positions.parse("all")


@pytest.fixture
def late(monkeypatch):
    """The stand-in, to which every device is one apart from the CPU."""
    monkeypatch.setattr(transfers, "is_apart", lambda _device: True)
    return LateStreams()


@pytest.mark.parametrize("positions", [Positions(), ALL])
def test_states_that_travel_late_are_those_that_do_not_travel(late, llama, positions, monkeypatch):
    batches = batched(SEQUENCES, 1)
    got = [
        (part.states.clone(), part.samples.tolist())
        for part in stream(llama, batches, positions, copies=HostCopies(late))
    ]
    monkeypatch.undo()
    expected = stream(llama, batches, positions)
    for (states, samples), part in zip(got, expected, strict=True):
        assert torch.equal(states, part.states)
        assert samples == part.samples.tolist()
    assert late.waiting == []


def test_a_part_stays_until_the_next_is_asked_for_while_a_batch_is_on_its_way(late, llama):
    """At most two batches' states are in memory: one that is read, one that travels."""
    batches = batched(SEQUENCES * 3, 1)
    alone = HostCopies(LateStreams())
    expected = [part.states.clone() for part in stream(llama, batches, ALL, copies=alone)]
    streamed = stream(llama, batches, ALL, copies=HostCopies(late))
    places = []
    for number, part in enumerate(streamed):
        assert len(late.waiting) == (number < len(expected) - 1)
        for copy in list(late.waiting):  # the one that travels may arrive while this one is read
            copy.target.copy_(copy.rows)
        assert torch.equal(part.states, expected[number])
        places.append(part.states.data_ptr())
    assert late.most_waiting == 2
    assert len(places) == len(expected) == 15
    assert all(place == after for place, after in zip(places[4:], places[6:], strict=False))
    assert all(place != after for place, after in pairwise(places))


def test_two_buffers_serve_all_calls_and_grow_to_the_largest(late, llama):
    copies = HostCopies(late)
    sizes = []
    for sequences in (SEQUENCES[1:2] * 3, SEQUENCES[:1] * 4, SEQUENCES[1:2] * 3, SEQUENCES):
        for part in stream(llama, batched(sequences, 1), ALL, copies=copies):
            sizes.append(part.states.nbytes)
    small, large = 7 * 1 * 32 * 4, 7 * 7 * 32 * 4
    assert sorted(set(sizes)) == [small, 3 * small, 5 * small, large]
    assert late.pinned == [small, small, large, large]


def test_the_sources_are_kept_until_their_copy_has_ended(late):
    gathered = Gathered(torch.ones(2, 3, 4), [0, 1])
    wait = HostCopies(late).start(sources := [gathered])
    assert sources == [gathered]
    assert torch.equal(wait(), gathered.rows)
    assert sources == []


def test_token_ids_are_sent_and_rows_leave_at_once(late, llama):
    copies = HostCopies(late)
    (part,) = stream(llama, batched(SEQUENCES, 5), copies=copies)
    assert part.states.shape == (7, 5, 32)
    assert late.sent == 3  # the ids, their mask, and the places of the chosen tokens
    assert late.most_waiting == 1  # all seven states in one copy


# States in several dtypes.
@pytest.mark.parametrize("apart", [False, True])
def test_states_of_several_dtypes_are_joined_in_order(late, apart, monkeypatch):
    monkeypatch.setattr(transfers, "is_apart", lambda _device: apart)
    three = torch.arange(3 * 2 * 4.0).view(3, 2, 4)
    rows = [
        Gathered(torch.cat([three, three]).bfloat16(), [0, 3, 4]),
        Gathered((three + 0.1).float(), [2, 1]),
    ]
    states = HostCopies(late).start(rows)()
    assert states.dtype == torch.float32
    assert states.shape == (5, 2, 4)
    assert torch.equal(states[[0, 3, 4]], three)
    assert torch.equal(states[[2, 1]], (three + 0.1)[:2])


def test_a_model_whose_layers_change_the_dtype_is_read():
    model = tiny_llama(4)
    expected = [part.states for part in stream(model, batched(SEQUENCES, 2))]
    model.model.layers[-1].register_forward_hook(lambda _module, _args, out: out.double())
    model.model.norm.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    got = [part.states for part in stream(model, batched(SEQUENCES, 2))]
    assert [states.dtype for states in got] == [torch.float64] * 3
    for states, single in zip(got, expected, strict=True):
        assert torch.equal(states.float(), single)


def test_layers_that_run_in_another_order_are_read_in_theirs(llama):
    (expected,) = stream(llama, batched(SEQUENCES, 5))
    rows = Gathered(torch.stack([expected.states[3], expected.states[0]]), [3, 0])
    more = Gathered(expected.states[[1, 2, 4, 5, 6]].double(), [1, 2, 4, 5, 6])
    assert torch.equal(HostCopies().start([rows, more])().float(), expected.states)


# The calls to CUDA.
def test_without_cuda_nothing_is_pinned_and_nothing_is_used_again(llama):
    class Refusing:
        def __getattr__(self, name):
            pytest.fail(f"{name} was called on a CPU")

    parts = list(stream(llama, batched(SEQUENCES, 1), ALL, copies=HostCopies(Refusing())))
    assert len({part.states.data_ptr() for part in parts}) == len(parts)
    assert not any(part.states.is_pinned() for part in parts)
    assert np.isfinite(parts[0].states.numpy()).all()

"""Work that goes on with fewer texts where a device has no memory for a batch."""

import warnings

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.memory.retry import Halving
from shallower.models.architecture import find_layers
from shallower.models.transfers import HostCopies
from shallower.scanning.hidden_states import _RowHooks
from shallower.texts.batches import Batch, TokenBatches
from shallower.values.positions import Positions
from shallower.values.tokens import Tokens
from tests.conftest import WORDS, tiny_llama

TEXTS = [" ".join(WORDS[i : i + 5 + i % 7]) for i in range(40)]


def batch_of(lengths):
    mask = np.array([[int(i < n) for i in range(max(lengths))] for n in lengths], dtype=np.int64)
    ids = mask * (1 + np.arange(len(lengths)))[:, None]
    return Batch(ids, mask, np.arange(len(lengths)))


class Memory:
    """A device that holds so many texts, and counts."""

    def __init__(self, texts):
        self.texts, self.seen = texts, []

    def forward(self, batch):
        self.seen.append(len(batch))
        if len(batch) > self.texts:
            raise torch.OutOfMemoryError("out of memory")
        return batch.samples.tolist()


@pytest.mark.parametrize(
    ("room", "sizes"), [(8, [7]), (4, [4, 3]), (3, [2, 2, 2, 1]), (1, [1] * 7)]
)
def test_a_batch_is_run_in_parts_that_fit(room, sizes):
    halving, memory = Halving(), Memory(room)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = list(halving.run(batch_of([9, 8, 8, 5, 4, 4, 2]), memory.forward))
    assert [len(part) for part, _ in parts] == sizes
    assert [sample for _, samples in parts for sample in samples] == list(range(7))


def test_what_did_not_fit_once_is_not_tried_again():
    halving, memory = Halving(), Memory(2)
    with pytest.warns(UserWarning, match="--batch-size"):
        list(halving.run(batch_of([5] * 4), memory.forward))
    memory.seen.clear()
    list(halving.run(batch_of([5] * 6), memory.forward))
    assert memory.seen == [2, 2, 2]


def test_parts_have_no_columns_of_padding_alone():
    batch = batch_of([9, 8, 5, 4])
    first, second = batch.split(2)
    assert first.input_ids.shape == (2, 9)
    assert second.input_ids.shape == (2, 5)
    assert second.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.split(4) == [batch]


def test_parts_of_a_batch_padded_on_the_left_begin_at_a_token():
    batch = batch_of([9, 8, 5, 4])
    left = Batch(batch.input_ids[:, ::-1], batch.attention_mask[:, ::-1], batch.samples)
    assert left.split(2)[1].attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_a_text_that_does_not_fit_is_named_with_ways_out():
    with (
        pytest.warns(UserWarning, match="going on with"),
        pytest.raises(sh.ModelError, match=r"one text of 5 tokens.*--max-length"),
    ):
        list(Halving().run(batch_of([5, 5]), Memory(0).forward))


@pytest.fixture
def short_of_memory(monkeypatch):
    """A real model whose forward of more than three texts is out of memory at its third layer."""
    model = tiny_llama()

    def refuse(_layer, args, kwargs):
        if len(args[0] if args else kwargs["hidden_states"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[2].register_forward_pre_hook(refuse, with_kwargs=True)
    yield model, handle
    handle.remove()


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_scan_goes_on_with_smaller_batches(short_of_memory, words, positions):
    model, handle = short_of_memory
    with pytest.warns(UserWarning, match="going on with") as warned:
        got = sh.scan(model, words, TEXTS, positions=positions, batch_size=8)
    assert len(warned) == 2  # of 8 and of 4; never again
    handle.remove()
    expected = sh.scan(model, words, TEXTS, positions=positions, batch_size=2)
    np.testing.assert_allclose(got.mean("angular"), expected.mean("angular"), rtol=0, atol=1e-7)
    assert got.num_samples == expected.num_samples


def test_a_forward_without_memory_leaves_no_states_behind(short_of_memory, words):
    """The smaller one may need what they take."""
    model, _ = short_of_memory
    hooks = _RowHooks(find_layers(model), HostCopies())
    (batch,) = TokenBatches(words, TEXTS[:4], Tokens(64, 4))
    with hooks, pytest.raises(torch.OutOfMemoryError):
        hooks.run(batch, Positions(), torch.device("cpu"))
    assert not hooks.rows.gathered
    assert not hooks.rows._tokens_on

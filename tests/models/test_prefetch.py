"""Offloaded weights, and the next layer on its way by a stand-in for CUDA that copies late."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch._subclasses.fake_tensor import FakeTensorMode

import shallower as sh
from shallower.models import prefetch, transfers
from shallower.models.architecture import find_layers
from shallower.models.layerwise import Layerwise
from shallower.models.offload import (
    execution_device,
    is_offloaded,
    resident,
    stored_weight,
    write_weight,
)
from shallower.models.prefetch import Ahead
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import documents
from tests.models.batches import batch
from tests.models.gguf_files import write_family
from tests.models.late_streams import LateStreams
from tests.models.offloaded import offloaded

TEXTS = documents(40)
WEIGHT = "mlp.down_proj"


@pytest.fixture
def late(monkeypatch):
    """The stand-in, to which the CPU is a device apart; the thread that reads is a real one."""
    streams = LateStreams()
    for module in (prefetch, transfers):
        monkeypatch.setattr(module, "is_apart", lambda _device: True)
        monkeypatch.setattr(module, "SideStreams", lambda: streams)
    return streams


def model_of(kind, folder, words):
    """The place of a model of six layers in safetensors, or of one in a GGUF file."""
    if kind != "safetensors":
        return write_family(folder / "tiny.gguf", kind)
    tiny_llama(6).save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    mostly_slow(
        [("safetensors", "float32"), ("safetensors", "bfloat16"), ("lfm2", "float32")],
        [("safetensors", "bfloat16"), ("lfm2", "float32")],
    ),
)
def test_what_comes_late_is_what_does_not_travel(kind, dtype, tmp_path, words, request):
    place = model_of(kind, tmp_path, words)
    whole, tokenizer = sh.load_model(place, dtype, progress=False)
    options = {"batch_size": 8, "max_length": 12, "progress": False}
    sh.scan(whole, tokenizer, TEXTS, **options).save(tmp_path / "whole.safetensors")
    loss = sh.evaluate_loss(whole, tokenizer, TEXTS, **options)
    late = request.getfixturevalue("late")
    streamed, _ = sh.load_model(place, dtype, "stream", progress=False)
    sh.scan(streamed, tokenizer, TEXTS, **options).save(tmp_path / "streamed.safetensors")
    scans = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "streamed")]
    assert scans[0] == scans[1]
    layers = len(find_layers(streamed))
    assert late.brought == (layers - 1) + 5 * layers  # five batches before each layer
    assert sh.evaluate_loss(streamed, tokenizer, TEXTS, **options) == loss
    assert late.waiting == []


def test_a_layer_that_was_fetched_is_there_at_once(late):
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    twin, ahead = tiny_llama().model.layers[2], Ahead(late)
    ahead.fetch(layer)
    with ahead.resident(layer):
        assert late.brought == 1
        for name, weight in layer.named_parameters():
            assert torch.equal(weight, twin.get_parameter(name))
            assert weight.requires_grad
    assert all(weight.is_meta for weight in layer.parameters())


def test_a_change_behind_the_fetching_is_seen(late):
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    module, ahead, value = layer.get_submodule(WEIGHT), Ahead(late), torch.zeros(32, 48)
    ahead.fetch(layer)
    with torch.no_grad():
        write_weight(module, "weight", value)
    with ahead.resident(layer):
        assert torch.equal(module.weight, value)


def test_another_layer_than_that_which_was_fetched(late):
    layers, ahead = offloaded(tiny_llama(), [2, 3]).model.layers, Ahead(late)
    ahead.fetch(layers[2])
    with ahead.resident(layers[3]):
        weight = layers[3].get_submodule(WEIGHT).weight
        assert torch.equal(weight, tiny_llama().model.layers[3].get_submodule(WEIGHT).weight)
        assert layers[2].get_submodule(WEIGHT).weight.is_meta


def test_the_next_layer_gives_way_where_memory_is_short(late, monkeypatch):
    model, some = Layerwise(offloaded(tiny_llama(4))), batch()
    plain, failed = Layerwise(tiny_llama(4)), []
    states = expected = plain.embed(some)
    work = model._forward

    def short(*arguments):
        if model._ahead._coming is not None:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return work(*arguments)

    monkeypatch.setattr(model, "_forward", short)
    for layer in model.one_by_one(range(4)):
        states = model.run(some, states, (layer,))
    assert failed == [True]  # and no layer is fetched any more
    assert torch.equal(states, plain.run(some, expected, range(4)))


def test_a_lack_of_memory_that_nothing_gives_way_to_is_raised(late, monkeypatch):
    model, some = Layerwise(offloaded(tiny_llama(4))), batch()
    states = model.embed(some)

    def short(*_arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "_forward", short)
    for layer in model.one_by_one(range(2)):
        with pytest.raises(torch.OutOfMemoryError):
            model.run(some, states, (layer,))


def test_a_layer_for_which_there_is_no_memory_is_brought_when_it_is_needed(late, monkeypatch):
    model, some = Layerwise(offloaded(tiny_llama(4))), batch()
    plain = Layerwise(tiny_llama(4))

    def short(*_arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prefetch, "_allocate", short)
    states = expected = plain.embed(some)
    for layer in model.one_by_one(range(4)):
        states = model.run(some, states, (layer,))
    assert torch.equal(states, plain.run(some, expected, range(4)))
    assert late.brought == 0


def test_what_is_on_its_way_is_waited_for_when_the_work_ends(late):
    model = Layerwise(offloaded(tiny_llama(4)))
    layers = model.one_by_one(range(4))
    next(layers)
    coming = model._ahead._coming
    layers.close()
    assert coming.read.done()
    assert model._ahead._coming is None
    assert coming.upload == []


def test_an_error_of_reading_is_that_of_a_layer_that_was_not_fetched(late, monkeypatch):
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    ahead, stored = Ahead(late), layer.get_submodule(WEIGHT)._hf_hook.weights_map

    def broken(*_key):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(stored), "__getitem__", broken)
    ahead.fetch(layer)
    with pytest.raises(OSError, match="the disk is gone"), ahead.resident(layer):
        pass


@pytest.mark.parametrize("order", [(0, 1, 3), (3, 2, 0)])
def test_the_layer_that_is_fetched_is_that_which_is_needed_next(late, order, monkeypatch):
    model, fetched = Layerwise(offloaded(tiny_llama(4))), []
    monkeypatch.setattr(model._ahead, "fetch", fetched.append)
    assert tuple(model.one_by_one(order)) == order
    assert fetched == [model.modules[layer] for layer in order[1:]]
    model.in_step([iter((0, 3))], {3, 0})
    assert fetched[2:] == [model.modules[3]]


def test_a_weight_is_found_where_it_is_stored():
    plain, model = tiny_llama(), offloaded(tiny_llama())
    module, twin = model.model.layers[2].mlp.down_proj, plain.model.layers[2].mlp.down_proj
    assert module.weight.is_meta
    assert torch.equal(stored_weight(module, "weight"), twin.weight)
    assert stored_weight(twin, "weight") is twin.weight
    assert execution_device(module) == torch.device("cpu")
    assert execution_device(twin) is None


@pytest.mark.parametrize("layers", [None, [2]])
@pytest.mark.parametrize("held", [True, False])
def test_a_change_is_seen_by_every_forward(layers, held):
    plain, model = tiny_llama(), offloaded(tiny_llama(), layers)
    value = torch.randn(32, 48, dtype=torch.float64)
    with torch.no_grad():
        write_weight(plain.model.layers[2].mlp.down_proj, "weight", value)
        layer = model.model.layers[2]
        if held:
            with resident(layer):
                module = layer.mlp.down_proj
                module.weight = torch.nn.Parameter(module.weight.clone())  # as a GPU has it
                write_weight(module, "weight", value)
                assert torch.equal(layer.mlp.down_proj.weight, value.float())
        else:
            write_weight(layer.mlp.down_proj, "weight", value)
        ids = torch.arange(9)[None]
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_resident_weights_are_brought_once_and_taken_away_again():
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    module = layer.mlp.down_proj
    assert is_offloaded(layer)
    with resident(layer):
        weight = module.weight
        assert not is_offloaded(layer)
        with resident(layer):
            module(torch.zeros(1, 48))
        assert module.weight is weight
    assert module.weight.is_meta
    assert is_offloaded(layer)


def test_resident_weights_are_taken_away_after_an_error():
    layer = offloaded(tiny_llama(), [2]).model.layers[2]
    with pytest.raises(ZeroDivisionError), resident(layer):
        raise ZeroDivisionError
    assert layer.mlp.down_proj.weight.is_meta
    assert is_offloaded(layer)


def test_passes_take_offloaded_layers_one_by_one():
    assert list(Layerwise(tiny_llama()).passes((1, 2, 4))) == [(1, 2, 4)]
    layerwise, some = Layerwise(offloaded(tiny_llama(), [2])), batch()
    assert list(layerwise.passes((0, 1))) == [(0, 1)]
    states = expected = layerwise.embed(some)
    for layers in layerwise.passes((1, 2, 4)):
        assert len(layers) == 1
        states = layerwise.run(some, states, layers)
    assert torch.equal(states, layerwise.run(some, expected, (1, 2, 4)))


def test_a_weight_is_changed_on_both_devices():
    with FakeTensorMode(), torch.no_grad():
        module = torch.nn.Linear(3, 2, device="cuda", dtype=torch.bfloat16)
        store = {"weight": torch.zeros(2, 3, dtype=torch.bfloat16)}
        module._hf_hook = AlignDevicesHook("cuda", weights_map=store)
        write_weight(module, "weight", torch.ones(2, 3, device="cuda", dtype=torch.float64))
        assert module.weight.is_cuda
        assert stored_weight(module, "weight").device == torch.device("cpu")

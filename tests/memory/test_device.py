"""Bytes of weights as bitsandbytes and torch really hold them, and of devices."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower import processes
from shallower.errors import ModelError
from shallower.memory import device as memory
from shallower.memory.device import device_room
from shallower.memory.rehearsal import build_empty
from shallower.memory.weights import dequantised_bytes, weight_bytes

MODELS = {
    "llama": LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000, hidden_size=256, intermediate_size=700, num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "tied gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=128, n_layer=2, n_head=2)),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def held(model):
    """The bytes of all storages that a model holds, scales and tables of bitsandbytes too."""
    storages = {}

    def take(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for tensor in (*model.parameters(), *model.buffers()):
        take(tensor)
        take(getattr(tensor, "SCB", None))
        state = getattr(tensor, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            for value in vars(one).values() if one is not None else ():
                take(value)
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "nf4", "int8"])
def test_weights_take_what_is_counted(model, words, tmp_path, dtype):
    if dtype in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded, _ = sh.load_model(tmp_path, dtype, "cpu")
    assert weight_bytes(build_empty(model.config, torch.bfloat16), dtype) == held(loaded)


def test_the_largest_quantised_weight_is_made_plain(model):
    largest = max(p.numel() for n, p in model.named_parameters() if "mlp" in n)
    assert dequantised_bytes(model, "nf4") == 2 * largest
    assert dequantised_bytes(model, "bfloat16") == 0


def test_rooms_are_found(monkeypatch):
    assert device_room("16GB") == (16 * 10**9, True)
    assert device_room(5) == (5, True)
    with pytest.raises(ModelError, match="holds nothing"):
        device_room(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    room, card = device_room()
    assert not card
    assert room > 10**8


def test_the_room_of_a_gpu_is_what_it_and_the_cache_have_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3)
    assert device_room() == (14, True)


def test_processes_that_must_agree_take_the_smallest_card(monkeypatch):
    class Card:
        def __init__(self, size):
            self.total_memory = size

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: Card(80 - card))
    assert device_room(processes=2) == (79, True)


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_CGROUPS", tmp_path)
    free = memory.available_bytes(torch.device("cpu"))
    for name, text in (
        ("memory.max", f"{free}\n"),
        ("memory.current", f"{free // 2}\n"),
        ("memory.stat", f"anon {free // 4}\ninactive_file {free // 4}\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory.available_bytes(torch.device("cpu")) == free - free // 2 + free // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(torch.device("cpu")) > free * 3 // 4 + 1

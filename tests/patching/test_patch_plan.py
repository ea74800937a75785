"""The memory of a patch, planned without weights, and layers that wait in the CPU's memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import shallower as sh
from shallower.memory.placement import place_weights
from shallower.memory.rehearsal import build_empty
from shallower.patching.least_squares import NormalEquations, solver_bytes
from shallower.patching.memory import writer_widths
from shallower.values.estimates import OFFLOADED, WEIGHTS, usable
from tests.conftest import mostly_slow, write_jsonl
from tests.healing.cuts import TEXTS
from tests.memory_oracle import shape, tracked_forward

slow = pytest.mark.slow
WIDTHS = {
    "llama-2-7b": (4096 + 11_008, 4096),
    "llama-2-70b": (8192 + 28_672, 8192),
    "qwen2.5-7b": (3584 + 18_944, 3584),
    "phi-2": (2560 + 10_240, 2560),
    "gpt2-xl": (1600 + 6400, 1600),
    "falcon-7b": (4544 + 4 * 4544, 4544),
    "gemma-2-2b": (8 * 256 + 9216, 2304),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_maps_that_are_solved_are_found_by_structure(name):
    assert writer_widths(build_empty(shape(name, 2)[0], torch.bfloat16)) == WIDTHS[name]


@pytest.mark.parametrize("name", mostly_slow(["gpt2-xl", "llama-2-7b", "llama-2-70b"], ["gpt2-xl"]))
def test_equations_are_within_15_percent_of_the_tracker(name):
    inputs, width = WIDTHS[name]
    plan = solver_bytes(inputs, width, batch_tokens=4096, kept_tokens=1024, value_bytes=2)
    tracker = MemTracker()
    with FakeTensorMode(), tracker:
        equations = NormalEquations.empty(inputs, width, torch.device("cpu"))
        tokens = (torch.empty(4096, n, dtype=torch.bfloat16) for n in (inputs, width))
        equations.add(*tokens)
        equations.keep(torch.empty(1024, inputs, dtype=torch.bfloat16), torch.empty(1024, width))
        own = torch.empty(width, inputs, dtype=torch.bfloat16)
        for _ in range(2):
            equations.solve(0.03, equations.scale.expand(inputs), 0.01).add_(own)
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert plan == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(("name", "layers", "card", "waits"), [
    ("llama-2-7b", 4, "24GB", False),
    pytest.param("llama-2-70b", 16, "48GB", True, marks=slow),
    pytest.param("llama-2-7b", 32, "24GB", False, marks=slow),
    pytest.param("llama-2-70b", 80, "80GB", True, marks=slow),
])  # fmt: skip
def test_large_models_are_patched_on_one_card(name, layers, card, waits):
    plan = sh.memory_forecast(shape(name, layers)[0], "patch", device_memory=card)
    assert plan.fits
    assert (plan.parts[OFFLOADED] > 0) == waits
    assert plan.peak_bytes == sum(plan.parts.values()) - plan.parts[OFFLOADED]


@pytest.mark.parametrize("name", ["llama-2-7b", pytest.param("llama-2-70b", marks=slow)])
def test_a_forward_adds_what_the_tracker_finds(name):
    config, _ = shape(name, 2)
    plan = sh.memory_forecast(config, "patch", device_memory="80GB")
    alone = tracked_forward(name, 2, 16, 256, False)
    weights = sum(p.numel() for p in build_empty(config, torch.bfloat16).parameters()) * 2
    assert plan.parts["activations"] == pytest.approx(alone - weights, rel=0.15)


def test_what_does_not_fit_is_told():
    config, _ = shape("llama-2-7b", 4)
    plan = sh.memory_forecast(config, "patch", device_memory="4GB")
    assert not plan.fits
    assert ", which does not fit" in str(plan)


@pytest.mark.slow
def test_layers_that_are_dropped_wait_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config, _ = shape("llama-2-7b", 8)
    whole = sh.memory_forecast(config, "patch", device_memory="24GB")
    assert place_weights(config, "bfloat16", whole) is None
    device = 8 * 10**9
    plan = sh.memory_forecast(config, "patch", device_memory=device)
    assert plan.fits
    assert plan.peak_bytes <= usable(device)
    places = place_weights(config, "bfloat16", plan, spare=(3, 4))
    waiting = [name for name, place in places.items() if place == "cpu"]
    assert {"model.layers.3", "model.layers.4"} <= set(waiting)
    layer = sum(p.numel() * 2 for n, p in _parameters(config) if n.startswith("model.layers.0."))
    total = sum(p.numel() * 2 for _, p in _parameters(config))
    assert total - layer * (len(waiting) - 1) <= plan.parts[WEIGHTS]


def _parameters(config):
    return build_empty(config, torch.bfloat16).named_parameters()


def test_a_dry_run_tells_the_memory(shallower, both, folder):
    texts = write_jsonl(folder / "texts.jsonl", TEXTS)
    options = (both[0], "--drop", "3:5", "--texts", texts, "--out", "x", "--dry-run")
    done = shallower("patch", *options, "--device-memory", "16GB", "--json").json
    assert not {"answers", "share"} & {*done}
    memory = done["memory"]
    assert memory["device_bytes"] == 16 * 10**9
    assert memory["micro_batch"] == 16
    assert set(memory["parts"]) >= {WEIGHTS, OFFLOADED, "activations", "solver"}

"""Steps on weights without memory hold what they hold on real ones."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from shallower.errors import ModelError
from shallower.experts.hooks import ExpertHooks
from shallower.memory.plan import ForwardStep
from shallower.memory.rehearsal import (
    LiveBytes,
    Rehearsal,
    build_empty,
    first_that_runs,
    output_of,
)
from shallower.models.architecture import evaluating
from shallower.models.decoder import Decoder
from shallower.scanning.hidden_states import forward as scanned
from shallower.scanning.hidden_states import stream
from shallower.texts.batches import Batch
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.mixtures import mixture
from tests.families import small_config

FAMILIES = (
    "llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "qwen3_next", "mamba2", "gpt_oss", "bloom",
)  # fmt: skip


def held_by(model, step):
    """The bytes at the peak of a real step."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    with LiveBytes(known, padded=True) as live:
        step(model)
    return live.peak


def forward(model):
    ids = torch.zeros(3, 40, dtype=torch.long)
    with torch.inference_mode(), evaluating(model):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def backward(model):
    ids = torch.zeros(3, 40, dtype=torch.long)
    model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, quick=("mixtral",)))
def test_a_forward_holds_what_it_holds_with_weights(name):
    config = small_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rehearsal = Rehearsal(build_empty(config, torch.float32))
    found = rehearsal.run(lambda: forward(rehearsal.model))
    assert found == pytest.approx(held_by(model, forward), rel=0.05)


@pytest.mark.parametrize(
    "name", mostly_slow(["mixtral", "deepseek_v3", "llama4_text"], ["llama4_text"])
)
def test_a_scan_of_experts_holds_what_it_holds_with_weights(name):
    """Experts run twice; the products of what they add are kept until the forward is through."""
    model = mixture(name)
    tokens = np.random.default_rng(0).integers(3, 100, (3, 40))
    batch = Batch(tokens, np.ones((3, 40), np.int64), np.arange(3))

    def observed(model):
        with ExpertHooks(model) as hooks:
            for part in stream(model, [batch], experts=hooks):
                del part

    step = ForwardStep(
        model.config, "float32", scanned(experts=True), length=40, card=False, loaded=True
    )
    states = 3 * scanned().beside(Decoder.of(model), 40)  # of the batch before
    assert step.parts(3)["activations"] - states == pytest.approx(
        held_by(model, observed), rel=0.05
    )


def test_a_backward_holds_what_it_holds_with_weights():
    model = tiny_llama()
    rehearsal = Rehearsal(build_empty(model.config, torch.float32))
    found = rehearsal.run(lambda: backward(rehearsal.model))
    assert found == pytest.approx(held_by(model, backward), rel=0.02)


def test_random_numbers_go_on_as_if_nothing_was_rehearsed():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rehearsal = Rehearsal(build_empty(tiny_llama_config(), torch.float32))
    rehearsal.run(lambda: torch.rand(9))
    assert torch.equal(torch.rand(4), expected)


def tiny_llama_config():
    state = torch.get_rng_state()
    config = tiny_llama().config
    torch.set_rng_state(state)
    return config


def test_a_config_stays_as_it_is():
    config = tiny_llama_config()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    before = config.to_dict()
    build_empty(config, torch.float32)
    assert config.to_dict() == before


def test_experts_that_loop_over_data_are_rehearsed_in_another_way():
    config = small_config("mixtral")
    config._experts_implementation = "eager"

    def make(experts):
        rehearsal = Rehearsal(build_empty(config, torch.float32, experts=experts))
        return experts, rehearsal.run(lambda: forward(rehearsal.model))

    assert first_that_runs(make)[0] == "grouped_mm"
    assert config._experts_implementation == "eager"


def test_what_no_model_is_built_of_is_told():
    from transformers import CLIPConfig

    with pytest.raises(ModelError, match="cannot build a model from the config"):
        build_empty(CLIPConfig(), torch.float32)


def test_other_ways_to_run_experts_are_tried():
    tried = []

    def make(experts):
        tried.append(experts)
        if experts != "batched_mm":
            raise RuntimeError("its shapes depend on values")
        return "done"

    assert first_that_runs(make) == "done"
    assert tried == [None, "grouped_mm", "batched_mm"]
    assert first_that_runs(lambda _experts: 1 / 0) is None


@pytest.mark.parametrize(
    ("left", "right", "ends"),
    [
        ((12, 8), (3, 8, 16), [4, 8, 12]),
        ((3, 12, 8), (8, 24), [8, 16, 24]),
        ((16, 12), (12, 24), [4, 8, 12]),
        ((3, 12, 8), (3, 8, 16), None),
    ],
    ids=["rows", "columns", "sums", "a batch"],
)
def test_fake_products_by_expert_have_the_shapes_of_real_ones(left, right, ends):
    def product(run):
        offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        return run(
            torch.ops.aten._grouped_mm.default, (torch.ones(left), torch.ones(right)), offs=offsets
        )

    real = product(lambda func, args, **kwargs: func(*args, **kwargs))
    with FakeTensorMode():
        fake = product(lambda func, args, **kwargs: output_of(func, args, kwargs))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)

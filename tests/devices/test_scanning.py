"""A scan's hooks and copies on fake CUDA devices."""

import numpy as np
import pytest
from transformers import Llama4TextConfig, MixtralConfig

from shallower.experts.hooks import ExpertHooks
from shallower.memory.streaming import Streamed
from shallower.models.layerwise import Layerwise
from shallower.scanning.builder import as_array
from shallower.scanning.hidden_states import stream, stream_by_layer
from shallower.values.positions import Positions
from tests.conftest import mostly_slow
from tests.devices.batches import batch
from tests.devices.stage import WIDTH, Stage


@pytest.mark.slow
def test_states_come_layer_by_layer(stage):
    with stage.open():
        streamed = Streamed(Layerwise(stage.model()))
        for part in stream_by_layer(streamed, [batch(), batch()]):
            assert as_array(part.states).shape == (5, 3, WIDTH)


@pytest.mark.parametrize(
    ("words", "tokens"),
    mostly_slow(
        [("last", 3), ("last:4", 12), ("random:2", 6), ("all", 20)], [("last", 3), ("all", 20)]
    ),
)
def test_the_states_of_the_chosen_tokens_arrive_on_the_cpu(stage, words, tokens):
    with stage.open():
        batches = [batch(), batch(left=True)]
        for part in stream(stage.model(), batches, Positions.parse(words)):
            states = as_array(part.states)
            assert states.shape == (5, tokens, WIDTH)
            assert states.dtype == np.uint16  # bfloat16


SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
}
MIXTRAL = MixtralConfig(**SHAPES)
LLAMA4 = Llama4TextConfig(**SHAPES, intermediate_size_mlp=96, head_dim=16)
STREAMING = Stage(1, streaming=True)


@pytest.mark.parametrize("family", mostly_slow(["mixtral", "llama4"], ["llama4"]))
def test_what_experts_do_arrives_on_the_cpu(stage, family):
    with stage.open():
        model = stage.mixture(MIXTRAL if family == "mixtral" else LLAMA4)
        with ExpertHooks(model) as hooks:
            for _ in stream(model, [batch(), batch(left=True)], experts=hooks):
                pass
    assert (hooks.statistics.counts.sum(1) == 2 * 2 * 20).all()


def test_experts_of_layers_on_disk_are_seen_layer_by_layer():
    with STREAMING.open():
        model = STREAMING.mixture(MixtralConfig(**SHAPES | {"num_hidden_layers": 2}))
        streamed = Streamed(Layerwise(model))
        with ExpertHooks(model) as hooks:
            for _ in stream_by_layer(streamed, [batch(), batch()], experts=hooks):
                pass
    assert (hooks.statistics.counts.sum(1) == 2 * 2 * 20).all()
    assert hooks.statistics.has_stream

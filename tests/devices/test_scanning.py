"""A scan's hooks and copies on fake CUDA devices."""

import numpy as np
import pytest

from shallower.memory.streaming import Streamed
from shallower.models.layerwise import Layerwise
from shallower.scanning.builder import as_array
from shallower.scanning.hidden_states import stream, stream_by_layer
from shallower.values.positions import Positions
from tests.devices.batches import batch


def test_states_come_layer_by_layer(stage):
    with stage.open():
        streamed = Streamed(Layerwise(stage.model()), progress=False)
        for part in stream_by_layer(streamed, [batch(), batch()]):
            assert as_array(part.states).shape == (5, 3, 4096)


@pytest.mark.parametrize(
    ("words", "tokens"), [("last", 3), ("last:4", 12), ("random:2", 6), ("all", 20)]
)
def test_the_states_of_the_chosen_tokens_arrive_on_the_cpu(stage, words, tokens):
    with stage.open():
        batches = [batch(), batch(left=True), batch()]
        for part in stream(stage.model(), batches, Positions.parse(words)):
            states = as_array(part.states)
            assert states.shape == (5, tokens, 4096)
            assert states.dtype == np.uint16  # bfloat16

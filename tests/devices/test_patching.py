"""A patch of a model on fake CUDA devices, whole: states in files, equations, solutions, losses."""

import pytest

from shallower.healing.patch import patch
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS
from tests.devices.test_models import A_PLAIN_SUM


@pytest.mark.parametrize("method", ["refit", "map", "magnitude"])
def test_a_patch(stage, method):
    model = stage.llama()
    with stage.open(_scale=A_PLAIN_SUM):
        done = patch(
            model, word_tokenizer(), [2], texts=TEXTS * 2, method=method, batch_size=16,
            num_tokens=60, progress=False,
        )  # fmt: skip
    assert done.plan.dropped == (2,)
    assert done.method == method

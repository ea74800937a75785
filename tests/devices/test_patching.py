"""A patch of a model on fake CUDA devices, whole: states in files, equations, solutions, losses."""

import pytest

from shallower.models.layerwise import Layerwise
from shallower.patching import descent, least_squares, solver
from shallower.patching.patch import patch
from shallower.patching.quick import QuickPatch
from shallower.values.plan import Plan
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS, batch
from tests.devices.conftest import on_devices
from tests.devices.test_models import A_PLAIN_SUM


@on_devices
def test_a_patch(stage):
    model = stage.llama(3)
    with stage.open(_scale=A_PLAIN_SUM), pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(descent, "STEPS", 1)
        fewer.setattr(least_squares, "RIDGES", (0.03, 0.1))
        fewer.setattr(solver, "FIRST_WEIGHTS", solver.FIRST_WEIGHTS[:1])
        done = patch(
            model, word_tokenizer(), [1], texts=TEXTS * 4, batch_size=16,
            num_tokens=60, progress=False,
        )  # fmt: skip
    assert done.plan.dropped == (1,)


@pytest.mark.slow
@on_devices
def test_a_quick_patch(stage):
    with stage.open(_scale=A_PLAIN_SUM):
        model = Layerwise(stage.llama())
        quick = QuickPatch(model, [batch()] * 2)
        with quick.patched(Plan.of(len(model), [1, 3])) as fits:
            assert fits.layers == (0, 2)

"""The memory of a loss at a large vocabulary, in a process of its own."""

import os
import sys

import pytest

from tests.commands import in_a_process
from tests.conftest import ROOT

VOCABULARY = 262_144


def above(what, texts, length):
    """Bytes above the model at the peak."""
    paths = os.pathsep.join(filter(None, [*sys.path, str(ROOT)]))
    arguments = map(str, (what, texts, length, VOCABULARY))
    done = in_a_process(
        sys.executable, "-m", "tests.savings.peak", *arguments,
        cwd=ROOT, env={"PYTHONPATH": paths}, timeout=1500,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert 12 < done.json["loss"] < 13.5  # of random weights: ln(vocabulary) and a little
    return done.json["above"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["measure", "train"])
@pytest.mark.parametrize(
    ("texts", "length", "most"),
    [
        (2, 384, 500e6),  # of 805 MB of logits, in float32
        pytest.param(8, 4096, 1e9, marks=pytest.mark.slow),  # of 34 GB
    ],
)
def test_the_memory_of_a_loss_does_not_grow_with_the_tokens(what, texts, length, most):
    assert above(what, texts, length) < most < texts * length * VOCABULARY * 4

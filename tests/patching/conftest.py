"""Models to patch."""

import pytest

from shallower.patching import descent
from tests.examples import learned_llama
from tests.healing.conftest import both

__all__ = ["both"]


@pytest.fixture(scope="module")
def few_steps():
    """A descent is short."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(descent, "STEP_TOKENS", 200)
        patched.setattr(descent, "STEPS", 4)
        yield


@pytest.fixture(scope="session")
def learned(words):
    """A tiny Llama that predicts such words better than chance. Tests copy it."""
    return learned_llama(words, num_layers=8)


@pytest.fixture(scope="session")
def learned_six(words):
    """The same of six layers."""
    return learned_llama(words, num_layers=6)

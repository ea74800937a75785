"""Stages of one and of two fake CUDA devices, and of two beside the CPU's memory."""

import pytest

from tests.devices.stage import Stage

STAGES = {
    "one device": Stage(1),
    "two devices": Stage(2),
    "two devices, a layer offloaded": Stage(2, offloading=True),
}
"""Kept for the session: models without values cost nothing but the time to build them."""


def stages(*quick):
    """All stages as parameters; those that are not named are slow."""
    return [
        pytest.param(stage, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, stage in STAGES.items()
    ]


# What goes wrong on one device goes wrong on two, and beside the CPU's memory.
@pytest.fixture(params=stages("two devices, a layer offloaded"))
def stage(request):
    return request.param


on_devices = pytest.mark.parametrize("stage", stages("two devices"), indirect=True)
"""Where layers that are offloaded are refused, or are run for real elsewhere."""

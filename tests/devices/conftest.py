"""Stages of one and of two fake CUDA devices, and of one beside the CPU's memory."""

import pytest

from tests.devices.stage import Stage

STAGES = {
    "one device": Stage(1),
    "two devices": Stage(2),
    "one device, half of the layers offloaded": Stage(1, offloading=True),
}
"""Kept for the session: models without values cost nothing but the time to build them."""


@pytest.fixture(
    params=[
        # What goes wrong on one device goes wrong on two.
        pytest.param(stage, id=name, marks=pytest.mark.slow if name == "one device" else ())
        for name, stage in STAGES.items()
    ]
)
def stage(request):
    return request.param

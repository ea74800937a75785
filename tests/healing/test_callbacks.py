"""The Trainer's callbacks by themselves."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shallower.healing.training import Throughput


@pytest.mark.parametrize(("device", "waited"), [("cpu", []), ("cuda:0", ["cuda:0"])])
def test_a_step_has_ended_when_its_device_has_done_it(monkeypatch, device, waited):
    """Else the time of the last forward and backward would be counted nowhere."""
    calls = []

    def synchronize(of):
        calls.append(str(of))
        time.sleep(0.05)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    arguments = SimpleNamespace(device=torch.device(device))
    state = SimpleNamespace(global_step=1)
    throughput = Throughput(np.array([7]), None)
    throughput.on_step_begin(arguments, state, None)
    throughput.on_step_end(arguments, state, None)
    assert calls == waited
    assert (throughput.tokens_per_second < 7 / 0.05) == bool(waited)

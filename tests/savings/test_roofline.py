"""The roofline beside a slow twin, and the table of devices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import ModelError
from shallower.savings import timing
from shallower.savings.account import Operation
from shallower.savings.devices import DEVICES, find_device, known_as
from shallower.savings.roofline import by_layer, seconds
from shallower.savings.timing import own_device, this_machine

OPERATIONS = st.lists(
    st.builds(
        Operation, st.integers(0, 10**15), st.integers(0, 10**12), st.integers(0, 10**12),
        st.integers(0, 99), st.none() | st.integers(0, 3),
    ),
    max_size=20,
)  # fmt: skip


@given(OPERATIONS, st.sampled_from(list(DEVICES)), st.sampled_from(["bfloat16", "float32"]))
def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_bytes(operations, name, dtype):
    device = DEVICES[name]
    flops, moved = np.array([(o.flops, o.read + o.written) for o in operations] or [(0, 0)]).T
    expected = np.maximum(flops / device.flops[dtype], moved / device.bandwidth).sum()
    assert seconds(operations, device, dtype) == pytest.approx(expected, rel=1e-12)
    layers = by_layer(operations, device, dtype, num_layers=4)
    outside = [one for one in operations if one.layer is None]
    assert sum(layers) + seconds(outside, device, dtype) == pytest.approx(expected, rel=1e-12)


def test_datasheets():
    """Peaks are of dense matrices: many a sheet prints twice that, of sparse ones."""
    peaks = {name: device.peak("bfloat16") / 1e12 for name, device in DEVICES.items()}
    assert peaks == {
        "a100-40": 312, "a100-80": 312, "h100": 989.4, "h200": 989.4, "l40s": 362.05,
        "rtx-4090": 165.2,
    }  # fmt: skip
    assert [device.bandwidth / 1e9 for device in DEVICES.values()] == [
        1555, 2039, 3350, 4800, 864, 1008,
    ]  # fmt: skip
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.peak("nf4") == device.peak("float16") == device.peak("bfloat16")
        assert device.peak("float32") < device.peak("bfloat16")
        assert "NVIDIA" in device.source


def test_a_device_is_found_by_its_name():
    assert find_device("H100") is DEVICES["h100"]
    with pytest.raises(ModelError, match="unknown device 'v100': expected one of a100-40, a100-80"):
        find_device("v100")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_driver_name(title, name):
    assert known_as(title) is (name and DEVICES[name])


def test_this_machine_is_measured():
    found = this_machine("float32")
    assert found.name == "here"
    assert found.flops["float32"] > found.bandwidth > 1e7
    assert 0 < found.launch < 0.1
    assert found.memory > 10**9
    assert own_device() in DEVICES.values()


def test_this_machine_is_the_same_beside_other_work(monkeypatch):
    """A median of whole passes was four times as slow at a load of ten, and so was a forecast."""
    monkeypatch.setattr(timing, "_STREAMED", 1 << 25)
    drawn = np.random.default_rng(0)

    def clock(interrupted):
        now = 0.0
        while True:
            yield now
            now += 1e-3
            yield now + (drawn.exponential(0.02) if drawn.random() < interrupted else 0.0)
            now += 1.0

    quiet, busy = (this_machine("float32", clock(share).__next__) for share in (0.0, 0.7))
    assert busy.flops == pytest.approx(quiet.flops)
    assert busy.bandwidth == pytest.approx(quiet.bandwidth)
    assert quiet.source.endswith("the usual one took 1.0 times as long")
    assert float(busy.source.split()[-4]) > 3

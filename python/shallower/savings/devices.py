"""GPUs by their datasheets, for forecasts by the roofline; no factor makes a forecast fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ModelError
from ..models.dtypes import QUANTISED

HERE = "here"
"""The name of the machine at hand, which has no datasheet and is measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as the roofline sees it."""

    name: str  # as `--forecast-device` takes it
    title: str  # a name for people
    flops: Mapping[str, float]  # operations a second at most by dtype of the weights, dense
    bandwidth: float  # bytes a second between memory and processor
    memory: int  # bytes
    source: str  # of the figures
    launch: float = 0.0  # seconds an operation beside its arithmetic; 0 for others' machines

    def peak(self, dtype: str) -> float:
        """Operations a second at most; weights in 4 or 8 bits are multiplied in bfloat16."""
        return self.flops["bfloat16" if dtype in QUANTISED else dtype]


def _gpu(
    name: str, title: str, peaks: tuple[float, float], bandwidth: float, memory: int, *, source: str
) -> Device:
    """A GPU: TFLOPS of tensor cores in bfloat16 and of all others in float32, GB/s, GB."""
    half, full = (1e12 * peak for peak in peaks)
    flops = MappingProxyType({"bfloat16": half, "float16": half, "float32": full})
    return Device(name, title, flops, 1e9 * bandwidth, memory * 10**9, source)


DEVICES: Mapping[str, Device] = MappingProxyType({
    device.name: device
    for device in (
        _gpu(
            "a100-40", "A100 SXM 40GB", (312.0, 19.5), 1555, 40,
            source="NVIDIA A100 Tensor Core GPU, datasheet of 2021",
        ),
        _gpu(
            "a100-80", "A100 SXM 80GB", (312.0, 19.5), 2039, 80,
            source="NVIDIA A100 Tensor Core GPU, datasheet of 2021",
        ),
        _gpu(
            "h100", "H100 SXM 80GB", (989.4, 66.9), 3350, 80,
            source="NVIDIA H100 Tensor Core GPU, architecture whitepaper and datasheet of 2023",
        ),
        _gpu(
            "h200", "H200 SXM 141GB", (989.4, 66.9), 4800, 141,
            source="NVIDIA H200 Tensor Core GPU, datasheet of 2024; half of what it says of sparse",
        ),
        _gpu(
            "l40s", "L40S 48GB", (362.05, 91.6), 864, 48,
            source="NVIDIA L40S, datasheet of 2023",
        ),
        _gpu(
            "rtx-4090", "RTX 4090 24GB", (165.2, 82.6), 1008, 24,
            source="NVIDIA Ada GPU architecture, whitepaper of 2022; sums in float32",
        ),
    )
})  # fmt: skip
"""Peaks of dense matrices, as datasheets have them; they often print twice that, of sparse ones."""


def find_device(name: str) -> Device:
    """Find a GPU by its name, as ``a100-80``, in letters of any case."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise ModelError(
            f"unknown device {name!r}: expected one of {', '.join(DEVICES)}, or {HERE} for this "
            f"machine (device, --forecast-device)"
        )
    return found


_DRIVER_NAMES = {
    "a100-40": {"A100", "SXM4", "40GB"},
    "a100-80": {"A100", "SXM4", "80GB"},
    "h100": {"H100", "80GB", "HBM3"},
    "h200": {"H200"},
    "l40s": {"L40S"},
    "rtx-4090": {"GEFORCE", "RTX", "4090"},
}
"""Words of the names that drivers give to the GPUs of the table."""


def known_as(title: str) -> Device | None:
    """Find a GPU by its driver's name, as ``NVIDIA A100-SXM4-80GB``; no slower forms of a chip."""
    words = set(title.upper().replace("-", " ").split()) - {"NVIDIA"}
    return next((DEVICES[name] for name, own in _DRIVER_NAMES.items() if own == words), None)

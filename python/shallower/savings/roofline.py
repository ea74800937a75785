"""The roofline: seconds of a forward by its operations and a machine (LLM-Viewer, 2402.16363)."""

from collections.abc import Iterable

from .devices import Device
from .operations import Operation


def seconds(operations: Iterable[Operation], device: Device, dtype: str) -> float:
    """Forecast the time of operations that run one after the other.

    An operation takes as long as its arithmetic at the device's peak, or as its bytes at the
    device's bandwidth, whichever is longer; and, where that is known, the time of its launches.

    Args:
        operations: of a forward.
        device: that it runs on.
        dtype: of the weights.

    Returns:
        The seconds.
    """
    peak = device.peak(dtype)
    return sum(
        max(one.flops / peak, (one.read + one.written) / device.bandwidth)
        + one.launches * device.launch
        for one in operations
    )


def by_layer(
    operations: Iterable[Operation], device: Device, dtype: str, *, num_layers: int
) -> list[float]:
    """Forecast the time that each decoder layer takes.

    Args:
        operations: of a forward.
        device: that it runs on.
        dtype: of the weights.
        num_layers: decoder layers.

    Returns:
        The seconds by layer; what lies outside the layers is in none of them.
    """
    groups: list[list[Operation]] = [[] for _ in range(num_layers)]
    for one in operations:
        if one.layer is not None:
            groups[one.layer].append(one)
    return [seconds(group, device, dtype) for group in groups]

"""The roofline: seconds of a forward by its operations and a device (LLM-Viewer, 2402.16363)."""

from collections.abc import Iterable, Sequence

from ..models.decoder import Decoder
from ..models.identity import stored_dtype
from ..results.gain import Forecast, Sizes
from ..settings.target import Target
from .account import Account, Operation, count
from .devices import HERE, Device, find_device
from .timing import own_device, this_machine


def seconds(operations: Iterable[Operation], device: Device, dtype: str) -> float:
    """Forecast the time of operations that run one after the other.

    Each takes the longer of its arithmetic at peak and its bytes at bandwidth, plus launches.
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
    """Forecast the seconds of each decoder layer; what lies outside them is in none."""
    groups: list[list[Operation]] = [[] for _ in range(num_layers)]
    for one in operations:
        if one.layer is not None:
            groups[one.layer].append(one)
    return [seconds(group, device, dtype) for group in groups]


def forecast(
    device: Device, accounts: Sequence[Account], sizes: Sequence[Sizes], *, dtype: str
) -> Forecast:
    """Forecast the times of a model and of its cut, which ``accounts`` and ``sizes`` are of."""
    (prefill_before, prefill_after), (decode_before, decode_after) = (
        [seconds(getattr(account, phase), device, dtype) for account in accounts]
        for phase in ("prefill", "decode")
    )
    fits_before, fits_after = (size.memory <= device.memory for size in sizes)
    return Forecast(
        device.name,
        device.title,
        device.source,
        flops=device.peak(dtype),
        bandwidth=device.bandwidth,
        memory=device.memory,
        launch=device.launch,
        prefill_before=prefill_before,
        prefill_after=prefill_after,
        decode_before=decode_before,
        decode_after=decode_after,
        fits_before=fits_before,
        fits_after=fits_after,
    )


def cost_by_layer(decoder: Decoder, target: Target) -> tuple[float, list[float]]:
    """Count what a whole model takes of a target's latency or memory, and each of its layers.

    Of a latency that is 1, and the share of a token's time on the device; of a memory the bytes of
    weights and cache.
    """
    dtype = stored_dtype(decoder.model)
    account = count(decoder.model.config, dtype, context=target.context)
    if target.latency is None:
        pairs = zip(account.layer_weights, account.layer_caches, strict=True)
        return account.weight_bytes + account.cache_bytes, [sum(pair) for pair in pairs]
    device = _target_device(target.device, dtype)
    whole = seconds(account.decode, device, dtype)
    times = by_layer(account.decode, device, dtype, num_layers=len(decoder))
    return 1.0, [time / whole for time in times]


def _target_device(name: str | None, dtype: str) -> Device:
    if name == HERE:
        return this_machine(dtype)
    return own_device() if name is None else find_device(name)

"""The share of a token's time and of the memory that each layer takes, by the config alone."""

from typing import Any

from ..models.decoder import Decoder
from ..models.identity import stored_dtype
from ..savings.account import count
from ..savings.devices import HERE, Device, find_device
from ..savings.machine import own_device, this_machine
from ..savings.roofline import by_layer, seconds
from ..values.target import Target


def footprint(decoder: Decoder, target: Target) -> tuple[float, list[float]]:
    """Find what the whole model takes, and each of its layers.

    Args:
        decoder: the model.
        target: for a latency or a memory.

    Returns:
        Of a latency 1, and the share of a token's time that every layer takes on the device; of a
        memory the bytes of weights and cache.

    Raises:
        ModelError: the model cannot be counted, or has learned fewer positions than the context.
    """
    config: Any = decoder.model.config
    dtype = stored_dtype(decoder.model)
    account = count(config, dtype, context=target.context)
    if target.latency is None:
        pairs = zip(account.layer_weights, account.layer_caches, strict=True)
        return account.weight_bytes + account.cache_bytes, [sum(pair) for pair in pairs]
    device = _device(target.device, dtype)
    whole = seconds(account.decode, device, dtype)
    times = by_layer(account.decode, device, dtype, num_layers=len(decoder))
    return 1.0, [time / whole for time in times]


def _device(name: str | None, dtype: str) -> Device:
    if name == HERE:
        return this_machine(dtype)
    return own_device() if name is None else find_device(name)

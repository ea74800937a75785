"""The default dtype and devices of a model; torch is imported late."""

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ModelError
from ..processes import first_processor
from ..settings.recipe import Resolved

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16", "nf4", "int8"]
DeviceMap = str | dict[str, Any] | None

QUANTISED = ("nf4", "int8")
"""Dtypes that bitsandbytes makes of plain weights: of 4 and 8 bits."""

STREAM = "stream"
"""The device map of a model whose layers are streamed from disk."""

DEQUANTISED = ("fp8", "mxfp4")
"""Ways to store weights that transformers makes plain where it cannot multiply them."""

CPU_FEATURES = ("amx_bf16", "avx512_bf16", "svebf16")
"""Instructions that multiply bfloat16; with AVX2 alone, it takes seven times as long as float32."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable that fixes cuBLAS's memory, and so its bits; read once, at the first product."""


def check_dtype(dtype: object) -> None:
    """Refuse a dtype that is none of :data:`Dtype` by a ModelError."""
    if dtype not in get_args(Dtype):
        raise ModelError(f"unknown dtype {dtype!r}: expected one of {', '.join(get_args(Dtype))}")


def plain_dtype(name: str) -> "torch.dtype":
    """Give torch's dtype that weights of a name compute in: bfloat16 for those of 4 and 8 bits."""
    import torch

    plain: torch.dtype = getattr(torch, "bfloat16" if name in QUANTISED else name)
    return plain


def check_streamed(name: str, dtype: str, device_map: DeviceMap) -> None:
    """Refuse, by a ModelError, to quantise a model whose layers are to be streamed from disk."""
    if device_map == STREAM and dtype in QUANTISED:
        raise ModelError(
            f"{name} cannot be both streamed and quantised to {dtype}, which saves nothing where a "
            f"layer is held for its forward alone: expected float32, bfloat16 or float16 (dtype, "
            f"--dtype), or another device map (device_map, without --stream)",
            see="streaming",
        )


def stored_quantisation(stored: Any) -> str | None:
    """Name how weights are stored, by a ``quantization_config``: ``nf4``, ``int8`` or a method."""
    if stored is None:
        return None
    given = stored if isinstance(stored, dict) else vars(stored)
    for key, name in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if given.get(key) or given.get(f"_{key}"):
            return name
    method = given.get("quant_method", "quantised")
    return str(getattr(method, "value", method))


def check_stored_plain(name: str, config: Any) -> None:
    """Refuse, by a ModelError, to stream a model stored quantised in anything but a GGUF file."""
    method = stored_quantisation(getattr(config, "quantization_config", None))
    if method is not None:
        raise ModelError(
            f"{name} is stored quantised, by {method}, and cannot be streamed: expected plain "
            f"weights in safetensors, or a GGUF file (device_map, --stream)",
            see="streaming",
        )


def choose_device_map(device_map: DeviceMap) -> DeviceMap:
    """Decide where a model goes: where the user says, else ``auto``, every GPU, if there is CUDA.

    With CUDA this also sets :data:`CUBLAS_WORKSPACE`, unless the user did: a later healing needs
    it.
    """
    import torch

    if not torch.cuda.is_available():
        return device_map
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    return "auto" if device_map is None else device_map


def choose_dtype(device_map: DeviceMap) -> tuple[Literal["bfloat16", "float32"], str]:
    """Decide the dtype ``auto`` for a device map that is decided, and give the reason in words."""
    import torch

    if _uses_cuda(device_map):
        return "bfloat16", "on CUDA"
    if torch.backends.mkldnn.is_available():
        for feature in CPU_FEATURES:
            if feature in cpu_features():
                return "bfloat16", f"this CPU multiplies it, by {feature}"
    return "float32", "this CPU has no instructions for bfloat16"


def _uses_cuda(device_map: DeviceMap) -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    return not all(str(place) in ("None", "cpu", "disk") for place in places)


def cpu_features() -> frozenset[str]:
    """Find the instruction sets of this CPU, by their names in /proc/cpuinfo; empty if unknown."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 and later
    if capabilities is not None:
        found = {name for name, is_there in capabilities().items() if is_there is True}
        return frozenset("svebf16" if name == "sve_bf16" else name for name in found)
    fields = first_processor()
    return frozenset(fields.get("flags", fields.get("Features", "")).split())


def computing(recipe: Resolved, device: "torch.device") -> AbstractContextManager[Any]:
    """Compute in bfloat16 with float32 adapters, or in float32, in all forwards of a healing."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype != "float32")

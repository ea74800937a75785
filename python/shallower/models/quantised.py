"""Quantised weights: bitsandbytes' kept exact, GGUF's made plain.

Bitsandbytes 0.50 rounds 4-bit block scales at the first forward on CPUs with AVX512-BF16, and would
save another model. So the loaded scales go into every state dict.
"""

import logging
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ..errors import MissingExtraError, ModelError, why
from ..texts.quiet import hushed
from .dtypes import QUANTISED, stored_quantisation


def quantisation(dtype: str) -> BitsAndBytesConfig:
    """Make bitsandbytes' config for ``nf4`` (double quantisation, bfloat16 compute) or ``int8``."""
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantised", f"dtype {dtype}")
    if dtype == "int8":
        # One line a layer and forward: bitsandbytes says that int8 computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_stored(name: str, config: Any, dtype: str) -> None:
    """Refuse weights whose stored quantisation cannot be loaded here, or not as ``dtype``."""
    stored: Any = getattr(config, "quantization_config", None)
    method = stored_quantisation(stored)
    if method is None:
        return
    way_out = "name the model that it was made from, with plain weights"
    if dtype in QUANTISED and method not in QUANTISED:
        raise ModelError(
            f"{name} is stored quantised, by {method}, and cannot be quantised to {dtype} again: "
            f"{way_out}, or another dtype (dtype, --dtype)"
        )
    try:
        with hushed():
            AutoHfQuantizer.from_config(deepcopy(stored), pre_quantized=True).validate_environment(
                dtype=None, device_map=None, weights_only=True
            )
    except Exception as error:  # of every quantiser another one
        raise ModelError(
            f"{name} is stored quantised, by {method}, and cannot be loaded here: "
            f"{why(error).removesuffix('.')}; or {way_out}"
        ) from error


def check_quantised(name: str, model: PreTrainedModel) -> None:
    """Refuse plain weights whose config says bitsandbytes, before a forward: ModelError."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith("bitsandbytes") and type(weight) is nn.Parameter:
            raise ModelError(
                f"{name} is not quantised as its config says: {path}.weight is plain "
                f"{str(weight.dtype).removeprefix('torch.')}. Remove quantization_config from its "
                f"config.json"
            )


def keep_exact(model: PreTrainedModel) -> None:
    """Make the state dict of a just loaded 4-bit model exact, also after a forward."""
    if getattr(model, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES:
        # How the checkpoint was read; transformers cannot run it backwards to save the model.
        setattr(model, "_weight_conversions", None)  # noqa: B010
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.register_state_dict_post_hook(_Restore(state))


def keep_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU, before the first forward.

    A repacked weight has rounded scales, and its product no derivative: a model that is trained
    after an evaluation would get no gradient through it, with no more than a warning.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class _Restore:
    """Puts the quantisation state of one weight back as it was loaded."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.loaded = dict(vars(state))

    def __call__(
        self, module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any
    ) -> None:
        if module.weight.quant_state is not self.state or not _was_repacked(self.state):
            return
        vars(self.state).clear()
        vars(self.state).update(self.loaded)
        for name, value in self.state.as_dict(packed=True).items():
            state_dict[f"{prefix}weight.{name}"] = value


def _was_repacked(state: Any) -> bool:
    return hasattr(state, "packing_format_for_cpu")


def check_exact(model: PreTrainedModel) -> None:
    """Raise ModelError for a 4-bit model whose scales were rounded and not kept, before a save."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or not _was_repacked(state):
            continue
        hooks = module._state_dict_hooks.values()
        if not any(isinstance(hook, _Restore) and hook.state is state for hook in hooks):
            raise ModelError(
                f"{name} was repacked by bitsandbytes at its first forward on this CPU, and its "
                f"scales were rounded: load the model with shallower.load_model, which keeps them, "
                f"or save it before the first forward"
            )


def clear_gguf_marks(model: PreTrainedModel) -> None:
    """Make a dequantised GGUF model a plain one, in place, which ``save_pretrained`` accepts."""
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(quantizer, "packed_modules", None):
        raise ModelError(
            "the model's weights are packed in GGUF blocks: load it with shallower.load_model, "
            "which dequantises them"
        )
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)

"""Adapters folded into the plain weights of their model, and the check of the result."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.saving import PROBE
from ..errors import ModelError
from ..models.architecture import find_layers, input_device
from ..models.identity import identify, stored_digest
from ..models.loading import load_model, load_weights
from ..values.healing import Healing, Merge
from ..values.recipe import Resolved
from .training import computing

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}
"""The most that ‖merged − adapters‖ / ‖adapters‖ of the logits may be, by the dtype that the sum of
weight and adapter is rounded to once."""


def stored_plainly(path: str, trust_remote_code: bool = False) -> str:
    """Read the dtype of a model's weights, which must not be quantised.

    Args:
        path: a folder or hub id.
        trust_remote_code: run code that comes with the model.

    Returns:
        A name in ``TOLERANCE``.

    Raises:
        ModelError: the weights are quantised, or of a dtype that adapters are not merged into.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the config of {path}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights of {path} are quantised, and adapters are merged into plain ones only: "
            f"keep the adapters, or cut the unquantised model"
        )
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in TOLERANCE:
        raise ModelError(f"cannot merge into weights of {dtype}: expected {', '.join(TOLERANCE)}")
    return dtype


class Merger:
    """A cut model in float32 with its adapters, ready to fold them in.

    Args:
        base: the cut model, a folder or hub id.
        adapters: the folder of the adapters.
        healing: the record of the adapters.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: the adapters are not this model's, or its weights are quantised.
    """

    def __init__(
        self, base: str, adapters: Path, healing: Healing, *, trust_remote_code: bool = False
    ) -> None:
        from peft import PeftModel

        self.base = base
        self.dtype = stored_plainly(base, trust_remote_code)
        plain: Any = self.dtype
        model, self.tokenizer = load_model(
            base, dtype=plain, device_map="cpu", trust_remote_code=trust_remote_code
        )
        if (identify(model).fingerprint, stored_digest(base)) != (
            healing.model.fingerprint, healing.weights,
        ):  # fmt: skip
            raise ModelError(
                f"the adapters in {adapters} were trained for {healing.model}, and {base} is "
                f"another model, or has other weights: name the one that they were trained for"
            )
        self._dtypes = {name: value.dtype for name, value in model.state_dict().items()}
        self._config_dtype = copy.copy(model.config.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft's, of transformers
                self._adapted = PeftModel.from_pretrained(model.float(), str(adapters)).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"cannot load the adapters in {adapters}: {error}") from error
        self._probe = self.tokenizer(PROBE, return_tensors="pt")["input_ids"]
        self.expected = self._logits(self._adapted)

    def merged(self) -> PreTrainedModel:
        """Fold the adapters in: float32 sums, each rounded once.

        Returns:
            The model in the dtype that it is stored in.
        """
        model: PreTrainedModel = self._adapted.merge_and_unload(safe_merge=True)
        for name, value in model.state_dict().items():
            owner, _, key = name.rpartition(".")
            if value.dtype != self._dtypes[name]:
                module = model.get_submodule(owner)
                getattr(module, key).data = value.to(self._dtypes[name])
        model.config.dtype = self._config_dtype
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(attribute, None)
        return model

    def check(self, folder: Path, trained: torch.Tensor | None = None) -> Merge:
        """Reload a merged checkpoint with stock transformers, and compare its logits.

        Args:
            folder: the checkpoint.
            trained: the logits on :data:`PROBE` of the adapters on the model as it was trained,
                (1, T, V) float32.

        Returns:
            The differences.

        Raises:
            ModelError: it differs by more than the tolerance for its dtype.
        """
        got = self._logits(load_weights(str(folder), torch.float32))
        scale = float(self.expected.norm())
        difference = float((got - self.expected).norm()) / scale
        if not difference <= TOLERANCE[self.dtype]:
            raise ModelError(
                f"the merged model is not the one with its adapters: its logits are off by "
                f"{difference:.2g} of their norm, more than {TOLERANCE[self.dtype]:.0e}"
            )
        return Merge(
            dtype=self.dtype,
            difference=difference,
            tolerance=TOLERANCE[self.dtype],
            max_difference=float((got - self.expected).abs().max()),
            trained_difference=(
                None if trained is None else float((got - trained.cpu()).norm()) / scale
            ),
        )

    @torch.inference_mode()
    def _logits(self, model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=self._probe, use_cache=False).logits
        return logits.float()


def trained_logits(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, recipe: Resolved, *, checkpoint: Path
) -> torch.Tensor:
    """Compute the logits on :data:`PROBE` of kept adapters on the model as it was trained.

    Args:
        adapted: peft's model.
        tokenizer: the tokenizer of the model.
        recipe: the settings of the training.
        checkpoint: the folder of the adapters.

    Returns:
        (1, T, V) float32.
    """
    adapted.load_adapter(str(checkpoint), "default")
    adapted.eval()
    device = input_device(find_layers(adapted.get_base_model()))
    input_ids = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)
    with torch.inference_mode(), computing(recipe, device):
        logits: torch.Tensor = adapted(input_ids=input_ids, use_cache=False).logits
    return logits.float()

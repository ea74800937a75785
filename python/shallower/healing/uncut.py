"""The models that a healing loads: the cut that it trains, and the uncut one that it came from."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.identity import identify
from ..models.quantised import keep_unpacked
from ..models.source import ModelSource
from ..processes import num_processes
from ..values.plan import Plan


def load_placed(
    path: str, dtype: Any, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model on the device of this process, ready for training.

    Args:
        path: a folder or hub id.
        dtype: dtype of the weights.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError, MissingExtraError: as :func:`shallower.load_model`.
    """
    several = num_processes() > 1 and torch.cuda.is_available()
    device_map: Any = {"": int(os.environ.get("LOCAL_RANK", "0"))} if several else None
    source = ModelSource(path, dtype, device_map, trust_remote_code=trust_remote_code)
    model, tokenizer = source.load()
    keep_unpacked(model)
    return model, tokenizer


class Uncut:
    """The uncut model of a healing, loaded when it is first asked for, and once.

    Args:
        name: a folder, hub id or GGUF file.
        plan: the plan of the cut, which must be of this model.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(self, name: str, plan: Plan, *, trust_remote_code: bool) -> None:
        self.name = name
        self._plan, self._trust_remote_code = plan, trust_remote_code
        self._dtype: str | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model, unless it is in memory in this dtype.

        Args:
            dtype: dtype of the weights.

        Returns:
            The model and its tokenizer.

        Raises:
            PlanError: the cut was not made out of it.
            ModelError, MissingExtraError: as :func:`shallower.load_model`.
        """
        if self._loaded is None or self._dtype != dtype:
            self.release()
            loaded = load_placed(self.name, dtype, trust_remote_code=self._trust_remote_code)
            self._plan.check_model(identify(loaded[0]))
            self._loaded, self._dtype = loaded, dtype
        return self._loaded

    def release(self) -> None:
        """Let go of the model."""
        self._loaded = self._dtype = None

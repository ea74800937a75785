"""Decoder: the facts about a causal language model, found out once and handed on."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TextsError
from ..values.counts import counted
from ..values.identity import ModelIdentity
from .architecture import (
    DecoderLayers,
    admitted_length,
    find_layers,
    input_device,
    learned_positions,
    text_config,
)
from .identity import identify, weights_hash
from .offload import is_on_disk


@dataclass(frozen=True)
class Decoder:
    """A model with its decoder layers, and what does not change when layers are dropped."""

    model: PreTrainedModel
    layers: DecoderLayers  # as they are at each access
    config: Any  # of the decoder
    device: torch.device  # of token ids
    positions: int | None  # number of learned positions; None for computed ones, as RoPE
    files: str | None = None  # a hash of the files that it was loaded from, if known

    @classmethod
    def of(cls, model: "nn.Module | Decoder", files: str | None = None) -> "Decoder":
        """Describe a model, loaded from ``files`` and as it was then; a decoder stays as it is."""
        if isinstance(model, Decoder):
            return model
        layers = find_layers(model)
        config = text_config(model)
        positions = learned_positions(layers.runner, config)
        device = input_device(layers)
        return cls(cast("PreTrainedModel", model), layers, config, device, positions, files)

    def check_length(
        self,
        num_tokens: int,
        what: str = "a text",
        way_out: str = "choose a max_length (--max-length; --context of windows) of at most that",
    ) -> None:
        """Refuse what is longer than the positions that the model has learned, by TextsError.

        Of a model that computes them a warning names what is longer than its config admits.
        """
        admitted = admitted_length(self.config)
        if admitted is None or num_tokens <= admitted:
            return
        if self.positions is not None:
            raise TextsError(
                f"{what} has {counted(num_tokens, 'token')}, and the model has learned {admitted} "
                f"positions: {way_out}"
            )
        warnings.warn(
            f"{what} is longer than the {admitted:,} tokens that the model's config admits "
            f"(max_position_embeddings), so that figures are not of the model as it is used: "
            f"{way_out}",
            stacklevel=2,
        )

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def is_streamed(self) -> bool:
        """Whether layers are streamed from disk, so that each should be read for many batches."""
        return any(map(is_on_disk, self.layers.modules))

    @cached_property
    def content(self) -> str | None:
        """A hash of all weights, by which work that is cut short or shared knows its model.

        Weights on disk are read for it where their files are not known. None of a model with hooks
        or code of the user.
        """
        return self.files or weights_hash(self.model, reads=True)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The identity that the model has at the first access; see :func:`identify`."""
        return identify(self.model, self.layers)

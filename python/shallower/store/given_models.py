"""The models of a study, in memory or by their sources, and what the store keeps of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..models.source import ModelSource, place_of
from .inputs import computed, made_by, model_inputs
from .store import Entry, Journal, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class InMemory:
    """A model in memory with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def place(self) -> Path | None:
        """The folder or file that it was loaded from, as far as it says."""
        return place_of(self.model)

    @property
    def is_streamed(self) -> bool:
        """Whether its layers are read from disk as they run."""
        from ..models.decoder import Decoder

        return Decoder.of(self.model).is_streamed

    def __str__(self) -> str:
        return str(self.model.name_or_path) or type(self.model).__name__

    def load(
        self, _progress: bool | None = None
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Give the model, and its tokenizer."""
        return self.model, self.tokenizer

    def count_layers(self) -> int:
        """Count the decoder layers."""
        from ..models.architecture import find_layers

        return len(find_layers(self.model))

    def count_experts(self) -> int:
        """Count the routed experts of a layer; ModelError if no layer has any."""
        from ..models.experts import find_experts

        return find_experts(self.model)[0].num_experts

    def inputs(self, cache: Store) -> dict[str, Any] | None:
        """All that the model's results depend on, for the cache; None where it is off."""
        if cache.folder is None:
            return None
        import torch

        from ..models.identity import weights_hash
        from ..models.structure import structure_of

        content, tokenizer = weights_hash(self.model), structure_of(self.tokenizer)
        if content is None or tokenizer is None:
            return None
        return {
            "weights": content,
            "name": str(self),  # which stands in the results
            "tokenizer": tokenizer,
            "device": str(self.model.device),
            "made_by": made_by(),
            **computed(),
            "threads": torch.get_num_threads(),
        }


@dataclass(frozen=True, slots=True)
class ModelStore:
    """The results of one model in the cache.

    Attributes:
        cache: where they lie.
        model: all that they depend on of the model; None keeps nothing.
        found: when each was measured that was found; filled by :meth:`get`.
    """

    cache: Store
    model: Mapping[str, Any] | None
    found: list[str]

    @classmethod
    def of(cls, source: ModelSource, cache: Store) -> "ModelStore":
        """The results of a model by its source."""
        return cls(cache, model_inputs(source, cache), [])

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Entry | None:
        """Look a result up, as :meth:`Store.find`, by what it depends on beside the model."""
        return self.cache.find(kind, self._all(inputs))

    def get(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Look a result up, and note when it was made."""
        entry = self.find(kind, inputs)
        if entry is None:
            return None
        self.found.append(entry.made)
        return entry.value

    def put(self, kind: str, inputs: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep a result, as :meth:`Store.put`."""
        self.cache.put(kind, self._all(inputs), value)

    def journal(self, kind: str, inputs: Mapping[str, Any]) -> Journal | None:
        """Open records of trials, as :meth:`Store.journal`."""
        return self.cache.journal(kind, self._all(inputs))

    def _all(self, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if self.model is None else {**self.model, "of": dict(inputs)}


def given_models(
    model: Any, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[ModelSource | InMemory, ...]:
    """The named models, or the one in memory.

    ModelError if it is none, lacks its tokenizer, or is one of several.
    """
    several = isinstance(model, Sequence) and not isinstance(model, str)
    places = [*model] if several else [model]
    if all(isinstance(place, ModelSource | str | Path) for place in places):
        return tuple(p if isinstance(p, ModelSource) else ModelSource(p) for p in places)
    if several:
        raise ModelError("several models are compared by their sources, not in memory")
    if not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is no model of transformers, and no source of one"
        )
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: give both, or a ModelSource")
    return (InMemory(model, tokenizer),)


def given_model(model: Any, tokenizer: "PreTrainedTokenizerBase | None") -> ModelSource | InMemory:
    """The one model that is given or named; raises ModelError as :func:`given_models`."""
    found = given_models(model, tokenizer)
    if len(found) != 1:
        raise ModelError(f"this is done on one model, and {len(found)} are given: name one (model)")
    return found[0]


def inputs_of_one(model: ModelSource | InMemory, cache: Store) -> dict[str, Any] | None:
    """All that the results of a model depend on; None if unknown, or the store is off."""
    return model_inputs(model, cache) if isinstance(model, ModelSource) else model.inputs(cache)

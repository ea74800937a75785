"""A model as its class builds it, without weights: what a cut on disk must know of any family."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InMemoryOnlyError, ModelError
from ..models.architecture import find_layers, layer_parts
from ..models.identity import model_name, shape_of, vectors_of
from ..models.loading import empty_model
from .tensor_names import edit_config, same_config
from .twin import shortened_config


class BuiltModel:
    """The model of a folder's config; see :class:`.tensor_names.Description`.

    Args:
        folder: with the config, and the code of the model if it has its own.
        trust_remote_code: run that code.

    Raises:
        ModelError: it is not a causal language model, or has not one list of decoder layers.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self._model = empty_model(folder, trust_remote_code)
        self.name = model_name(self._model)
        self.shape = shape_of(self._model)
        self._layers = find_layers(self._model)
        self.path = self._layers.path

    @property
    def kinds(self) -> Sequence[object]:
        """The names of every layer's parameters."""
        modules = self._layers.modules
        return [tuple(name for name, _ in layer.named_parameters()) for layer in modules]

    def vectors(self) -> Iterator[str]:
        """Give the names of the one-dimensional weights, in the order of the modules."""
        return (f"{path}.{name}" for path, name in vectors_of(self._model))

    def shortened(self, raw: Mapping[str, Any], survivors: Sequence[int]) -> dict[str, Any]:
        """Make the JSON of the config for the layers that stay.

        Args:
            raw: the JSON of the config.
            survivors: the indices of the layers that stay, ascending.

        Returns:
            The same with what changes, unknown keys included.

        Raises:
            InMemoryOnlyError: weights beside the layers would have to be cut as well.
            ModelError: a stock loader would not build the layers that stay from it.
        """
        if parts := layer_parts(self._model, self._layers):
            raise InMemoryOnlyError(
                f"{parts[0].name} of {type(self._model).__name__} holds a part for every layer, "
                f"which is cut in memory only: use prune, or load_model, drop_layers and save_model"
            )
        shortened = shortened_config(self._model, tuple(survivors))
        aliases = type(shortened.get_text_config(decoder=True)).attribute_map
        after = shortened.to_dict()
        edited = edit_config(raw, self._model.config.to_dict(), after, aliases=aliases)
        read_back = type(shortened).from_dict(copy.deepcopy(edited))
        if not same_config(read_back.to_dict(), after):
            raise ModelError(
                f"config.json of {type(self._model).__name__} cannot be edited so that it is read "
                f"back as the shortened config: load the model and use drop_layers and save_model"
            )
        return edited

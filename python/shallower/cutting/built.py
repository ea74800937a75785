"""Any model as its class builds it from a folder's config, without weights."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import InMemoryOnlyError, ModelError, why
from ..models.architecture import find_layers, layer_parts
from ..models.experts import count_keys, find_experts
from ..models.identity import model_name, shape_of, vectors_of
from ..models.loading import empty_model, loader_with_head
from ..values.plan import Plan
from .checkpoint_files import text_part
from .experts import compare_layers, mixture_of, with_fewer_experts
from .mixture import Mixture, StoredLayer, compare_stored
from .tensor_names import edit_config, find_prefix, same_config
from .twin import BUILDING_ERRORS, shortened_config


class BuiltModel:
    """The model of a folder's config, as its class builds it."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self._model = empty_model(folder, trust_remote_code)
        self.name = model_name(self._model)
        self.loader = loader_with_head(self._model.config).__name__
        self.shape = shape_of(self._model)
        self._layers = find_layers(self._model)
        self.path = self._layers.path

    @property
    def kinds(self) -> Sequence[object]:
        """The names of every layer's parameters."""
        modules = self._layers.modules
        return [tuple(name for name, _ in layer.named_parameters()) for layer in modules]

    def vectors(self) -> Iterator[tuple[str, str]]:
        """The names of the one-dimensional weights, in the order of the modules.

        Each in the model, and as a stock loader stores it.
        """
        tensors = self._model.state_dict()
        stored = {id(tensor): name for name, tensor in _as_saved(self._model, tensors).items()}
        for path, name in vectors_of(self._model):
            full = f"{path}.{name}"
            yield full, stored.get(id(tensors.get(full)), full)

    def mixture(self) -> Mixture:
        """Its routed experts; ModelError if it has none."""
        return mixture_of(self._model, find_experts(self._model, self._layers))

    def stored_experts(self, plan: Plan) -> Mapping[int, StoredLayer]:
        """Of layers with routed experts, how a stock loader stores them.

        By the names and shapes that transformers would save of the model, and of one with fewer
        experts; or of their modules, whose names it loads as well.
        """
        if plan.experts is None:
            return {}
        twin = with_fewer_experts(self._model, plan.experts)
        compare_layers(self._model, self._layers, twin, dropped=plan.experts)
        whole, fewer = (_stored(model, self.path) for model in (self._model, twin))
        return {
            layer: compare_stored(whole[layer], fewer[layer]) for layer in plan.experts.by_layer
        }

    def shortened(self, raw: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """The JSON of the config for what stays, unknown keys included."""
        if plan.blocks and (parts := layer_parts(self._model, self._layers)):
            raise InMemoryOnlyError(
                f"{parts[0].name} of {type(self._model).__name__} holds a part for every layer, "
                f"which is cut in memory only: use prune, or load_model, drop_layers and save_model"
            )
        shortened = copy.deepcopy(self._model.config)
        if plan.blocks:
            shortened = shortened_config(self._model, plan.survivors)
        decoder = shortened.get_text_config(decoder=True)
        if plan.experts is not None:
            for config, name in count_keys(decoder, plan.experts.num_experts):
                setattr(config, name, plan.experts.num_kept)
        before, after = self._model.config.to_dict(), shortened.to_dict()
        part = text_part(raw, before["model_type"])  # what is beside it stays
        edited = edit_config(
            raw if part is None else raw[part], before, after, aliases=type(decoder).attribute_map
        )
        read_back = type(shortened).from_dict(
            json.loads(json.dumps(edited), object_hook=_special_float)
        )
        if not same_config(read_back.to_dict(), after):
            raise ModelError(
                f"config.json of {type(self._model).__name__} cannot be edited so that it is read "
                f"back as the shortened config: load the model and use drop_layers and save_model",
                see="families",
            )
        return edited if part is None else {**raw, part: edited}


def _special_float(value: dict[str, Any]) -> Any:
    """Infinity and NaN as transformers writes them in JSON."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def as_saved(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Tensors of a model by the names, and in the pieces, that transformers saves; ModelError."""
    try:
        return revert_weight_conversion(model, dict(tensors))
    except (*BUILDING_ERRORS, NotImplementedError) as error:
        kind = type(model).__name__
        raise ModelError(f"transformers cannot name what {kind} stores: {why(error)}") from error


def _as_saved(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The same of all tensors, without values; by their own names where there are no others."""
    try:
        return as_saved(model, tensors)
    except ModelError:
        return tensors


def _stored(model: PreTrainedModel, path: str) -> list[dict[str, list[int]]]:
    """By layer the names and shapes of tensors, as transformers saves and as it names them."""
    layers: list[dict[str, list[int]]] = [{} for _ in find_layers(model).modules]
    named = model.state_dict()
    for tensors in (_as_saved(model, named), named):
        prefix = find_prefix(tensors, path, len(layers))
        for name, tensor in tensors.items():
            number, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdecimal():
                layers[int(number)][rest] = list(tensor.shape)
    return layers

"""Layers that wait in a GGUF file, each weight made as transformers makes it, when it is needed.

Transformers loads all else. It knows two ways from the tensors of a file to the weights of a model:
processors of tensors for most architectures, and conversions for the newer ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.reader import load_gguf_state_dict
from transformers.integrations.gguf.utils import add_gguf_load_ops, get_gguf_conversion_mapping
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from .architecture import find_layers


class GgufWeights(Mapping[str, torch.Tensor]):
    """The weights of the layers of a model that wait in a GGUF file, made anew at every look.

    Attributes:
        index: where the tensors of each weight lie.
        state_dict: weights that were changed, in front of the file.
    """

    def __init__(self) -> None:
        self.index: dict[str, dict[str, list[tuple[str, int, int]]]] = {}
        self.state_dict: dict[str, torch.Tensor] = {}
        self._rules: _Processed | _Converted

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.index:
            raise KeyError(name)
        return self.state_dict[name] if name in self.state_dict else self._rules.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def take_layers(self, quantizer: Any, file: str, model: PreTrainedModel) -> dict[str, Any]:
        """Take over the weights of a model's layers that a file holds; give all else that it holds.

        What is given is as transformers loads it.
        """
        import gguf

        self._rules = (_Converted if quantizer.supported else _Processed)(quantizer, file, model)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        path, gone = f"{find_layers(model).path}.", set()
        for name, weight in model.named_parameters():
            sources = self._rules.sources.get(name, []) if name.startswith(path) else []
            found = [tensors[source] for source in sources]
            if sum(int(tensor.n_elements) for tensor in found) == weight.numel():
                begins = [(int(t.data_offset), int(t.n_bytes)) for t in found]
                self.index[name] = {"places": [(file, at, at + size) for at, size in begins]}
                gone |= {*sources}
                setattr(weight, "_is_hf_initialized", True)  # noqa: B010
        return self._rules.state_dict(name for name in tensors if name not in gone)


@contextmanager
def layers_in_file() -> Iterator[GgufWeights]:
    """Let transformers load a GGUF file without its layers, whose weights stay on the meta device.

    Within :func:`faster_gguf`, which lets in one thread at a time.
    """
    weights, stock, handles = GgufWeights(), GgufHfQuantizer.get_state_dict, []

    def get_state_dict(quantizer: Any, file: str, model: PreTrainedModel) -> dict[str, Any]:
        found = weights.take_layers(quantizer, file, model)
        handles.append(model.register_state_dict_post_hook(drop))  # else they count as missing
        return found

    def drop(_model: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        for name in weights:
            state.pop(name, None)

    setattr(GgufHfQuantizer, "get_state_dict", get_state_dict)  # noqa: B010
    try:
        yield weights
    finally:
        setattr(GgufHfQuantizer, "get_state_dict", stock)  # noqa: B010
        for handle in handles:
            handle.remove()


class _Processed:
    """Weights by transformers' processors of tensors, as ``load_gguf_checkpoint`` makes them."""

    def __init__(self, quantizer: Any, file: str, model: PreTrainedModel) -> None:
        import gguf

        reader = gguf.GGUFReader(file)
        architecture = read_field(reader, "general.architecture")[0]
        config = load_gguf_checkpoint(file)["config"]
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        self._names = get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize, self._dtype = gguf.dequantize, quantizer.dtype
        self.sources: dict[str, list[str]] = defaultdict(list)
        for name in self._tensors:
            # Experts are known without what their tensor's name ends on.
            target = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if target is not None:
                self.sources[target].append(name)
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            self._dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)

    def make(self, target: str) -> torch.Tensor:
        return self.state_dict(self.sources[target])[target]

    def state_dict(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for name in names:
            tensor = self._tensors[name]
            done = self._processor.process(
                weights=self._dequantize(tensor.data, tensor.tensor_type),
                name=name,
                tensor_key_mapping=self._names,
                parsed_parameters=parsed,
            )
            if done.name in self._names:
                own = torch.from_numpy(np.copy(done.weights))  # in its order: products need it
                parsed["tensors"][self._names[done.name]] = own.to(self._dtype)
        return parsed["tensors"]


class _Converted:
    """Weights by transformers' conversions, as ``convert_and_load_state_dict_in_model`` does it."""

    def __init__(self, quantizer: Any, _file: str, model: PreTrainedModel) -> None:
        header = quantizer.header
        mapping = add_gguf_load_ops(
            get_gguf_conversion_mapping(header.architecture, model.config),
            quantizer.quantized,
            header,
            quantizer.dtype,
        )
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: one for one in converters for pattern in one.source_patterns}
        self._config, self._tensors = model.config, load_gguf_state_dict(header)
        self._patterns: dict[str, str] = {}
        self.sources: dict[str, list[str]] = defaultdict(list)
        empty, prefix = model.state_dict(), model.base_model_prefix
        for name in self._tensors:
            target, pattern = rename_source_key(name, renamings, converters, prefix, empty)
            if pattern is not None:
                self.sources[target].append(name)
                self._patterns[name] = pattern

    def make(self, target: str) -> torch.Tensor:
        converter: Any = None
        for name in self.sources[target]:
            converter = self._converters[self._patterns[name]]
            read = self._tensors[name]
            converter.add_tensor(target, name, self._patterns[name], lambda read=read: read[...])
        made = converter.convert(target, config=self._config)[target]
        return made[0] if isinstance(made, list) else made

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self._tensors[name] for name in names}

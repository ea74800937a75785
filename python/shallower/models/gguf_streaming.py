"""Layers streamed from a GGUF file: each weight is made as by transformers, when it is needed.

Transformers loads all else, by processors of tensors or, for newer architectures, conversions.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
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

from .architecture import swapped
from .stored_layers import Converted, LayerWeights, Place


@contextmanager
def layers_in_file() -> Iterator[LayerWeights]:
    """Let transformers load a GGUF file without its layers, whose weights stay on the meta device.

    Within :func:`faster_gguf`, which lets in one thread at a time.
    """
    weights = LayerWeights()

    def get_state_dict(quantizer: Any, file: str, model: PreTrainedModel) -> dict[str, Any]:
        rules = (_ConvertedFromGguf if quantizer.supported else _Processed)(quantizer, file, model)
        taken = weights.take(model, rules)
        hooks.callback(model.register_state_dict_post_hook(drop).remove)  # else they are missing
        return rules.state_dict(name for name in rules.tensors if name not in taken)

    def drop(_model: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        for name in weights:
            state.pop(name, None)

    with swapped(GgufHfQuantizer, get_state_dict=get_state_dict), ExitStack() as hooks:
        yield weights


class _InGguf:
    """The tensors of a GGUF file by name, and by weight those that it is made of (``sources``)."""

    sources: dict[str, list[str]]

    def __init__(self, file: str) -> None:
        import gguf

        self._file = file
        self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def fits(self, target: str, weight: torch.Tensor) -> bool:
        """As ``Rules``."""
        found = (int(self.tensors[name].n_elements) for name in self.sources[target])
        return sum(found) == weight.numel()

    def place(self, name: str) -> Place:
        """As ``Rules``."""
        tensor = self.tensors[name]
        return self._file, int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)


class _Processed(_InGguf):
    """Weights by transformers' processors of tensors, as ``load_gguf_checkpoint`` makes them."""

    def __init__(self, quantizer: Any, file: str, model: PreTrainedModel) -> None:
        import gguf

        super().__init__(file)
        reader = gguf.GGUFReader(file)
        architecture = read_field(reader, "general.architecture")[0]
        config = load_gguf_checkpoint(file)["config"]
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        self._names = get_gguf_hf_weights_map(model, self._processor)
        self._dequantize, self._dtype = gguf.dequantize, quantizer.dtype
        self.sources = defaultdict(list)
        for name in self.tensors:
            # Experts are known without what their tensor's name ends on.
            target = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if target is not None:
                self.sources[target].append(name)
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            self._dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)

    def make(self, target: str) -> torch.Tensor:
        """As ``Rules``."""
        return self.state_dict(self.sources[target])[target]

    def state_dict(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Make the weights of some tensors."""
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for name in names:
            tensor = self.tensors[name]
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


class _ConvertedFromGguf(_InGguf, Converted):
    """Weights by transformers' conversions."""

    def __init__(self, quantizer: Any, file: str, model: PreTrainedModel) -> None:
        _InGguf.__init__(self, file)
        header = quantizer.header
        mapping = add_gguf_load_ops(
            get_gguf_conversion_mapping(header.architecture, model.config),
            quantizer.quantized,
            header,
            quantizer.dtype,
        )
        self._read = load_gguf_state_dict(header)
        Converted.__init__(self, self._read, mapping, model)

    def make(self, target: str) -> torch.Tensor:
        """As ``Rules``."""
        return self.convert(target, lambda name: self._read[name][...])[target]

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """The tensors of some names, unread."""
        return {name: self._read[name] for name in names}

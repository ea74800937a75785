"""The names of other packages that nobody promises to keep, and what each is used for.

Some fail silently when they move: an attribute that nobody reads any more is set without a word.
``test_private_names.py`` looks every one up in the installed packages, and finds
uses that are not listed.
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A name of another package that is not part of its documented interface.

    Attributes:
        module: the module that defines it.
        name: its dotted name there; of an attribute of instances, behind their class.
        used_for: what would go wrong without it.
    """

    module: str
    name: str
    used_for: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


NAMES = {
    "transformers.core_model_loading": {
        "revert_weight_conversion._weight_conversions":
            "set to None on 4-bit models, whose loading transformers cannot run backwards to "
            "save them; where adapters are merged on disk, to the ways that weights may be "
            "stored",
        "rename_source_key": "says which tensors of a GGUF file become which weights",
        "WeightConverter.add_tensor":
            "converts the tensors of a GGUF file when their layer is needed",
        "WeightConverter.convert": "converts the tensors of a GGUF file when their layer is needed",
    },
    "transformers.modeling_utils": {
        "PreTrainedModel._load_pretrained_model":
            "replaced while a model is loaded to be streamed, of whose layers no tensor is read "
            "then",
        "PreTrainedModel._tied_weights_keys":
            "shared weights are named by their layers' numbers, which a cut changes",
        "PreTrainedModel.all_tied_weights_keys":
            "shared weights are named by their layers' numbers, which a cut changes",
        "PreTrainedModel.hf_device_map":
            "layers that are spread over devices get their new numbers",
        "PreTrainedModel.hf_quantizer":
            "removed from dequantised GGUF models, so that they are saved as plain ones",
        "PreTrainedModel._initialize_weights._is_hf_initialized":
            "layers that wait in a GGUF file are not initialised",
        "PreTrainedModel._skip_keys_device_placement":
            "layers that wait in a GGUF file are given what transformers gives those on disk",
    },
    "transformers.quantizers.base": {
        "HfQuantizer.quantization_method":
            "removed from dequantised GGUF models, so that they are saved as plain ones",
        "HfQuantizer.is_quantized":
            "removed from dequantised GGUF models, so that they are saved as plain ones",
    },
    "transformers.quantizers.quantizer_gguf": {
        "GgufHfQuantizer.packed_modules": "models whose weights are still GGUF blocks are refused",
        "GgufHfQuantizer.get_state_dict":
            "replaced while a GGUF file is loaded whose layers are to wait in it",
        "GgufHfQuantizer.supported": "tells the newer architectures of GGUF files",
        "GgufHfQuantizer.quantized": "which tensors of a GGUF file are blocks",
    },
    "transformers.quantizers.quantizer_bnb_4bit": {
        "Bnb4BitHfQuantizer.is_loaded_in_4bit": "tells the dtype nf4",
    },
    "transformers.quantizers.quantizer_bnb_8bit": {
        "Bnb8BitHfQuantizer.is_loaded_in_8bit": "tells the dtype int8",
    },
    "transformers.configuration_utils": {
        "PreTrainedConfig._name_or_path":
            "removed from a cut's config.json if it is a path: transformers 4 wrote it there",
        "PreTrainedConfig._heterogeneity_spec": "settings of single layers move with them",
        "PreTrainedConfig._attn_implementation":
            "tells models apart whose attention is computed otherwise, for the cache",
        "PreTrainedConfig._experts_implementation": "experts are rehearsed without loops over data",
    },
    "transformers.integrations.heterogeneity.configuration_utils": {
        "_HeterogeneitySpec.per_layer_overrides": "settings of single layers move with them",
    },
    "transformers.models.rwkv.modeling_rwkv": {
        "RwkvModel._rescale_layers":
            "weights that RWKV divides by their layer's number are put back before a cut",
        "RwkvModel.layers_are_rescaled":
            "weights that RWKV divides by their layer's number are put back before a cut",
    },
    "transformers.utils.loading_report": {
        "LOAD REPORT": "the report on the weights is held back if the model is refused",
    },
    "transformers.utils.hub": {
        "cached_files._raise_exceptions_for_missing_entries":
            "a hub model without a plan is told from one that cannot be reached",
    },
    "transformers.modeling_gguf_pytorch_utils": {
        "load_gguf_checkpoint.GGUFReader":
            "taken from gguf at every call, so that a faster reader can stand in",
        "load_gguf_checkpoint.dequantize":
            "taken from gguf at every call, so that a faster one can stand in",
        "get_gguf_hf_weights_map.get_tensor_name_map":
            "taken from gguf at every call, so that the table is made once",
        "tqdm": "its bar of GGUF tensors has no switch, and is left out",
        "TENSOR_PROCESSORS":
            "makes the weights of a layer that waits in a GGUF file, for most architectures",
        "TensorProcessor.process":
            "makes the weights of a layer that waits in a GGUF file, for most architectures",
        "get_gguf_hf_weights_map": "says which tensors of a GGUF file become which weights",
    },
    "transformers.integrations.gguf.utils": {
        "add_gguf_load_ops":
            "makes the weights of a layer that waits in a GGUF file, for newer architectures",
        "get_gguf_conversion_mapping":
            "makes the weights of a layer that waits in a GGUF file, for newer architectures",
    },
    "transformers.integrations.gguf.reader": {
        "load_gguf_state_dict":
            "reads a tensor of a GGUF file when its layer is needed, for newer architectures",
    },
    "transformers.trainer": {
        "Trainer.compute_loss_context_manager":
            "overridden, so that training computes in bfloat16 with float32 adapters",
    },
    "transformers.integrations.peft": {
        "PeftAdapterMixin._hf_peft_config_loaded":
            "removed from merged models, so that they are saved as plain ones",
    },
    "bitsandbytes.nn.modules": {
        "Linear4bit.support_avx512bf16_for_cpu":
            "set to False, so that 4-bit weights are not repacked before they are trained on",
        "Linear4bit.packing_format_for_cpu":
            "tells 4-bit weights that were repacked, and their scales rounded",
        "Params4bit.quant_state": "the scales of a 4-bit weight are kept as they were loaded",
    },
    "bitsandbytes.autograd._functions": {
        "logger": "silenced: a line a layer and forward about int8's arithmetic",
    },
    "bitsandbytes.backends.cpu.ops": {
        "logger": "silenced: advice to get a kernel from a hub",
    },
    "peft.tuners.lora.layer": {
        "LoraLayer.cast_input_dtype_enabled": "set to False: autocast casts, to bfloat16",
    },
    "peft.peft_model": {
        "PeftModel.peft_config":
            "adapters name their model as it will be found; removed from merged models",
    },
    "accelerate.utils.modeling": {
        "align_module_device": "weights that are offloaded are read for the fingerprint",
    },
    "accelerate.hooks": {
        "add_hook_to_module._hf_hook":
            "weights that are offloaded are changed where they are stored",
    },
    "torch.nn": {
        "Module._state_dict_hooks": "4-bit models that cannot be saved exactly are refused",
        "Module._state_dict_pre_hooks": "no forward reads it, so it is not hashed",
        "Module._load_state_dict_pre_hooks": "no forward reads it, so it is not hashed",
        "Module._load_state_dict_post_hooks": "no forward reads it, so it is not hashed",
        "Module._parameters":
            "empty weights are replaced by fake ones, on which a step is rehearsed",
        "Module._buffers": "empty buffers are replaced by fake ones, on which a step is rehearsed",
    },
    "torch.nn.modules.module": {
        "_global_forward_hooks": "models are not recalled while they are set",
        "_global_forward_pre_hooks": "models are not recalled while they are set",
    },
    "torch._subclasses.fake_tensor": {
        "FakeTensorMode": "a step is rehearsed on tensors without memory",
    },
    "torch": {
        "ops.aten._grouped_mm":
            "rehearsed in float32 too, which fake tensors refuse before torch 2.15",
        "UntypedStorage._cdata": "tells the storages of a rehearsal apart",
        "ops.aten._local_scalar_dense":
            "fake tensors have no value to read, so that a rehearsal gives one",
    },
    "torch.utils.deterministic": {
        "fill_uninitialized_memory": "off while training: it costs a twentieth of the time",
    },
    "gguf.gguf_reader": {
        "GGUFReader._get_field_parts":
            "overridden, so that no array is made for every token of a vocabulary",
        "GGUFReader._get": "reads the numbers of a metadata array at once",
        "GGUFReader.data": "overridden, so that the mapped file is sliced as a plain array",
        "GGUFReader.gguf_scalar_to_np": "the dtypes of metadata arrays",
        "GGUFReader.byte_order": "files of the other byte order are read by gguf alone",
    },
}  # fmt: skip
"""By module."""

PRIVATE_NAMES = [
    PrivateName(module, name, used_for)
    for module, names in NAMES.items()
    for name, used_for in names.items()
]
"""All of them."""

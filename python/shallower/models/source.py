"""ModelSource: a model's place and the way to load it, as one value; torch is imported late."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from .dtypes import (
    STREAM,
    DeviceMap,
    Dtype,
    check_dtype,
    check_stored_plain,
    check_streamed,
    choose_device_map,
    choose_dtype,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def place_of(model: "PreTrainedModel") -> Path | None:
    """The folder or file that a model in memory was loaded from, as far as it says."""
    named, of_config = str(model.name_or_path), str(model.config.name_or_path)
    if of_config.endswith(".gguf"):  # whose folder is not always known
        return None if named.endswith(".gguf") else Path(named, of_config)
    return Path(named) if named else None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A place that a model is loaded from, and the options of loading it.

    Attributes:
        path: a local folder, a hub id, or a ``.gguf`` file.
        dtype: of the weights. ``auto`` is bfloat16 on CUDA and on CPUs that multiply it, and
            float32 elsewhere; ``nf4`` and ``int8`` are quantised by bitsandbytes.
        device_map: as transformers takes it. ``None`` is every GPU where there is CUDA, and the
            CPU elsewhere.
        gguf_file: a GGUF file in the folder or hub repository.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: the path is empty, there is no such dtype, or weights that are streamed from
            disk are to be quantised.
    """

    path: str | Path
    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    gguf_file: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not str(self.path).strip():
            raise ModelError("the model has an empty name: name a folder, a hub id or a .gguf file")
        check_dtype(self.dtype)
        check_streamed(str(self), self.dtype, self.device_map)

    def __str__(self) -> str:
        return "/".join(filter(None, (str(self.path), self.gguf_file)))

    @property
    def place(self) -> Path:
        """The folder or file that is read; there is none of a hub id."""
        return Path(self.path, self.gguf_file or "")

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, by its name."""
        return self.place.suffix == ".gguf"

    @property
    def weight_files(self) -> list[Path]:
        """The files that its layers are read from as they run; none of a hub id."""
        place = self.place.expanduser()
        return [place] if place.is_file() else sorted(place.glob("*.safetensors"))

    @property
    def stored_bytes(self) -> int:
        """The bytes of those files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def is_streamed(self) -> bool:
        """Whether its layers are read from disk as they run."""
        return self.device_map == STREAM

    def resolved(self) -> "ModelSource":
        """The same source with its dtype and device map decided for this machine."""
        device_map = choose_device_map(self.device_map)
        dtype = choose_dtype(device_map)[0] if self.dtype == "auto" else self.dtype
        return replace(self, dtype=dtype, device_map=device_map)

    def load(
        self, progress: bool | None = None
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and its tokenizer, as :func:`shallower.load_model`."""
        from .loading import load_model

        return load_model(
            self.path,
            self.dtype,
            self.device_map,
            gguf_file=self.gguf_file,
            trust_remote_code=self.trust_remote_code,
            progress=progress,
        )

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the model's tokenizer, and nothing else.

        Raises:
            ModelError: as :meth:`load`.
        """
        from .loading import load_tokenizer

        return load_tokenizer(self.path, self.gguf_file, self.trust_remote_code)

    def check(self) -> None:
        """Refuse, without torch, what is not there or cut off: ModelError, as :meth:`load`."""
        from .place import check_place, check_weights

        check_place(self.path, self.gguf_file)
        if self.place.expanduser().is_dir():
            check_weights(self.place.expanduser())

    def read_config(self) -> "PretrainedConfig":
        """Read the model's config, and nothing else.

        Raises:
            ModelError: as :meth:`load`; it is stored in a way that cannot be loaded here, or of
                a model to be streamed, that is quantised.
        """
        from .loading import read_config
        from .quantised import check_stored

        config = read_config(self.path, self.gguf_file, self.trust_remote_code)
        check_stored(str(self), config, self.dtype)
        if self.is_streamed:
            check_stored_plain(str(self), config)
        return config

    def count_layers(self) -> int:
        """Count the decoder layers by the model's config alone.

        Raises:
            ModelError: as :meth:`load`; or the config does not say how many there are.
        """
        from .place import check_place

        count = check_place(self.path, self.gguf_file)
        if count is None:
            from .loading import layers_of

            count = layers_of(self.read_config())
        if count is None:
            raise ModelError(f"the config of {self.path} does not say how many layers it has")
        return count

    def count_experts(self) -> int:
        """Count the routed experts of a layer by the model's config alone.

        Raises:
            ModelError: as :meth:`load`; or the config counts none.
        """
        from .experts import counted_experts

        return counted_experts(self.read_config())

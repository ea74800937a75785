"""The arguments of a cut but its layers, and what follows from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..models.dtypes import STREAM, DeviceMap, Dtype, plain_dtype
from ..models.source import ModelSource
from ..progress import BytesProgress, track
from ..texts.hub import raise_fetch_error
from ..values.identity import title_of
from ..values.plan import Plan
from .checkpoint_files import is_checkpoint, stored_dtype
from .gguf import read_metadata
from .plans import made_for
from .source import UncutModel, find_source, hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of :func:`prune` but the layers and experts."""

    source: str  # the resolved folder
    named: str  # the source in the caller's words, for errors
    out: Path
    overwrite: bool = False
    dtype: Dtype | None = None
    max_shard_size: int | str | None = None
    device_map: DeviceMap = None
    gguf_file: str | None = None
    as_gguf: bool = False
    trust_remote_code: bool = False
    verify: bool = False
    text_only: bool = False
    show: bool | None = None  # the progress of planning

    @property
    def on_disk(self) -> bool:
        """True if the weights stay as they are stored in a folder of safetensors."""
        if self.text_only or self.gguf_file is not None or not is_checkpoint(self.source):
            return False
        return self.dtype is None or self.dtype == stored_dtype(self.source)

    @property
    def to_gguf(self) -> bool:
        """True if a GGUF file is written."""
        return self.as_gguf or self.out.suffix == ".gguf"

    @property
    def gguf_path(self) -> Path:
        """The local GGUF file, as :func:`local_gguf`."""
        return local_gguf(self.source, self.gguf_file, named=self.named)

    @property
    def known(self) -> UncutModel:
        """The source as the card describes it."""
        metadata = {}
        if self.gguf_file is not None or self.source.endswith(".gguf"):
            metadata = read_metadata(self.gguf_path)
        return find_source(self.source, gguf_file=self.gguf_file, metadata=metadata, from_hub=True)

    def count_layers(self) -> int:
        """Count the decoder layers, by the config alone."""
        return self._loaded_from(as_stored=True).count_layers()

    def count_experts(self) -> int:
        """Count the routed experts of a layer, by the config alone; ModelError if it has none."""
        return self._loaded_from(as_stored=True).count_experts()

    def load(
        self, progress: BytesProgress | bool | None, *, as_stored: bool = False
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the whole model; ``as_stored``: in the dtype of the folder, not in ``dtype``."""
        show = False if callable(progress) else progress
        if self.to_gguf:
            return ModelSource(self.gguf_path, "float32").load(show)
        return self._loaded_from(as_stored=as_stored).load(show)

    def load_alone(self, progress: BytesProgress | bool | None) -> "PreTrainedModel":
        """Load the whole model as it is stored in a folder, which may lack head and tokenizer."""
        if self.device_map == STREAM:
            return self.load(progress, as_stored=True)[0]
        from ..models.loading import load_weights, read_config
        from .saving import kind_of

        trusted = {"trust_remote_code": True} if self.trust_remote_code else {}
        show = False if callable(progress) else progress
        with track(f"load {title_of(self.source)}", show=show):
            return load_weights(
                self.source,
                plain_dtype(self.dtype or self.stored_plainly),
                self.device_map,
                options=trusted,
                kind=kind_of(read_config(self.source, trust_remote_code=self.trust_remote_code)),
            )

    def cut_in_memory(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        plan: Plan,
        *,
        check: Callable[[Path], None],
    ) -> Plan:
        """Save the cut of a whole model; ``check`` gets the folder before it takes its place."""
        from ..models.identity import identify
        from .in_model import without_layers
        from .saving import save_cut

        plan = made_for(plan, identify(model))
        with without_layers(model, plan):
            save_cut(
                model,
                tokenizer,
                self.out,
                plan=plan,
                source=self.known,
                as_loaded=True,
                text_only=self.text_only,
                overwrite=self.overwrite,
                beside=check,
            )
        return plan

    def saved_bytes(self, plan: Plan) -> int:
        """Count the bytes of a cut that is made in memory."""
        from ..memory.weights import left_bytes

        return left_bytes(self._loaded_from(as_stored=False), plan.dropped)

    def _loaded_from(self, *, as_stored: bool) -> ModelSource:
        dtype = None if as_stored else self.dtype
        return ModelSource(
            self.source,
            self.stored_plainly if dtype is None else dtype,
            self.device_map,
            self.gguf_file,
            self.trust_remote_code,
        )

    @property
    def stored_plainly(self) -> Dtype:
        """The plain dtype of a folder's weights, else bfloat16; of other sources ``dtype``."""
        plain: tuple[Dtype, ...] = ("float32", "float16")
        is_stored = self.gguf_file is None and is_checkpoint(self.source)
        stored = stored_dtype(self.source) if is_stored else self.dtype
        return next((dtype for dtype in plain if dtype == stored), "bfloat16")


def gguf_of(model: object) -> Path | None:
    """The local GGUF file of a source, as :func:`local_gguf`; None of any other model."""
    if not isinstance(model, ModelSource) or not model.is_gguf:
        return None
    return local_gguf(str(model.path), model.gguf_file, named=str(model))


def local_gguf(source: str, gguf_file: str | None, *, named: str) -> Path:
    """The local GGUF file, fetched from a hub repository; ModelError if there is none."""
    path = Path(source).expanduser()
    if gguf_file is not None and path.suffix != ".gguf":
        if not path.is_dir() and hub_id(source):
            return _fetch(source, gguf_file)
        path /= gguf_file
    if path.suffix != ".gguf":
        raise ModelError(
            f"{named} is not a .gguf file, and only such a one is cut into one: name a local file, "
            f"or a folder as out (--out)",
            see="gguf",
        )
    return path


def _fetch(repository: str, name: str) -> Path:
    """A file of a hub repository, in the hub's cache; ModelError if it cannot be fetched."""
    from huggingface_hub import hf_hub_download

    with raise_fetch_error(repository, name):
        return Path(hf_hub_download(repository, name))

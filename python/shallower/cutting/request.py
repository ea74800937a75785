"""A request for a cut: where the model is, how it is loaded, and what a card says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..models.dtypes import DeviceMap, Dtype
from ..models.source import ModelSource
from ..values.plan import Plan
from .checkpoint_files import is_checkpoint, stored_dtype
from .gguf import read_metadata
from .plans import made_for
from .source import Source, find_source, hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Request:
    """All that :func:`shallower.prune` is asked for beside the layers; see there.

    ``named`` is the source in the caller's words, for errors; ``source`` its resolved folder.
    """

    source: str
    named: str
    out: Path
    overwrite: bool
    dtype: Dtype | None
    max_shard_size: int | str | None
    device_map: DeviceMap
    gguf_file: str | None
    as_gguf: bool
    trust_remote_code: bool
    verify: bool

    @property
    def on_disk(self) -> bool:
        """True if the weights stay as they are stored in a folder of safetensors."""
        if self.gguf_file is not None or not is_checkpoint(self.source):
            return False
        return self.dtype is None or self.dtype == stored_dtype(self.source)

    @property
    def to_gguf(self) -> bool:
        """True if a GGUF file is written."""
        return self.as_gguf or self.out.suffix == ".gguf"

    @property
    def gguf_path(self) -> Path:
        """The local GGUF file; one of a hub repository is fetched.

        Raises:
            ModelError: it is not there, or ``source`` is not a GGUF file.
        """
        path = Path(self.source).expanduser()
        if self.gguf_file is not None and path.suffix != ".gguf":
            if not path.is_dir() and hub_id(self.source):
                return _fetch(self.source, self.gguf_file)
            path /= self.gguf_file
        if path.suffix != ".gguf":
            raise ModelError(
                f"{self.named} is not a .gguf file, and only such a one is cut into one: "
                f"name a local file, or a folder as out (--out)"
            )
        return path

    @property
    def known(self) -> Source:
        """The source as the card tells of it."""
        metadata = {}
        if self.gguf_file is not None or self.source.endswith(".gguf"):
            metadata = read_metadata(self.gguf_path)
        return find_source(self.source, gguf_file=self.gguf_file, metadata=metadata, from_hub=True)

    def count_layers(self) -> int:
        """Count the decoder layers, by the config alone."""
        return self._loaded_from(as_stored=True).count_layers()

    def load(self, *, as_stored: bool = False) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the whole model and its tokenizer.

        Args:
            as_stored: in the dtype of the folder, quantised or not, whatever is asked for.
        """
        if self.to_gguf:
            return ModelSource(self.gguf_path, "float32").load()
        return self._loaded_from(as_stored=as_stored).load()

    def cut_in_memory(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", plan: Plan
    ) -> Plan:
        """Save the model without its layers.

        Args:
            model: the whole model.
            tokenizer: its tokenizer.
            plan: what goes.

        Returns:
            The plan, with the identity of the model.
        """
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
                overwrite=self.overwrite,
            )
        return plan

    def _loaded_from(self, *, as_stored: bool) -> ModelSource:
        dtype = None if as_stored else self.dtype
        return ModelSource(
            self.source,
            self._stored_plainly if dtype is None else dtype,
            self.device_map,
            self.gguf_file,
            self.trust_remote_code,
        )

    @property
    def _stored_plainly(self) -> Dtype:
        """The plain dtype of the stored weights; bfloat16 where it is not told or not plain."""
        if self.gguf_file is not None or not is_checkpoint(self.source):
            return "bfloat16"
        plain: tuple[Dtype, ...] = ("float32", "float16")
        stored = stored_dtype(self.source)
        return next((dtype for dtype in plain if dtype == stored), "bfloat16")


def _fetch(repository: str, name: str) -> Path:
    """A file of a hub repository, in the hub's cache.

    Raises:
        ModelError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        lines = " ".join(str(error).split())
        raise ModelError(f"cannot fetch {name} of {repository}: {lines}") from error

"""Adapters folded into the plain weights of their model, and the check of the result.

Weight by weight from file to file: 70 billion parameters are merged in 2 GB of memory. A sum has
the name, dtype and shape of its weight, so headers and index stay.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from ..cutting.checkpoint_files import INDEX_FILE, is_checkpoint
from ..cutting.rewriting import Read, StoredCheckpoint, compare, rewrite
from ..errors import ModelError, why
from ..evaluation.batches import UnsavedResults
from ..evaluation.loss import measure_loss
from ..memory.placement import place_for
from ..models.architecture import find_layers, input_device
from ..models.decoder import Decoder
from ..models.dtypes import computing
from ..models.identity import stored_digest
from ..models.loading import read_config
from ..models.source import ModelSource
from ..progress import track
from ..results.healing import Healing, Merge
from ..settings.recipe import Resolved
from ..values.estimates import format_size
from ..values.files import PLAN_FILE
from ..values.tokens import Tokens
from .in_memory import TOLERANCE, adapted_logits, another_model, merge_in_memory, probe_logits
from .low_rank import LowRank, deviation
from .stored_adapters import low_rank_changes


def stored_plainly(path: str, trust_remote_code: bool = False) -> str:
    """The dtype of a model's weights, a name in ``TOLERANCE``; ModelError for others."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights of {path} are quantised, and adapters are merged into plain ones only: "
            f"keep the adapters, or cut the unquantised model",
            see="order",
        )
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in TOLERANCE:
        raise ModelError(f"cannot merge into weights of {dtype}: expected {', '.join(TOLERANCE)}")
    return dtype


@dataclass(frozen=True, slots=True)
class Merging:
    """Adapters to fold into a cut."""

    base: str  # the cut, a folder or hub id
    adapters: Path  # their folder
    healing: Healing  # their record
    held_out: list[str] | None = None  # texts to measure the merged model on
    trained: torch.Tensor | None = None  # logits on `PROBE` as trained, (1, T, V) float32
    progress: bool | None = None  # by default if standard error is a terminal
    trust_remote_code: bool = False
    # Receives the loss of the merged model.
    kept: UnsavedResults = field(default_factory=UnsavedResults)

    def into(self, folder: Path) -> Merge:
        """Fill an empty folder with the merged checkpoint, and check it.

        Stock transformers loads it, and its logits are compared with those of the adapters on their
        model, both in float32, where that fits into what is free. Else every weight is read back
        and compared with its sum in float64.
        """
        dtype = stored_plainly(self.base, self.trust_remote_code)
        place = fetched(self.base, self.trust_remote_code)
        stored = StoredCheckpoint.open(place) if is_checkpoint(place) else None
        if stored_digest(place) != self.healing.weights:
            raise another_model(self.base, self.adapters, self.healing)
        changes = None
        if stored is not None:
            changes = low_rank_changes(
                stored, self.adapters, trust_remote_code=self.trust_remote_code
            )
        if stored is None or changes is None:
            source = self._source(self.base, dtype, "cpu")
            expected = merge_in_memory(
                folder, source, self.adapters, healing=self.healing, progress=self.progress
            )
            return self._by_logits(folder, dtype, "cpu", expected)
        device_map = place_for(4 * stored.num_values)
        if device_map is None:
            return self._by_tensors(folder, dtype, stored, changes)
        source = self._source(self.base, "float32", device_map)
        expected = adapted_logits(
            source, self.adapters, healing=self.healing, progress=self.progress
        )
        with self._bar(stored.num_bytes) as report:
            rewrite(stored, folder, _changing(changes), report=report)
        return self._by_logits(folder, dtype, place_for(4 * stored.num_values) or "cpu", expected)

    def _source(self, path: str | Path, dtype: Any, device_map: Any) -> ModelSource:
        return ModelSource(path, dtype, device_map, trust_remote_code=self.trust_remote_code)

    def _merged(
        self, folder: Path, dtype: Any, device_map: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with track("load the merged model", show=self.progress):
            return self._source(folder, dtype, device_map).load(progress=False)

    @contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[int], None]]:
        done = 0
        with track("merge, MiB", total >> 20, self.progress) as advance:

            def report(count: int) -> None:
                nonlocal done
                before, done = done, done + count
                advance((done >> 20) - (before >> 20))

            yield report

    def _by_logits(self, folder: Path, dtype: str, device_map: Any, expected: Any) -> Merge:
        """The check of a model that fits into memory."""
        model, tokenizer = self._merged(folder, "float32", device_map)
        got = probe_logits(model, tokenizer, input_device(find_layers(model)))
        scale = float(expected.norm())
        difference = float((got - expected).norm()) / scale
        if not difference <= TOLERANCE[dtype]:
            raise ModelError(
                f"the merged model is not the one with its adapters: its logits are off by "
                f"{difference:.2g} of their norm, more than {TOLERANCE[dtype]:.0e}"
            )
        merge = Merge(
            dtype=dtype,
            difference=difference,
            tolerance=TOLERANCE[dtype],
            max_difference=float((got - expected).abs().max()),
            trained_difference=(
                None if self.trained is None else float((got - self.trained).norm()) / scale
            ),
        )
        if not self.held_out or dtype == "float32":
            return self._with_loss(merge, model, tokenizer)
        del model
        model, tokenizer = self._merged(folder, dtype, device_map)
        return self._with_loss(merge, model, tokenizer)

    def _by_tensors(
        self, folder: Path, dtype: str, stored: StoredCheckpoint, changes: Mapping[str, LowRank]
    ) -> Merge:
        """The merge and the check of a model that does not."""
        found: list[tuple[float, float]] = []

        def check(change: LowRank, was: Read, now: Read) -> None:
            found.append(deviation(change, was, now, device=_device()))

        with self._bar(2 * stored.num_bytes) as report:
            rewrite(stored, folder, _changing(changes), report=report)
            checks = {name: partial(check, change) for name, change in changes.items()}
            compare(stored, folder, checks, report=report)
        relative, largest = (max([0.0, *values]) for values in zip(*found, strict=True))
        merge = Merge(
            dtype=dtype,
            difference=relative,
            tolerance=max(torch.finfo(change.dtype).eps for change in changes.values()),
            max_difference=largest,
            check="tensors",
        )
        if not self.held_out:
            return merge
        device_map = place_for(stored.num_bytes)
        if device_map is None:
            warnings.warn(
                f"the held-out loss of the merged model is not measured: its "
                f"{format_size(stored.num_bytes)} do not fit into memory. Measure it where "
                f"they do: shallower eval",
                stacklevel=2,
            )
            return merge
        model, tokenizer = self._merged(folder, dtype, device_map)
        return self._with_loss(merge, model, tokenizer)

    def _with_loss(
        self, merge: Merge, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Merge:
        """With the held-out loss of the model as it is stored, which ``eval`` measures alike."""
        if not self.held_out:
            return merge
        decoder = Decoder.of(model)
        loss = measure_loss(
            decoder,
            tokenizer,
            self.held_out,
            tokens=Tokens(self.healing.recipe.max_length),
            store=self.kept if decoder.device.type == _device().type else None,
            progress=self.progress,
            description="loss, merged",
        )
        return replace(merge, loss=loss)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _changing(changes: Mapping[str, LowRank]) -> dict[str, Any]:
    return {name: partial(change.changed, device=_device()) for name, change in changes.items()}


def fetched(base: str, trust_remote_code: bool = False) -> Path:
    """The folder of a model; a hub id is fetched into the hub's cache, or raises ModelError."""
    if (folder := Path(base).expanduser()).is_dir():
        return folder

    def fetch(name: str) -> str | None:
        found = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else str(found)

    try:
        config = fetch("config.json")
        if fetch("model.safetensors") is None and (index := fetch(INDEX_FILE)):
            get_checkpoint_shard_files(base, index)
        for name in ("generation_config.json", PLAN_FILE):
            fetch(name)
        AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {base}: {why(error, base)}") from error
    if config is None:
        raise ModelError(f"{base} holds no config.json: expected a checkpoint of transformers")
    return Path(config).parent


def trained_logits(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, recipe: Resolved, *, checkpoint: Path
) -> torch.Tensor:
    """Compute the (1, T, V) float32 logits of peft's model on ``PROBE``, by a checkpoint."""
    adapted.load_adapter(str(checkpoint), "default")
    adapted.eval()
    device = input_device(find_layers(adapted.get_base_model()))
    with computing(recipe, device):
        return probe_logits(adapted, tokenizer, device)

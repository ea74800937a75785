"""What a patch has changed: undone in the end, or kept on disk so that the same patch resumes."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import OutputError
from ..models.offload import copy_weight, forget_change, stored_weight, write_weight
from ..models.residual_writers import Writer
from ..results.patch import Fit
from ..storage import check_room, new_file
from ..texts.batches import Batch
from ..values.plan import Plan
from ..values.provenance import hash_of
from ..values.schema import fields_of

SECONDS, SHARE = 20.0, 0.05
"""Seconds between two checkpoints of the steps, at least; the share of time that they may take."""

Tensors = dict[str, torch.Tensor]


class Changes:
    """Weights that were changed; the first value of each is kept where no file has it."""

    def __init__(self) -> None:
        self._undo: dict[tuple[nn.Module, str], torch.Tensor | None] = {}

    def __len__(self) -> int:
        return len(self._undo)

    def set(self, writer: Writer, weight: torch.Tensor) -> None:
        """Replace the matrix of a writer by one of (D, inputs), of any dtype, on any device."""
        self.change(writer.module, "weight", writer.turned(weight))

    def add(self, writer: Writer, delta: torch.Tensor) -> None:
        """Add (D, inputs) to the matrix of a writer."""
        self.set(writer, delta + writer.weight.to(delta.device))

    def change(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Write a module's parameter where it is stored, from any dtype and device."""
        if (module, name) not in self._undo:
            self._undo[module, name] = copy_weight(module, name)
        write_weight(module, name, value)

    def round_to(self, dtype: torch.dtype) -> None:
        """Round the changed weights to the values of a dtype, in which they will be stored."""
        for module, name in self._undo:
            write_weight(module, name, stored_weight(module, name).to(dtype))

    @torch.no_grad()
    def undo(self) -> None:
        """Restore all weights, the last first."""
        while self._undo:
            (module, name), before = self._undo.popitem()
            if before is None:
                forget_change(module, name)
            else:
                write_weight(module, name, before)

    def commit(self) -> None:
        """Keep the new weights: :meth:`undo` no longer restores the old ones."""
        self._undo.clear()


class PatchCheckpoint:
    """The matrices solved and the steps taken of an unfinished patch, in files of a folder, if any.

    Failed writes are ignored. So are those that would leave less than ``reserve`` bytes of the
    disk, which the result takes. A patch is identified by its layers, its texts and both models'
    losses on them, which differ wherever a weight does; files of another patch are not read.
    """

    def __init__(
        self,
        folder: Path | None,
        plan: Plan,
        batches: Sequence[Sequence[Batch]],
        losses: tuple[float, float],
        *,
        reserve: int = 0,
    ) -> None:
        self._reserve = reserve
        self._folder, self._saved, self._took = folder, time.monotonic(), 0.0
        self._job = "" if folder is None else _describe(plan, batches, losses)

    def fit(self, layer: int, module: nn.Module, changes: Changes) -> Fit | None:
        """The fit of a layer that was solved, its matrices set; None where there is none."""
        found = self._read(f"layer-{layer}")
        if found is None:
            return None
        facts, weights = found
        for name in weights.keys():  # noqa: SIM118 - it is no mapping
            changes.change(module.get_submodule(name), "weight", weights.get_tensor(name))
        return Fit(**fields_of(Fit, facts))

    def keep_fit(self, fit: Fit, module: nn.Module, names: Sequence[str]) -> None:
        """Keep a fit, and the matrices of these names that it changed."""
        weights = {name: stored_weight(module.get_submodule(name), "weight") for name in names}
        self._write(f"layer-{fit.layer}", asdict(fit), weights)

    @property
    def taken(self) -> int:
        """The steps that were taken when their state was kept last."""
        found = self.steps()
        return 0 if found is None else int(found[0]["taken"])

    def solved(self, layers: Sequence[int]) -> list[int]:
        """Those of some layers whose matrices were solved."""
        return [layer for layer in layers if self._read(f"layer-{layer}") is not None]

    def steps(self) -> tuple[dict[str, Any], Any] | None:
        """The state of the steps that was kept last; its file is open, and read by name."""
        return self._read("steps")

    @property
    def is_due(self) -> bool:
        """Whether the steps are to be kept again."""
        since = time.monotonic() - self._saved
        return self._folder is not None and since > max(SECONDS, self._took / SHARE)

    def keep_steps(self, facts: Mapping[str, Any], tensors: Tensors) -> None:
        """Keep the state of the steps, in place of the last one."""
        began = time.monotonic()
        self._write("steps", facts, tensors)
        self._saved = time.monotonic()
        self._took = self._saved - began

    def _write(self, name: str, facts: Mapping[str, Any], tensors: Tensors) -> None:
        if self._folder is None:
            return
        about = {"job": self._job, "facts": json.dumps(facts)}
        plain = {key: value.detach().contiguous() for key, value in tensors.items()}
        place = self._folder / f"{name}.safetensors"
        try:
            check_room(place, self._reserve + sum(value.nbytes for value in plain.values()))
            with new_file(place, overwrite=True) as partial:
                save_file(plain, partial, metadata=about)
        except (OutputError, SafetensorError):
            self._folder = None

    def _read(self, name: str) -> tuple[dict[str, Any], Any] | None:
        if self._folder is None:
            return None
        try:
            file = safe_open(self._folder / f"{name}.safetensors", framework="pt")
            about = file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        return (json.loads(about["facts"]), file) if about.get("job") == self._job else None


def _describe(plan: Plan, batches: Sequence[Sequence[Batch]], losses: tuple[float, float]) -> str:
    """Hash what the bits of a patch depend on: the model, the layers and the texts."""
    texts = hashlib.sha256()
    for batch in (batch for some in batches for batch in some):
        for values in (batch.input_ids, batch.learned.astype(np.int64)):
            texts.update(repr(values.shape).encode() + values.tobytes())
    return hash_of(
        {
            "model": plan.model and asdict(plan.model),
            "dropped": plan.dropped,
            "texts": texts.hexdigest(),
            "losses": losses,
        }
    )

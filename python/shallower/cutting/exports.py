"""The cut in other tools' words: what mergekit and llama.cpp need to make the same one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..values.layers import blocks_of
from ..values.plan import Plan
from .source import CARD_FILE, PLACEHOLDER, UncutModel

if TYPE_CHECKING:
    from ..results.loss import Loss

MERGEKIT_FILE = "mergekit.yaml"
PRUNE_LAYERS_FILE = "prune_layers.txt"
EXPORT_FILES = (CARD_FILE, MERGEKIT_FILE, PRUNE_LAYERS_FILE)
"""The names of the files beside a cut of layers."""


def export_files(plan: Plan) -> tuple[str, ...]:
    """The names of the files beside a cut; no other tool's words can say which experts go."""
    return EXPORT_FILES if plan.experts is None else (CARD_FILE,)


_MERGEKIT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class CutFacts:
    """The facts of a cut for the files beside it."""

    plan: Plan
    source: UncutModel
    options: Mapping[str, Any] = field(default_factory=dict)  # of `prune`, by name
    dtype: str | None = None  # of the stored weights, if known
    losses: "tuple[Loss, ...] | None" = None  # held-out, before and after; then on other domains
    tested: str = ""  # the name of their texts, as in `--texts`; empty for none
    gguf: str | None = None  # the name of the new file, if it is a GGUF file
    needs_5: bool = False  # whether its config is written for transformers 5
    command: str = ""  # if not `prune`; `{source}` is the uncut model and its options

    @property
    def out(self) -> str:
        """Place of the cut in a command."""
        if self.gguf and self.options.get("as_gguf"):
            return Path(self.gguf).stem
        return self.gguf or "cut"

    def file(self, name: str) -> str:
        """The name of a file beside the cut."""
        if self.gguf and not self.options.get("as_gguf"):
            return export_path(Path(self.gguf), name).name
        return name


def export_path(gguf: Path, name: str) -> Path:
    """The file ``name`` beside a GGUF file: ``model.README.md`` beside ``model.gguf``."""
    return gguf.with_suffix(f".{name}")


def prune_layers(plan: Plan) -> str:
    """The dropped layers as ``llama-quantize --prune-layers`` takes them: ``12,13``."""
    return ",".join(map(str, plan.dropped))


def mergekit_config(facts: CutFacts) -> str:
    """The cut as ``mergekit.yaml``: a passthrough merge of the ranges that stay."""
    source = facts.source
    model = PLACEHOLDER if source.gguf else source.place
    config: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": model, "layer_range": [block.start, block.stop]}]}
            for block in blocks_of(facts.plan.survivors)
        ],
    }
    if facts.dtype in _MERGEKIT_DTYPES:
        config["dtype"] = facts.dtype
    name = " ".join(source.name.split())
    what = "that it was made from; mergekit reads no GGUF file" if source.gguf else "of the model"
    note = f"# {PLACEHOLDER} stands for the folder or hub id {what}: {name}\n"
    return (note if model == PLACEHOLDER else "") + to_yaml(config)


def to_yaml(value: Any) -> str:
    """A value as YAML, lists of words on one line."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None)

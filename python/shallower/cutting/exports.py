"""The cut for other tools: what mergekit and llama.cpp make the same one by, and what loads it."""

import shlex
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
    loader: str = "AutoModelForCausalLM"  # of transformers, for text
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


NOT_HEALED = """\
**This model is not healed**: nothing was trained after the cut. Expect it to be worse than its
source, at reasoning in steps above all: measure it on your own task, or fine-tune it first."""

_FOR_STATES = """\
**This model is for its hidden states {states}**, which are those of its source, to the bit. It is
not for text: its head, if it has one, reads an inner layer. Its last state is behind the final norm
and is none of the source."""

CODE = ", trust_remote_code=True"

_LOADED = """\
From this folder, by transformers{version}:

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({arguments})
```

By vLLM and llama.cpp; the page *Take a cut elsewhere* adds TRL, axolotl, Unsloth and Ollama:

```sh
{serve}
```"""

_ENCODER = """\
From this folder, by transformers{version}:

```python
from transformers import {kind}

encoder = {kind}.from_pretrained({arguments})
```

With `output_hidden_states=True` its states are `hidden_states[i]` for the numbers above, counted
from the start: those that are counted from the end are others."""

_EMBEDDER = """\
From this folder, by sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("."{code})
```"""

_VERSION = """ 5 or later (version 4 ignores `rope_parameters` in
`config.json`, and loads another model without an error)"""

_SERVE_FOLDER = """\
vllm serve .{code}
python convert_hf_to_gguf.py . --outfile cut.gguf  # of llama.cpp; for weights in plain dtypes
llama-cli -m cut.gguf"""

_SERVE_GGUF = """\
vllm serve ./{gguf} --tokenizer TOKENIZER  # with vllm-gguf-plugin; a folder or hub id
llama-cli -m {gguf}"""


def purpose(plan: Plan) -> str:
    """What the model is good for as it is cut, in a paragraph."""
    if not plan.states:
        return NOT_HEALED
    return _FOR_STATES.format(states=", ".join(map(str, plan.states)))


def loading(facts: CutFacts) -> str:
    """How the model is loaded, by other programs too where it is for text."""
    gguf, has_code = facts.gguf, bool(facts.options.get("trust_remote_code"))
    words = {
        "version": _VERSION if facts.needs_5 and not gguf else "",
        "arguments": f'".", gguf_file={gguf!r}' if gguf else f'"."{CODE if has_code else ""}',
    }
    if facts.plan.states:
        return _ENCODER.format(kind="AutoModelForCausalLM" if has_code else "AutoModel", **words)
    if facts.source.embeds:
        return _EMBEDDER.format(code=CODE if has_code else "")
    serve = (_SERVE_GGUF if gguf else _SERVE_FOLDER).format(
        gguf=shlex.quote(gguf or ""), code=" --trust-remote-code" if has_code else ""
    )
    return _LOADED.format(serve=serve, loader=facts.loader, **words)

"""What lies beside a cut, for people and for other tools: a model card, and what mergekit and
llama.cpp need to make the same cut.

Texts only: whoever makes the cut writes them, so that they appear with it or not at all.
"""

import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..values.layers import Block, blocks_of, ranges
from ..values.loss import Loss, with_error
from ..values.plan import STRATEGIES, Plan

CARD_FILE = "README.md"
MERGEKIT_FILE = "mergekit.yaml"
PRUNE_LAYERS_FILE = "prune_layers.txt"
EXPORT_FILES = (CARD_FILE, MERGEKIT_FILE, PRUNE_LAYERS_FILE)

_CARRIED_KEYS = ("license", "license_name", "license_link", "language")
_MERGEKIT_DTYPES = ("float32", "bfloat16", "float16")
_MAX_CARD_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)

_NOT_HEALED = """\
**This model is not healed**: nothing was trained after the cut. Expect it to be worse than its
source, at reasoning in steps above all: measure it on your own task, or fine-tune it first."""

_CARD = """\
---
{metadata}---

# {name} without layers {dropped}

Whole decoder layers were cut out of `{source}`. They are counted from 0, and ranges are half-open.

{not_healed}

| | |
|---|---|
{rows}

## Making it again

```sh
{command}
```

```python
import shallower as sh

{python}
```

## Loading it

From this folder, by transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({arguments})
```

By vLLM and llama.cpp:

```sh
{serve}
```

## The same cut by other tools

mergekit and llama.cpp cut the source, too. They rename its tensors and count its layers anew; what
else a config says of single layers, they may leave behind.

```sh
mergekit-yaml {mergekit} merged
llama-quantize --prune-layers {prune_layers} source.gguf cut.gguf copy
```
"""

_SERVE_FOLDER = """\
vllm serve .
python convert_hf_to_gguf.py . --outfile cut.gguf  # of llama.cpp; for weights in plain dtypes
llama-cli -m cut.gguf"""

_SERVE_GGUF = """\
vllm serve ./{gguf} --tokenizer SOURCE  # with vllm-gguf-plugin, and the source's own tokenizer
llama-cli -m {gguf}"""


def exports(
    plan: Plan,
    source: str,
    python: str,
    options: Sequence[str] = (),
    dtype: str | None = None,
    source_card: Path | None = None,
    losses: tuple[Loss, Loss] | None = None,
    gguf: str | None = None,
) -> dict[str, str]:
    """The texts that lie beside a cut, by the names in ``EXPORT_FILES``.

    Args:
        plan: what was dropped.
        source: the uncut model as it was named: a folder, a hub id or a GGUF file.
        python: the lines that make the cut again, after ``import shallower as sh``.
        options: what ``shallower prune`` needs for it beside the layers.
        dtype: what the weights are stored in, if that is known.
        source_card: the model card of ``source``, whose license is carried over and whose
            text comes below the new one. It need not be there.
        losses: the held-out loss before and after the cut, if they were measured.
        gguf: the name of the new file, if it is a GGUF file and no folder.
    """
    inherited, text = read_card(source_card) if source_card else ({}, "")
    metadata = {
        "base_model": hub_id(source),
        "library_name": "gguf" if gguf else "transformers",
        **{key: inherited.get(key) for key in _CARRIED_KEYS},
        "tags": ["shallower", "layer-pruning"],
    }
    drop = ",".join(
        f"{block.start}:{block.stop}" if len(block) > 1 else str(block.start)
        for block in plan.blocks
    )
    command = ["shallower", "prune", source, "--drop", drop, *options, "--out", gguf or "cut"]
    quoted = shlex.quote(gguf or "")
    card = _CARD.format(
        metadata=_yaml({key: value for key, value in metadata.items() if value is not None}),
        name=_inline(hub_id(source) or Path(source).name or source),
        dropped=ranges(plan.dropped),
        not_healed=_NOT_HEALED,
        source=_inline(source),
        rows="\n".join(f"| {name} | {_inline(value)} |" for name, value in _rows(plan, losses)),
        command=shlex.join(command),
        python=python,
        arguments=f'".", gguf_file={gguf!r}' if gguf else '"."',
        serve=_SERVE_GGUF.format(gguf=quoted) if gguf else _SERVE_FOLDER,
        mergekit=shlex.quote(
            export_path(Path(gguf), MERGEKIT_FILE).name if gguf else MERGEKIT_FILE
        ),
        prune_layers=_prune_layers(plan),
    )
    if text.strip():
        card += f"\n## The card of the source\n\n{text.strip()}\n"
    return {
        CARD_FILE: card,
        MERGEKIT_FILE: _mergekit(plan, source, dtype, gguf),
        PRUNE_LAYERS_FILE: _prune_layers(plan) + "\n",
    }


_HEALED = """\
**This model is healed**: after the cut, {what}
It is still another model than its source, at reasoning in steps above all: measure it on your own
task.

| healing | |
|---|---|
{rows}"""

_ADAPTERS = """\
---
{metadata}---

# Healing of {name}

Low-rank adapters for `{source}`, a model without its layers {dropped}. They belong to that very
model, and to its plain weights or the same in 4 bits alike.

{healed}

## Loading it

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")
```

`shallower merge . --out healed` folds the adapters into the weights.
"""


def adapters_card(
    plan: Plan, source: str, source_card: Path, rows: Sequence[tuple[str, str]]
) -> str:
    """The card of adapters that heal a cut.

    Args:
        plan: of the cut.
        source: the cut model as it was named.
        source_card: its card, whose license is carried over. It need not be there.
        rows: what the card says of the healing, by name.
    """
    inherited, _ = read_card(source_card)
    metadata = {
        "base_model": hub_id(source),
        "library_name": "peft",
        **{key: inherited.get(key) for key in _CARRIED_KEYS},
        "tags": ["shallower", "layer-pruning", "lora"],
    }
    return _ADAPTERS.format(
        metadata=_yaml({key: value for key, value in metadata.items() if value is not None}),
        name=_inline(hub_id(source) or Path(source).name),
        source=_inline(source),
        dropped=ranges(plan.dropped),
        healed=_healed("low-rank adapters were trained.", rows),
    )


def healed_card(cut_card: Path, what: str, rows: Sequence[tuple[str, str]]) -> str:
    """The card of a cut, once it is healed: the same, but for what it says of healing.

    Args:
        cut_card: the cut's card. It need not be there.
        what: was done after the cut, to end the sentence.
        rows: what the card says of the healing, by name.
    """
    text = cut_card.read_text(encoding="utf-8-sig") if cut_card.is_file() else ""
    healed = _healed(what, rows)
    if _NOT_HEALED in text:
        return text.replace(_NOT_HEALED, healed, 1)
    front = _FRONT_MATTER.match(text)
    end = front.end() if front else 0
    return f"{text[:end]}\n{healed}\n{text[end:]}"


def _healed(what: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f"| {name} | {_inline(value)} |" for name, value in rows)
    return _HEALED.format(what=what, rows=lines)


def export_path(gguf: Path, name: str) -> Path:
    """Where a file beside a GGUF file lies: ``model.README.md`` beside ``model.gguf``."""
    return gguf.with_suffix(f".{name}")


def range_list(plan: Plan) -> str:
    """The layers that go, in Python: ``[range(12, 20)]``."""
    return str([block.layers for block in plan.blocks])


def hub_id(source: str) -> str | None:
    """The hub id of a model by the name it was loaded by; None for one's own folder or file."""
    cached = re.search(r"models--([\w.-]+)/snapshots/", source)
    if cached:
        return cached[1].replace("--", "/", 1)
    named = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not source.endswith(".gguf")
    return source if named and not Path(source).exists() else None


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The words in a model card's front matter by their keys, and the text below it.

    What is no front matter is text; a file that is not there, or too large, is empty.
    """
    if not path.is_file():
        return {}, ""
    if path.stat().st_size > _MAX_CARD_BYTES:
        warnings.warn(f"{path} is left out: it is too large for a model card", stacklevel=2)
        return {}, ""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    found = _FRONT_MATTER.match(text)
    try:
        # The base loader knows strings, lists and mappings alone, and merges no keys.
        metadata = yaml.load(found[1] or "", Loader=yaml.BaseLoader) if found else None
    except (yaml.YAMLError, RecursionError):
        metadata = None
    if not found or not isinstance(metadata, dict):
        return {}, text
    words = {key: value for key, value in metadata.items() if _is_words(value)}
    return words, text[found.end() :]


def _is_words(value: Any) -> bool:
    """A string, or a list of strings, and not YAML's nothing."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and item not in ("", "~", "null") for item in items)


def _rows(plan: Plan, losses: tuple[Loss, Loss] | None) -> list[tuple[str, str]]:
    rows = [("removed", _scored(block, plan.metric)) for block in plan.blocks]
    rows += [
        ("kept", f"{ranges(plan.survivors)}, {len(plan.survivors)} of {plan.num_layers} layers"),
        ("why", f"{plan.strategy}: {STRATEGIES[plan.strategy]}"),
    ]
    rows += [
        ("calibration", f"{texts.num_texts} texts of at most {texts.max_length} tokens")
        for texts in plan.texts
    ]
    if plan.positions:
        rows.append(("tokens compared", f"{plan.positions} of every text"))
    if losses:
        before, after = losses
        tokens = f"{after.num_tokens} tokens of {after.num_texts} texts"
        rows.append(("held-out loss", f"{before} → {after} nats a token, {tokens}"))
    else:
        rows.append(("held-out loss", "not measured; `shallower eval` measures it"))
    if plan.model:
        rows.append(("source", str(plan.model)))
    made_with = ", ".join(f"{package} {version}" for package, version in plan.versions.items())
    return [*rows, ("made with", made_with)]


def _scored(block: Block, metric: str | None) -> str:
    if block.score is None:
        return str(block)
    return f"{block}, {metric or 'its'} distance {with_error(block.score, block.stderr)}"


def _inline(text: str) -> str:
    """Text from a path or a plan that cannot break a line or a table of the card."""
    return " ".join(text.split()).replace("|", "\\|")


def _prune_layers(plan: Plan) -> str:
    """What ``llama-quantize --prune-layers`` takes: the numbers in ``blk.N``, with commas."""
    return ",".join(map(str, plan.dropped))


def _mergekit(plan: Plan, source: str, dtype: str | None, gguf: str | None) -> str:
    config: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": source, "layer_range": [block.start, block.stop]}]}
            for block in blocks_of(plan.survivors)
        ],
    }
    if dtype in _MERGEKIT_DTYPES:
        config["dtype"] = dtype
    why = "# mergekit reads no GGUF: put the folder or hub id that the file was made from.\n"
    return (why if gguf else "") + _yaml(config)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None)

"""The model cards: of a cut, of a healed one, and of adapters; and all texts beside a cut.

Texts only: whoever makes the cut writes them, so that they appear with it or not at all.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..values.layers import Block, ranges
from ..values.loss import with_error
from ..values.plan import Plan
from .card_file import CARD_FILE, FRONT_MATTER, front_matter
from .exports import (
    MERGEKIT_FILE,
    PRUNE_LAYERS_FILE,
    CutFacts,
    mergekit_config,
    prune_layers,
)
from .source import PLACEHOLDER, Source

_NOT_HEALED = """\
**This model is not healed**: nothing was trained after the cut. Expect it to be worse than its
source, at reasoning in steps above all: measure it on your own task, or fine-tune it first."""

_CARD = """\
---
{metadata}---

# {name} without layers {dropped}

Whole decoder layers were cut out of {source}. They are counted from 0, and ranges are half-open.

{not_healed}

| | |
|---|---|
{rows}

## Making the cut again

On the command line or in Python: either makes the whole cut.{placeholder}

```sh
{command}
```

```python
import shallower as sh

{python}
```

## Loading it

From this folder, by transformers{version}:

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

mergekit and llama.cpp cut the source, too, and are not needed for this model. They rename its
tensors and count its layers anew; what else a config says of single layers, they may leave behind.

```sh
mergekit-yaml {mergekit} merged
llama-quantize --prune-layers {prune_layers} source.gguf cut.gguf copy
```

- mergekit 0.1.5 does not cut `layer_types`. For families whose config has that list, such as
  Qwen2, Qwen3, Gemma 2, Gemma 3, SmolLM3 and gpt-oss, it writes all tensors and then fails.
- `--prune-layers` needs llama.cpp of August 2026 (commit 0c1e570) or later. Earlier builds look
  tensors up by their new names, and drop the wrong layers or crash.
"""

_VERSION = """ 5 or later (version 4 ignores `rope_parameters` in
`config.json`, and loads another model without an error)"""

_SERVE_FOLDER = """\
vllm serve .
python convert_hf_to_gguf.py . --outfile cut.gguf  # of llama.cpp; for weights in plain dtypes
llama-cli -m cut.gguf"""

_SERVE_GGUF = """\
vllm serve ./{gguf} --tokenizer TOKENIZER  # with vllm-gguf-plugin; a folder or hub id
llama-cli -m {gguf}"""


def exports(facts: CutFacts) -> dict[str, str]:
    """Write the texts that lie beside a cut.

    Args:
        facts: what there is to say of the cut.

    Returns:
        The texts by the names in ``EXPORT_FILES``.
    """
    return {
        CARD_FILE: cut_card(facts),
        MERGEKIT_FILE: mergekit_config(facts),
        PRUNE_LAYERS_FILE: prune_layers(facts.plan) + "\n",
    }


def cut_card(facts: CutFacts) -> str:
    """Write the model card of a cut.

    Args:
        facts: what there is to say of it.

    Returns:
        The text of ``README.md``, with the source's own card at the end.
    """
    plan, source, gguf = facts.plan, facts.source, facts.gguf
    quantised = gguf is not None or facts.dtype in ("nf4", "int8")
    quoted = shlex.quote(gguf or "")
    card = _CARD.format(
        metadata=front_matter(
            source.inherited,
            base=source.hub,
            relation="quantized" if quantised else "finetune",
            library="gguf" if gguf else "transformers",
        ),
        name=_inline(source.name),
        dropped=ranges(plan.dropped),
        not_healed=_NOT_HEALED,
        source=_described(source),
        rows=_table(_rows(facts)),
        placeholder=_placeholder(source),
        command=_command(facts),
        python=_python(facts),
        version=_VERSION if facts.needs_5 and not gguf else "",
        arguments=f'".", gguf_file={gguf!r}' if gguf else '"."',
        serve=_SERVE_GGUF.format(gguf=quoted) if gguf else _SERVE_FOLDER,
        mergekit=shlex.quote(facts.mergekit_file),
        prune_layers=prune_layers(plan),
    )
    if source.text.strip():
        card += f"\n## The card of the source\n\n{source.text.strip()}\n"
    return card


def _described(source: Source) -> str:
    """The source in a sentence: its name, the quantisation of a GGUF file, its repository."""
    name = f"`{_inline(source.name)}`"
    if source.quantisation:
        name += f" ({source.quantisation})"
    return f"{name} of `{source.hub}`" if source.gguf and source.hub else name


def _placeholder(source: Source) -> str:
    if source.place != PLACEHOLDER:
        return ""
    what = "folder that holds" if source.gguf else "folder of"
    return f" `{PLACEHOLDER}` stands for the\n{what} `{_inline(source.name)}`."


def _arguments(facts: CutFacts) -> dict[str, Any]:
    """The options of the cut, by their names in Python."""
    given = {"gguf_file": facts.source.gguf, **facts.options}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _command(facts: CutFacts) -> str:
    drop = ",".join(
        f"{block.start}:{block.stop}" if len(block) > 1 else str(block.start)
        for block in facts.plan.blocks
    )
    words = ["shallower", "prune", facts.source.place, "--drop", drop]
    for name, value in _arguments(facts).items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return shlex.join([*words, "--out", facts.out])


def _python(facts: CutFacts) -> str:
    layers = [block.layers for block in facts.plan.blocks]
    words = [f", {name}={value!r}" for name, value in _arguments(facts).items()]
    return f"sh.prune({facts.source.place!r}, {layers}, {facts.out!r}{''.join(words)})"


def _rows(facts: CutFacts) -> list[tuple[str, str]]:
    plan = facts.plan
    kept = f"{ranges(plan.survivors)}, {len(plan.survivors)} of {plan.num_layers} layers"
    rows = [("removed", _scored(block, plan.metric)) for block in plan.blocks]
    rows += [("kept", kept), ("why", plan.why)]
    rows += [
        ("calibration", f"{texts.num_texts} texts of at most {texts.max_length} tokens")
        for texts in plan.texts
    ]
    if plan.positions:
        rows.append(("tokens compared", f"{plan.positions} of every text"))
    if facts.losses:
        before, after = facts.losses
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


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {_inline(value)} |" for name, value in rows)


def _inline(text: str) -> str:
    """Text from a path or a plan that cannot break a line or a table of the card."""
    return " ".join(text.split()).replace("|", "\\|")


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

Low-rank adapters for `{name}`, a model without its layers {dropped}. They belong to that very
model, and to its plain weights or the same in 4 bits alike.

{healed}

## Loading it

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")
```

`shallower merge . --out healed` folds the adapters into the weights.
"""


def adapters_card(plan: Plan, cut: Source, *, rows: Sequence[tuple[str, str]]) -> str:
    """Write the card of adapters that heal a cut.

    Args:
        plan: of the cut.
        cut: the cut model, which the card names, and whose license it carries over.
        rows: what the card says of the healing, by name.

    Returns:
        The text of ``README.md``.
    """
    # Not the cut's own base, which these adapters do not fit.
    inherited = {key: value for key, value in cut.inherited.items() if key != "base_model"}
    return _ADAPTERS.format(
        metadata=front_matter(
            inherited, base=cut.hub, relation="adapter", library="peft", tags=["lora"]
        ),
        name=_inline(cut.name),
        dropped=ranges(plan.dropped),
        healed=_healed("low-rank adapters were trained.", rows),
    )


def healed_card(cut_card: Path, what: str, rows: Sequence[tuple[str, str]]) -> str:
    """Write the card of a cut once it is healed: the same but for what it says of healing.

    Args:
        cut_card: the cut's card. It need not be there.
        what: was done after the cut, to end the sentence.
        rows: what the card says of the healing, by name.

    Returns:
        The text of ``README.md``.
    """
    text = cut_card.read_text(encoding="utf-8-sig") if cut_card.is_file() else ""
    healed = _healed(what, rows)
    if _NOT_HEALED in text:
        return text.replace(_NOT_HEALED, healed, 1)
    front = FRONT_MATTER.match(text)
    if front:
        return f"{text[: front.end()]}\n{healed}\n{text[front.end() :]}"
    metadata = front_matter({}, base=None, relation="finetune", library="transformers")
    return f"---\n{metadata}---\n\n{healed}\n{text}"


def _healed(what: str, rows: Sequence[tuple[str, str]]) -> str:
    return _HEALED.format(what=what, rows=_table(rows))

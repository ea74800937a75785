"""The model cards: of a cut, of a healed one, and of adapters; and all texts beside a cut.

Texts only: they are written with the cut, so that they appear with it or not at all.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.dtypes import QUANTISED
from ..storage import RESULT_RECORD, rewrite
from ..values.counts import counted, with_error
from ..values.files import PLAN_FILE
from ..values.layers import Block, drop_option, ranges
from ..values.plan import Plan
from ..values.provenance import command_line, option_words, shell_lines
from .exports import (
    CODE,
    MERGEKIT_FILE,
    NOT_HEALED,
    PRUNE_LAYERS_FILE,
    CutFacts,
    export_files,
    loading,
    mergekit_config,
    prune_layers,
    purpose,
)
from .metadata import (
    EXPERTS_TAG,
    LAYERS_TAG,
    front_matter,
    loss_results,
    with_results,
    without_results,
)
from .source import CARD_FILE, FRONT_MATTER, PLACEHOLDER, UncutModel

if TYPE_CHECKING:
    from ..results.loss import Loss


_CARD = """\
---
{metadata}---

# {title}

{what}. They are counted from 0, and ranges are half-open.

{purpose}

| | |
|---|---|
{rows}

## How it was made

{history}
{again}
If `{record}` lies beside this card, `shallower reproduce {result}` does so and compares all bytes.

{heading}
{loading}

## The same cut by other tools

{others}
"""

_OTHER_TOOLS = """\
mergekit and llama.cpp cut the source, too, and are not needed for this model. They rename its
tensors and count its layers anew; what else a config says of single layers, they may leave behind.

```sh
mergekit-yaml {mergekit} merged
llama-quantize --prune-layers {prune_layers} source.gguf cut.gguf copy
```

- mergekit 0.1.5 does not cut `layer_types`. For families whose config has that list, such as
  Qwen2, Qwen3, Gemma 2, Gemma 3, SmolLM3 and gpt-oss, it writes all tensors and then fails.
- `--prune-layers` needs llama.cpp of August 2026 (commit 0c1e570) or later. Earlier builds look
  tensors up by their new names, and drop the wrong layers or crash."""

_NO_OTHER_TOOLS = """\
mergekit's configs and llama.cpp's list of layers name whole layers alone, so none of them lies
beside this model."""

_CUT_AGAIN = """\
## Making the cut again

On the command line or in Python: either makes the whole cut.{placeholder}

```sh
{command}
```

```python
import shallower as sh

{python}
```
"""

_MADE_AGAIN = """\
## Making it again

On the same texts it ends in this model, and in the numbers above.{placeholder} {names}

```sh
{command}
```
"""

_PLACES = """Other words in
capitals are places of texts: those that it is fitted on, and those of the held-out loss."""
_ANSWERS = """ `ANSWERS` are prompts,
each with its answer; of those without one the source writes them (`--answers` alone: our own)."""
_NAMES = "Names of files\nare those of the machine that made it."

_HEALED_AGAIN = """\
## Healing it again

Of the cut in `cut`: `TEXTS` are those that are trained on, `EVAL_TEXTS` choose the step,
`SOURCE` is the uncut model.{answers}

```sh
{command}
```

"""

_EMBEDDERS = "sentence-transformers"
_LOADING = "## Loading it\n"
_LOSS = re.compile(r"^\| held-out loss \| (?!not measured)(.*) \|$", re.MULTILINE)

_HISTORY = re.compile(r"^## How it was made\n\n((?:\d+\. .+\n)+)", re.MULTILINE)
_LOST = "; held-out loss "
_OF_SOURCE = "\n## The card of the source\n"


def exports(facts: CutFacts) -> dict[str, str]:
    """The texts beside a cut, by the names that :func:`.exports.export_files` gives."""
    texts = {
        CARD_FILE: lambda: cut_card(facts),
        MERGEKIT_FILE: lambda: mergekit_config(facts),
        PRUNE_LAYERS_FILE: lambda: prune_layers(facts.plan) + "\n",
    }
    made = {name: texts[name]() for name in export_files(facts.plan)}
    # Names of files that are no Unicode, which a system allows.
    return {name: text.encode(errors="replace").decode() for name, text in made.items()}


def cut_card(facts: CutFacts) -> str:
    """The text of ``README.md`` of a cut, with the source's own card at the end."""
    plan, source, gguf = facts.plan, facts.source, facts.gguf
    quantised = gguf is not None or facts.dtype in QUANTISED
    mergekit = shlex.quote(facts.file(MERGEKIT_FILE))
    tools = _OTHER_TOOLS.format(mergekit=mergekit, prune_layers=prune_layers(plan))
    card = _CARD.format(
        metadata=front_matter(
            {
                **({"pipeline_tag": "sentence-similarity"} if source.embeds else {}),
                **source.inherited,
                **({"pipeline_tag": "feature-extraction"} if plan.states else {}),
            },
            base=source.hub,
            relation="quantized" if quantised else "finetune",
            library="gguf" if gguf else _EMBEDDERS if source.embeds else "transformers",
            pruned=_pruned(plan),
        ),
        title=_title(facts),
        what=_what(facts),
        purpose=purpose(plan),
        rows=_table(_rows(facts)),
        history=_numbered(_steps(facts)),
        again=_again(facts),
        record=facts.file(RESULT_RECORD),
        result="." if facts.file(CARD_FILE) == CARD_FILE else shlex.quote(gguf or ""),
        heading=_LOADING,
        loading=loading(facts),
        others=tools if plan.experts is None else _NO_OTHER_TOOLS,
    )
    if source.text.strip():
        card += f"{_OF_SOURCE}\n{source.text.strip()}\n"
    if facts.losses is None:
        return card
    before, after, *_ = facts.losses
    return with_results(card, loss_results(after, before, facts.tested))


def _steps(facts: CutFacts) -> list[str]:
    """All that was done to get a cut, its source's own steps first."""
    plan, source = facts.plan, facts.source
    layers = counted(plan.num_layers, "layer")
    before = _history(source.text) or [f"{_described(source)}, {layers}"]
    lost = f"{_LOST}{_lost(facts.losses)}" if facts.losses else ""
    kept = f"{len(plan.survivors)} of {layers} stay"
    return [*before, _inline(f"cut: without {_dropped(plan)}, {kept}{lost}")]


def _history(card: str) -> list[str]:
    """The steps that a card has of its own model."""
    found = _HISTORY.search(card.partition(_OF_SOURCE)[0])
    return [line.partition(" ")[2] for line in found[1].splitlines()] if found else []


def _numbered(steps: Sequence[str]) -> str:
    return "".join(f"{number}. {step}\n" for number, step in enumerate(steps, 1))


def _with_step(own: str, what: str, rows: Sequence[tuple[str, str]], *, loss_stays: bool) -> str:
    """A card with one step more; the loss that the last one has may be of the model behind it."""
    steps = _history(own)
    if not steps:
        return own
    figures = [f"; {name}: {value}" for name, value in rows if "loss" in name or "lost" in name]
    step = _inline(what.rstrip(".") + "".join(figures))
    last, measured, loss = steps[-1].partition(_LOST)
    if measured and not loss_stays:
        steps[-1], step = last, f"{step}{measured}{loss}"
    return _HISTORY.sub(lambda found: found[0].replace(found[1], _numbered([*steps, step])), own, 1)


def _dropped(plan: Plan, its: str = "") -> str:
    """What a cut is without, in a few words."""
    return f"{its}layers {plan.words}" if plan.blocks else plan.words


def _title(facts: CutFacts) -> str:
    return f"{_inline(facts.source.name)} without {_dropped(facts.plan)}"


def _what(facts: CutFacts) -> str:
    """What was cut out of a source, in a sentence without its end."""
    plan, source = facts.plan, _described(facts.source)
    if plan.experts is None:
        return f"Whole decoder layers were cut out of {source}"
    what = "Whole decoder layers and routed experts" if plan.blocks else "Routed experts"
    return f"{what} were cut out of {source}; `{facts.file(PLAN_FILE)}` names each of them"


def _pruned(plan: Plan) -> list[str]:
    return [LAYERS_TAG] * bool(plan.blocks) + [EXPERTS_TAG] * (plan.experts is not None)


def _described(source: UncutModel) -> str:
    """The source in a sentence: its name, the quantisation of a GGUF file, its repository."""
    name = f"`{_inline(source.name)}`"
    if source.quantisation:
        name += f" ({source.quantisation})"
    return f"{name} of `{source.hub}`" if source.gguf and source.hub else name


def _placeholder(source: UncutModel) -> str:
    if source.place != PLACEHOLDER:
        return ""
    what = "folder that holds" if source.gguf else "folder of"
    return f" `{PLACEHOLDER}` stands for the\n{what} `{_inline(source.name)}`."


def _arguments(facts: CutFacts) -> dict[str, Any]:
    """The options of the cut, by their names in Python."""
    given = {"gguf_file": facts.source.gguf, **facts.options}
    return {name: value for name, value in given.items() if value not in (None, False)}


def _again(facts: CutFacts) -> str:
    """Say how the model is made again."""
    placeholder = _placeholder(facts.source)
    if facts.command:
        source = shlex.join([facts.source.place, *option_words(_arguments(facts))])
        command = facts.command.replace("{source}", source)
        known = "" if PLACEHOLDER not in shlex.split(command) else placeholder
        names = _PLACES if "TEXTS" in shlex.split(command) else _NAMES
        names += _about_answers(command)
        lines = shell_lines(command)
        return _MADE_AGAIN.format(placeholder=known, names=names, command=lines)
    cut = ["--drop", drop_option(facts.plan.blocks)]
    if facts.plan.states:
        cut = ["--for-states", ",".join(map(str, facts.plan.states))]
    if facts.plan.experts is not None:
        cut = ["--plan", facts.file(PLAN_FILE)]
        placeholder += f"\n`{facts.file(PLAN_FILE)}` lies beside this card."
    words = ["shallower", "prune", facts.source.place, *cut]
    words += [*option_words(_arguments(facts)), "--out", facts.out]
    return _CUT_AGAIN.format(
        placeholder=placeholder, command=shlex.join(words), python=_python(facts)
    )


def _about_answers(command: str) -> str:
    """What stands for answers in a command, if it has some."""
    return _ANSWERS if "ANSWERS" in shlex.split(command) else ""


def _python(facts: CutFacts) -> str:
    layers: Any = [block.layers for block in facts.plan.blocks]
    if facts.plan.experts is not None:
        layers = facts.file(PLAN_FILE)
    what = f"sh.ForStates({list(facts.plan.states)})" if facts.plan.states else repr(layers)
    words = [f", {name}={value!r}" for name, value in _arguments(facts).items()]
    return f"sh.prune({facts.source.place!r}, {what}, {facts.out!r}{''.join(words)})"


def _rows(facts: CutFacts) -> list[tuple[str, str]]:
    plan = facts.plan
    kept = f"{ranges(plan.survivors)}, {len(plan.survivors)} of {plan.num_layers} layers"
    rows = [("removed", _scored(block, plan.metric)) for block in plan.blocks]
    if plan.experts is not None:
        which = f"{plan.experts.share} of each of the layers {ranges(tuple(plan.experts.by_layer))}"
        rows.append(("experts removed", which))
    rows += [("kept", kept), ("why", plan.why)]
    rows += [("doubt", plan.doubt)] if plan.doubt else []
    rows += [
        (
            "calibration",
            f"{counted(texts.num_texts, 'text')} of at most {counted(texts.max_length, 'token')}",
        )
        for texts in plan.texts
    ]
    if plan.positions:
        rows.append(("tokens compared", f"{plan.positions} of every text"))
    if facts.losses:
        rows.append(("held-out loss", _lost(facts.losses)))
    elif not plan.states:
        rows.append(("held-out loss", "not measured; `shallower eval` measures it"))
    if plan.model:
        rows.append(("source", str(plan.model)))
    made_with = ", ".join(f"{package} {version}" for package, version in plan.versions.items())
    return [*rows, ("made with", made_with)]


def _lost(losses: "tuple[Loss, ...]") -> str:
    before, after, *outside = losses
    tokens = f"{counted(after.num_tokens, 'token')} of {counted(after.num_texts, 'text')}"
    more = f"; out of domain {outside[0]} → {outside[1]}" if outside else ""
    return f"{before} → {after} nats a token, {tokens}{more}"


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

Low-rank adapters for `{name}`, a model without {dropped}. They belong to that very
model, and to its plain weights or the same in 4 bits alike.

{healed}

## Loading it

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("."{code})
```

`{merge}` folds the adapters into the weights.
"""


def adapters_card(
    plan: Plan,
    cut: UncutModel,
    *,
    rows: Sequence[tuple[str, str]],
    trust_remote_code: bool = False,
) -> str:
    """The text of ``README.md`` of adapters that heal a cut; ``rows`` describe the healing."""
    # Not the cut's own base, which these adapters do not fit.
    inherited = {key: value for key, value in cut.inherited.items() if key != "base_model"}
    code = option_words({"trust_remote_code": trust_remote_code})
    return _ADAPTERS.format(
        metadata=front_matter(
            inherited,
            base=cut.hub,
            relation="adapter",
            library="peft",
            pruned=_pruned(plan),
            tags=["lora"],
        ),
        name=_inline(cut.name),
        dropped=_dropped(plan, "its "),
        healed=_HEALED.format(what="low-rank adapters were trained.", rows=_table(rows)),
        code=CODE if trust_remote_code else "",
        merge=command_line("merge", ".", *code, "--out", "../healed"),
    )


def healed_card(
    cut_card: Path, what: str, rows: Sequence[tuple[str, str]], *, command: str = ""
) -> str:
    """The card of a cut after healing: only what it says of healing changes.

    ``cut_card`` need not exist; ``what`` ends the sentence "after the cut, ...". ``command`` heals
    the cut; empty for a run, which has it in its own line.
    """
    text = cut_card.read_text(encoding="utf-8-sig") if cut_card.is_file() else ""
    healed = _HEALED.format(what=what, rows=_table(rows))
    text, heading, of_source = text.partition(_OF_SOURCE)
    of_source = f"{heading}{of_source}"
    text = _with_step(text, what, rows, loss_stays=bool(command))
    if command:
        text = without_results(text)
        text = _LOSS.sub(r"| held-out loss, before the healing | \1 |", text, count=1)
        if not re.search(r"^shallower (run|demo) [^`]*--heal\b", text, re.MULTILINE):
            answers, lines = _about_answers(command), shell_lines(command)
            section = _HEALED_AGAIN.format(answers=answers, command=lines)
            before, heading, behind = text.partition(_LOADING)
            text = f"{before}{section}{heading}{behind}" if heading else f"{text}\n{section}"
    if NOT_HEALED in text:
        return text.replace(NOT_HEALED, healed, 1) + of_source
    front = FRONT_MATTER.match(text)
    if front:
        return f"{text[: front.end()]}\n{healed}\n{text[front.end() :]}{of_source}"
    metadata = front_matter({}, base=None, relation="finetune", library="transformers")
    return f"---\n{metadata}---\n\n{healed}\n{text}{of_source}"


def state_loss(card: Path, losses: "tuple[Loss, ...]", *, tested: str = "") -> None:
    """Write into a card what its model loses, on the texts that ``tested`` names."""
    text = card.read_text(encoding="utf-8")
    row = f"| held-out loss | {_lost(losses)} |"
    found = re.search(r"^\| held-out loss(, before the healing)? \| .* \|$", text, re.MULTILINE)
    if found is None:
        return
    kept = f"{found[0]}\n" if found[1] else ""
    text = f"{text[: found.start()]}{kept}{row}{text[found.end() :]}"
    steps = _HISTORY.search(text)
    if steps:
        text = f"{text[: steps.end() - 1]}{_LOST}{_lost(losses)}{text[steps.end() - 1 :]}"
    before, after, *_ = losses
    rewrite(card, with_results(text, loss_results(after, before, tested)).encode())

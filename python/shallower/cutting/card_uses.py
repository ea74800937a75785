"""What a cut is for, and how it is loaded, in the words of its card."""

import shlex

from ..values.plan import Plan
from .exports import CutFacts

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
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments})
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
    return _LOADED.format(serve=serve, **words)

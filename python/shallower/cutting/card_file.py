"""The file of a model card: its front matter, read and written, and the text below it."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CARD_FILE = "README.md"
"""The name under which the hub shows a card."""

_CARRIED_KEYS = ("license", "license_name", "license_link", "language")
_TAGS = ("shallower", "layer-pruning")
_MAX_CARD_BYTES = 1 << 20
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Read a model card: the words in its front matter by their keys, and the text below it.

    Args:
        path: the card; a file that is not there, or larger than 1 MiB, counts as empty.

    Returns:
        Strings and lists of strings by key, and the text. What is not front matter is text.
    """
    if not path.is_file():
        return {}, ""
    if path.stat().st_size > _MAX_CARD_BYTES:
        warnings.warn(f"{path} is left out: it is too large for a model card", stacklevel=2)
        return {}, ""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    found = FRONT_MATTER.match(text)
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


def front_matter(
    inherited: Mapping[str, Any],
    *,
    base: str | None,
    relation: str,
    library: str,
    tags: Sequence[str] = (),
) -> str:
    """Write the front matter of a cut, as the hub reads it.

    Args:
        inherited: the front matter of the source: its license, languages, task and tags go over.
        base: the hub id of the source. Where it has none, its own base model is the nearest
            ancestor that the hub knows.
        relation: to the base model: ``finetune``, ``quantized`` or ``adapter``, which are the
            hub's words; it has none for a model with fewer layers.
        library: what loads the cut.
        tags: more than those of every cut.

    Returns:
        The lines between the two ``---``.
    """
    base_model = base or inherited.get("base_model")
    theirs = inherited.get("tags", [])
    theirs = [theirs] if isinstance(theirs, str) else theirs
    metadata = {
        "base_model": base_model,
        "base_model_relation": relation if base_model else None,
        "library_name": library,
        "pipeline_tag": inherited.get("pipeline_tag", "text-generation"),
        **{key: inherited.get(key) for key in _CARRIED_KEYS},
        "tags": list(dict.fromkeys([*theirs, *_TAGS, *tags])),
    }
    return to_yaml({key: value for key, value in metadata.items() if value})


def to_yaml(value: Any) -> str:
    """Write a value as YAML, lists of words on one line."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None)

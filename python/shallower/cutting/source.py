"""The uncut model as a card names it: by its hub id or its own name, never by a path.

A path means nothing to readers of the card elsewhere, gives away the machine that wrote it, and
may be mistaken for a hub id. In commands the placeholder ``SOURCE`` stands for the folder of a
model whose hub id is unknown.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..values.identity import id_in_cache

CARD_FILE = "README.md"
"""The name under which the hub shows a card."""

PLACEHOLDER = "SOURCE"

GGUF_KEYS = {
    "general.file_type": "quantisation",
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
    "general.languages": "language",
    "general.tags": "tags",
    "general.base_model.0.repo_url": "base_model",
}
"""The keys of a GGUF file that a card names, and the card's words for them."""

FILE_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", None, None, None, "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S",
    "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS",
    "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M",
    "IQ4_XS", "IQ1_M", "BF16", None, None, None, "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0",
)  # fmt: skip
"""The quantisations of llama.cpp, by the number in ``general.file_type``."""

FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_MAX_CARD_BYTES = 1 << 20
_LICENSE = re.compile(r"(licen[sc]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)
_MAX_LICENSE_BYTES = 1 << 20
MAX_CARRIED_BYTES = 256 << 20
"""Of a file beside the weights, which is left out if it is larger."""
MODULES_FILE = "modules.json"
_OF_EMBEDDERS = (MODULES_FILE, "config_sentence_transformers.json", "sentence_bert_config.json")
_REPOSITORY = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True, slots=True)
class UncutModel:
    """The uncut model, as a card names it."""

    name: str  # its hub id, or the own name of its folder or GGUF file
    hub: str | None = None
    gguf: str | None = None  # the name of the GGUF file that was cut
    quantisation: str | None = None  # of the GGUF file, as `Q8_0`
    inherited: Mapping[str, Any] = field(default_factory=dict)  # front matter or metadata
    text: str = ""  # of its own card, below the front matter
    licenses: Mapping[str, Path] = field(default_factory=dict)  # files by name
    modules: Mapping[str, Path] = field(default_factory=dict)  # of an embedder, files by name

    @property
    def embeds(self) -> bool:
        """True of an embedder of sentence-transformers, with modules behind its decoder."""
        return any("/" in name for name in self.modules)

    @property
    def place(self) -> str:
        """Folder or repository in a command: the hub id, or ``SOURCE``."""
        return self.hub or PLACEHOLDER


def place_name(word: str | Path) -> str:
    """The last part of a place on this machine; any other word as it is."""
    word = str(word)
    if word in (".", ".."):
        return Path(word).resolve().name
    is_place = "/" in word and (word[:1] in "/.~" or Path(word).exists())
    return Path(word).name if is_place else word


def typed_place(word: str | Path) -> str:
    """A place as it was typed, if it lies below the current folder; else as :func:`place_name`."""
    path, word = Path(word), str(word)
    is_below = path.name and ".." not in path.parts and not path.is_absolute() and word[0] != "~"
    return word if is_below else place_name(word)


def find_source(
    named: str | Path,
    *,
    gguf_file: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    from_hub: bool = False,
) -> UncutModel:
    """Find what a card says of a model, which was loaded from a folder, a hub id or a GGUF file.

    ``metadata`` are values of :data:`GGUF_KEYS`. A name in the form of a hub id is one if
    ``from_hub``, or if the hub's cache holds it: else it may be the path of a folder that is gone.
    """
    path = Path(named).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        path, gguf_file = path.parent, path.name
    hub = hub_id(str(path))
    cached = snapshot(hub, gguf_file) if hub and not path.is_dir() else None
    if hub and not (path.is_dir() or cached or from_hub):
        hub = None
    folder = path if path.is_dir() else cached
    from_gguf = _in_words(metadata or {})
    quantisation = from_gguf.pop("quantisation", None)
    card = _card_of(folder, gguf_file) if folder else None
    inherited, text = read_card(card) if card else ({}, "")
    # A folder of GGUF files may be of many models, and its license of any.
    owns_license = folder is not None and (gguf_file is None or bool(inherited))
    return UncutModel(
        name=Path(gguf_file).name if gguf_file else hub or path.resolve().name,
        hub=hub,
        gguf=gguf_file,
        quantisation=quantisation,
        inherited={**from_gguf, **inherited},
        text=text,
        licenses=_licenses(folder) if folder and owns_license else {},
        modules=_modules(folder) if folder and gguf_file is None else {},
    )


def hub_id(source: str) -> str | None:
    """The hub id of a name, or of a path into the hub's cache; None for other paths."""
    for path in (source, str(Path(source).resolve())):
        if cached := id_in_cache(path):
            return cached
    named = HUB_ID.fullmatch(source) and not source.endswith(".gguf")
    return source if named and not Path(source).exists() else None


def snapshot(hub: str, gguf_file: str | None = None) -> Path | None:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    name = gguf_file or "config.json"
    found = try_to_load_from_cache(hub, name)
    return Path(str(found).removesuffix(name)) if isinstance(found, str) else None


def card_at(place: Path) -> Path:
    """The card of a local model, a folder or a GGUF file; it need not exist."""
    is_file = place.suffix == ".gguf" and not place.is_dir()
    return _card_of(place.parent, place.name) if is_file else place / CARD_FILE


def _card_of(folder: Path, gguf_file: str | None) -> Path:
    """The card of a model; a folder's README may be of anything, beside a GGUF file above all."""
    shared = folder / CARD_FILE
    own = (folder / gguf_file).with_suffix(f".{CARD_FILE}") if gguf_file else shared
    return shared if not own.is_file() and read_card(shared)[0] else own


def _licenses(folder: Path) -> dict[str, Path]:
    """The files in a folder that hold its license."""
    names = [file.name for file in sorted(folder.iterdir()) if _LICENSE.fullmatch(file.name)]
    return _own(folder, names, _MAX_LICENSE_BYTES)


def _modules(folder: Path) -> dict[str, Path]:
    """The files in a folder that make an embedder of its decoder."""
    inner = [file for name in module_folders(folder) for file in (folder / name).glob("*")]
    names = (file.relative_to(folder).as_posix() for file in sorted(inner))
    return _own(folder, [*_OF_EMBEDDERS, *names], MAX_CARRIED_BYTES)


def module_folders(folder: Path, there: Iterable[str] | None = None) -> set[str]:
    """The subfolders behind an embedder's decoder that are ``there``, as ``1_Pooling``.

    None where ``modules.json`` places the decoder in a subfolder, too.
    """
    try:
        modules = json.loads((folder / MODULES_FILE).read_text(encoding="utf-8"))
        paths = {module["path"] for module in modules}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    if there is None:
        there = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return paths.intersection(there) if "" in paths else set()


def _own(folder: Path, names: Iterable[str], most: int) -> dict[str, Path]:
    """The files among names in a folder that lie within it and have at most so many bytes."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        root = root.parents[1]
    return {
        name: file
        for name, file in ((name, folder / name) for name in names)
        if file.is_file() and file.resolve().is_relative_to(root) and file.stat().st_size <= most
    }


def _in_words(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a GGUF file in a card's words."""
    from_gguf = {word: metadata.get(key) for key, word in GGUF_KEYS.items()}
    number = from_gguf.pop("quantisation")
    from_gguf = {
        word: value for word, value in from_gguf.items() if value and not isinstance(value, int)
    }
    if isinstance(number, int) and 0 <= number < len(FILE_TYPES):
        from_gguf["quantisation"] = FILE_TYPES[number]
    repository = _REPOSITORY.fullmatch(str(from_gguf.pop("base_model", "")))
    if repository:
        from_gguf["base_model"] = repository[1]
    return from_gguf


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The strings and lists of strings in a card's front matter, and the text below it.

    A file that is not there, or larger than 1 MiB, counts as empty.
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

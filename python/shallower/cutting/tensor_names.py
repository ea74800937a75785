"""Layers and experts in the files of a checkpoint: in the names of tensors, and in the config.

Plain names and JSON values; it loads no torch and opens no file. Quantisation configs differ from
tool to tool, but all name modules in lists or as keys. A name that counts a layer or an expert is
renumbered wherever it stands, and goes if that goes.
"""

import copy
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..values.experts import DroppedExperts

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""The keys of a config under which modules are named."""

SINGLE_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,9})(?=\.|$)")
"""In the name of a tensor or module in a layer, the number of the one expert that it is of."""

_VOLATILE = ("transformers_version", "dtype", "torch_dtype", *QUANTISATION_KEYS)


def find_prefix(names: Iterable[str], path: str, num_layers: int, *, num_more: int = 0) -> str:
    """Find the prefix of the layers' tensors in a checkpoint, such as ``model.layers.``.

    ``path`` is where the model has its layers; a checkpoint without head lacks its first part.
    The list may have another name, and its owners another order (Kimi K2.5). Behind the layers may
    lie ``num_more`` for multi-token prediction.
    """
    numbers: dict[str, set[int]] = {}
    *owners, last = path.split(".")
    pattern = re.compile(rf"(?:^|\.){re.escape(last)}\.(\d{{1,9}})(?:\.|$)")
    for name in names:
        for match in pattern.finditer(name):
            numbers.setdefault(name[: match.start(1)], set()).add(int(match[1]))
        *inner, number = name.split(".")[: len(owners) + 2]
        if inner[1:] and sorted(inner[:-1]) == sorted(owners) and re.fullmatch(r"\d{1,9}", number):
            numbers.setdefault(".".join([*inner, ""]), set()).add(int(number))
    prefixes = [f"{tail}." for tail in _tails(path)]
    whole = [prefix for prefix, found in numbers.items() if found == set(range(num_layers))]
    prefix = next((prefix for prefix in prefixes if prefix in numbers), None)
    if prefix is None and len(whole) == 1:
        prefix = whole[0]
    if prefix is None:
        raise ModelError(
            f"no tensors of the layers {path}.0 .. {path}.{num_layers - 1} in the checkpoint; what "
            f"is counted there: {', '.join(sorted(numbers)[:5]) or 'nothing'}"
        )
    wrong = sorted(numbers[prefix] ^ set(range(num_layers)))
    if wrong and wrong != list(range(num_layers, num_layers + num_more)):
        raise ModelError(
            f"the config counts {num_layers} layers, and the checkpoint "
            f"{'lacks' if wrong[0] < num_layers else 'also has'} {prefix}{wrong[0]}"
            f"{f'; of extra layers it counts {num_more}' if num_more else ''}"
        )
    return prefix


def name_under(name: str, prefix: str, other: str) -> str:
    """The name of a tensor where the layers have the prefix ``other`` instead of ``prefix``."""
    ours, theirs = prefix.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    head, inner = ".".join(ours), name
    if head and name.startswith(f"{head}."):
        inner = name.removeprefix(f"{head}.")
    return ".".join([*theirs, inner])


def _tails(path: str) -> Iterator[str]:
    """A dotted path without its first part, its first two, and so on, longest first."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def check_alike(layers: Sequence[Mapping[str, str]], kinds: Sequence[object]) -> None:
    """Refuse a layer that lacks tensors which another one of its kind has: ModelError names both.

    ``layers`` are dtypes by name. A module may be quantised in one layer and plain in another, so
    only tensors of one set of dtypes are compared.
    """
    modules: dict[tuple[int, str], dict[str, str]] = {}
    stems: dict[object, set[str]] = {}
    for index, layer in enumerate(layers):
        for name, dtype in layer.items():
            stem = module_of(name)
            modules.setdefault((index, stem), {})[name] = dtype
            stems.setdefault(kinds[index], set()).add(stem)
    for kind, names in stems.items():
        alike = [index for index, other in enumerate(kinds) if other == kind]
        for stem in sorted(names):
            _check_module([(index, modules.get((index, stem), {})) for index in alike])


def _check_module(forms: Sequence[tuple[int, Mapping[str, str]]]) -> None:
    distinct: dict[tuple[tuple[str, str], ...], int] = {}
    for index, form in forms:
        distinct.setdefault(tuple(sorted(form.items())), index)
    for poor, index in distinct.items():
        for rich, other in distinct.items():
            if set(poor) < set(rich):
                name = min(set(rich) - set(poor))[0]
                raise ModelError(
                    f"layer {index} lacks the tensor {name}, which layer {other} has: the "
                    f"checkpoint is incomplete, fetch it again"
                )


def module_of(name: str) -> str:
    """Path of the module of a tensor, which may be one of bitsandbytes' states of a weight."""
    head, weight, _ = name.partition(".weight.")
    return head if weight else name.rpartition(".")[0]


def edit_config(
    raw: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    aliases: Mapping[str, str],
) -> dict[str, Any]:
    """Change in the JSON of a config what differs between two states of it, and nothing else.

    ``raw`` is the file, ``before`` and ``after`` all values as transformers reads them; ``aliases``
    maps other names of keys to the keys. A mapping by layers is replaced as a whole.
    """
    edited = {key: value for key, value in raw.items() if key in after or key not in before}
    for name, value in after.items():
        if name in before and before[name] == value:
            continue
        there = [
            key for key in (name, *(a for a, of in aliases.items() if of == name)) if key in raw
        ]
        for key in there or [name]:  # under several names, all of which some loader reads
            old = before.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and not all(map(_is_number, old)):
                edited[key] = edit_config(raw.get(key) or {}, old, value, aliases=aliases)
            else:
                edited[key] = value
    return edited


def _is_number(key: Any) -> bool:
    return str(key).isdecimal()


def same_config(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two configs, as JSON, differ in versions, dtypes and private keys alone."""
    return bool(_essence(left) == _essence(right))


def _essence(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = ((k, v) for k, v in value.items() if k not in _VOLATILE and str(k)[:1] != "_")
        return {key: _essence(item) for key, item in items}
    return [_essence(item) for item in value] if isinstance(value, list | tuple) else value


class Renumbering:
    """The names of modules after a cut; ``paths`` lead to the layers, ``survivors`` ascend."""

    def __init__(
        self, paths: Iterable[str], survivors: Sequence[int], experts: DroppedExperts | None = None
    ) -> None:
        tails = {f"{tail}." for path in paths for tail in _tails(path)}
        self._prefixes = sorted(tails, key=len, reverse=True)
        self._places = {str(old): new for new, old in enumerate(survivors)}
        by_layer = {} if experts is None else {one: experts.kept(one) for one in experts.by_layer}
        self._kept = {str(layer): kept for layer, kept in by_layer.items()}

    def rename(self, name: str) -> str | None:
        """The new name of a module; None if its layer or expert goes."""
        for prefix in self._prefixes:
            number, dot, tail = name.removeprefix(prefix).partition(".")
            if not name.startswith(prefix) or not number.isdecimal():
                continue
            place, kept = self._places.get(number), self._kept.get(number)
            expert = SINGLE_EXPERT.search(tail) if kept else None
            if kept and expert:
                if int(expert[1]) not in kept:
                    return None
                new = kept.index(int(expert[1]))
                tail = f"{tail[: expert.start(1)]}{new}{tail[expert.end(1) :]}"
            return None if place is None else f"{prefix}{place}{dot}{tail}"
        return name

    def edit(self, value: Any) -> Any:
        """A copy of a quantisation config, or of a part, with the names of modules renumbered.

        Lists and mappings lose what names layers that go. Patterns stay.
        """
        if isinstance(value, dict):
            named = ((self.rename(key), item) for key, item in value.items())
            edited = {key: self.edit(item) for key, item in named if key is not None}
            if isinstance(groups := value.get("config_groups"), dict):
                edited["config_groups"] = self._groups(groups)
            return edited
        if isinstance(value, list):
            items = [self.rename(item) if isinstance(item, str) else item for item in value]
            return [self.edit(item) for item in items if item is not None]
        return copy.deepcopy(value)

    def _groups(self, groups: dict[str, Any]) -> dict[str, Any]:
        """Groups of compressed-tensors: one whose targets are all gone goes as well."""
        edited: dict[str, Any] = self.edit(groups)
        for name, group in groups.items():
            targets = isinstance(group, dict) and group.get("targets")
            if targets and not edited[name]["targets"]:
                del edited[name]
        return edited

    def check_patterns(self, value: Any, modules: Iterable[str]) -> None:
        """Refuse a quantisation config whose patterns would cover other modules after the cut."""
        what = "experts" if self._kept else "layers"
        patterns = sorted({one for one in _patterns(value) if self.rename(one[0]) == one[0]})
        pairs = [(old, new) for old in modules if (new := self.rename(old)) not in (None, old)]
        for text, regex in patterns if pairs else ():
            try:
                pattern = re.compile(regex)
            except re.error as error:
                raise ModelError(f"the regex {text!r} of the config is broken: {error}") from error
            for old, new in pairs:
                if bool(pattern.match(old)) != bool(pattern.match(new or "")):
                    raise ModelError(
                        f"the pattern {text!r} of the quantisation config distinguishes {what} by "
                        f"number: {old} would become {new}, which it treats otherwise; name the "
                        f"modules one by one instead"
                    )


_PREFIXES = ("re:", "+:", "-:")
"""Of the regexes of compressed-tensors and of GPTQModel."""


def _patterns(value: Any) -> Iterator[tuple[str, str]]:
    """The regexes and the patterns of file names, each as it stands there and as a regex."""
    if isinstance(value, str):
        if value.startswith(_PREFIXES):
            yield value, value.partition(":")[2]
        elif "*" in value:  # as ModelOpt has them
            yield value, fnmatch.translate(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _patterns(key)
            yield from _patterns(item)
        if isinstance(dynamic := value.get("dynamic"), dict):  # of GPTQModel, which needs no prefix
            yield from ((key, key) for key in dynamic if not key.startswith(_PREFIXES))
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item)

"""What a checkpoint has and its loaded model has not: towers, and heads of more tokens."""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from weakref import WeakSet

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

from ..errors import ModelError
from ..values.counts import counted
from ..values.estimates import format_size
from .loading import empty_model, layers_of, read_config
from .offload import places_in
from .source import ModelSource
from .stored_layers import Converted


class Unsaved(dict[str, tuple[int, int]]):
    """Stored tensors that no weight is made of: their number and bytes, by a prefix of names."""

    def to_json(self) -> dict[str, dict[str, int]]:
        """Give the counts by prefix."""
        return {one: {"tensors": number, "bytes": size} for one, (number, size) in self.items()}

    def __str__(self) -> str:
        parts = ((one, counted(n, "tensor"), format_size(size)) for one, (n, size) in self.items())
        return ", ".join(f"{one} ({number}, {size})" for one, number, size in parts)


def unsaved(model: PreTrainedModel | ModelSource) -> Unsaved:
    """Compare a model in memory, or one to be loaded, with its safetensors, where they are here."""
    loaded = None if isinstance(model, ModelSource) else model
    if isinstance(model, ModelSource):
        place, trusted = str(model.place.expanduser()), model.trust_remote_code
    else:
        place = str(model.name_or_path)  # whose own code has run, if it is of such
        trusted = type(model).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
    stored = {name: span for file in _files(place) for name, span in places_in(file).items()}
    lost = Unsaved()
    if not stored:
        return lost
    loaded = loaded or empty_model(place, trusted)
    whole = layers_of(read_config(place, trust_remote_code=trusted)) or 0
    weights = Converted(stored, get_model_conversion_mapping(loaded), loaded).sources
    used = {name for sources in weights.values() for name in sources}
    there = {part for name in used for part in _prefixes(name)}
    for name in sorted(stored.keys() - used):
        prefix = next((part for part in _prefixes(name) if part not in there), name)
        outer, _, last = prefix.rpartition(".")
        # Scales and buffers of modules that are there, what lies in a layer, and dropped layers.
        is_inner = prefix == name or any(map(str.isdecimal, outer.split(".")))
        is_dropped = f"{outer}.0" in there and last.isdecimal() and int(last) < whole
        if not (is_inner or is_dropped or name.endswith("inv_freq")):
            (start, stop), (number, size) = stored[name], lost.get(prefix, (0, 0))
            lost[prefix] = number + 1, size + stop - start
    return lost


_WARNED: "WeakSet[PreTrainedModel]" = WeakSet()


def warn_unsaved(model: PreTrainedModel) -> None:
    """Warn once of what a checkpoint has that is not in what is saved of its loaded model."""
    lost = Unsaved()
    with suppress(ModelError):  # the folder that it names is another one now
        lost = lost if model in _WARNED else unsaved(model)
    if lost:
        warnings.warn(
            f"transformers loads {model.name_or_path} without {lost}: what is saved is without "
            f"them; a cut of it as it is stored (shallower prune, without --dtype) keeps them",
            stacklevel=3,
        )
    _WARNED.add(model)


def _files(place: str) -> Iterator[str]:
    """The files that transformers loads weights from, where they are here."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            found = Path(str(cached_file(place, name, local_files_only=True)))
        except (OSError, ValueError):  # transformers raises them for what is not here
            continue
        names = [name]
        if name == SAFE_WEIGHTS_INDEX_NAME:
            names = json.loads(found.read_bytes())["weight_map"].values()
        files = {found.parent / Path(one).name for one in names}
        yield from (str(file) for file in sorted(files) if file.is_file())
        return


def _prefixes(name: str) -> Iterator[str]:
    """A dotted name's first part, its first two, and so on."""
    return accumulate(name.split("."), "{}.{}".format)

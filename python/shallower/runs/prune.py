"""A cut as the store remembers it."""

from pathlib import Path
from typing import Any

from ..cutting.exports import EXPORT_FILES, export_path
from ..models.source import ModelSource
from ..values.layers import Block
from ..values.plan import Plan
from .done import Output
from .inputs import model_inputs
from .store import Store


def cut_output(
    store: Store,
    model: str,
    layers: Plan | list[Block],
    *,
    out: Path,
    device_map: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    as_gguf: bool,
    **options: Any,
) -> Output:
    """Describe the output of :func:`shallower.prune`.

    The weights are known by their place and time of change: to hash them would take longer than
    to cut them.
    """
    names = None
    if out.suffix == ".gguf":
        names = (out.name, *(export_path(out, name).name for name in EXPORT_FILES))

    def inputs() -> dict[str, Any] | None:
        source = ModelSource(model, "auto", device_map, gguf_file, trust_remote_code)
        known = model_inputs(source, store, stat=True)
        if known is None:
            return None
        return {**known, "layers": layers, "as_gguf": as_gguf, **options}

    place = out if names is None else out.parent
    return Output(store, "prune", place, inputs, names=names)

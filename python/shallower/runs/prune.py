"""A cut as the cache remembers it."""

from pathlib import Path
from typing import Any

from ..cutting.exports import EXPORT_FILES, export_path
from ..models.source import ModelSource
from ..values.layers import Block
from ..values.plan import Plan
from .cache import Cache
from .cache_keys import model_inputs
from .outputs import Output


def cut_output(
    cache: Cache,
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

    Args:
        cache: where it is remembered.
        model: a local folder, a hub id, or a ``.gguf`` file.
        layers: the plan or the blocks that go.
        out: the folder or GGUF file that is written.
        device_map: where the model is loaded.
        gguf_file: a GGUF file in the folder or repository.
        trust_remote_code: run code that comes with the model.
        as_gguf: ``out`` is a folder for a GGUF file.
        options: the other options, as JSON has them.

    Returns:
        The output; that of a GGUF file is of use under its own name alone.
    """
    names = None
    if out.suffix == ".gguf":
        names = (out.name, *(export_path(out, name).name for name in EXPORT_FILES))

    def describe() -> dict[str, Any] | None:
        source = ModelSource(model, "auto", device_map, gguf_file, trust_remote_code)
        known = model_inputs(source, cache, stat=True)
        if known is None:
            return None
        told = layers.to_json() if isinstance(layers, Plan) else [one.to_json() for one in layers]
        return {**known, "layers": told, "names": names, "as_gguf": as_gguf, **options}

    is_gguf = as_gguf or names is not None
    place = out if names is None else out.parent
    return Output(cache, "prune", place, describe, names=names, movable=not is_gguf)


def written_at(done: dict[str, Any], out: Path) -> dict[str, Any]:
    """Name the files of an earlier cut by the place that they are asked for.

    Args:
        done: what :meth:`Pruned.to_json` gave.
        out: the folder or GGUF file.

    Returns:
        The same with other paths.
    """
    files = done["written"]
    if isinstance(files, str) and out.suffix != ".gguf":
        return {**done, "written": str(out)}
    names = [files] if isinstance(files, str) else files
    paths = [str(out.with_name(Path(name).name)) for name in names]
    return {**done, "written": paths[0] if len(paths) == 1 else paths}

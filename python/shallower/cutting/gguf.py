"""Cutting layers out of a GGUF file directly; sees the core, and neither torch nor gguf.

Nothing is dequantised or loaded: the tensors that stay keep their bytes, and of the metadata
only what speaks of layers changes. What it cannot describe is refused (``rust/gguf/rules.rs``).
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .._core import Gguf
from ..errors import OutputError, PlanError
from ..storage import check_free, new_file, write_file
from ..values.files import PLAN_FILE
from ..values.layers import Layers, blocks_of, dropped_layers
from ..values.plan import Plan
from .cards import CARD_FILE, EXPORT_FILES, export_path, exports, range_list, read_card

Progress = Callable[[int, int], Any]
"""Called with the bytes that are written, and those of the whole file."""


def prune_gguf(
    source: str | Path,
    layers: Layers,
    out: str | Path,
    overwrite: bool = False,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Write a GGUF file without some layers, whole or not at all, and what tells of it beside it.

    Args:
        source: a GGUF file of version 2 or 3, one file a model.
        layers: blocks, ranges or indices, 0-based.
        out: the new file, ending in ``.gguf``. Beside it lie the plan, a model card and what
            mergekit and llama.cpp need for the same cut (:func:`gguf_files`).
        overwrite: replace what is there, ``source`` too, once the new files are complete.
        plan: the plan that chose the layers, to be saved in place of a plain one. The model
            itself is not compared with it: a GGUF file does not tell its fingerprint.
        progress: called with the bytes written and their total. What it raises stops the cut.

    Returns:
        The plan that was carried out.

    Raises:
        LayersError: a layer that is not there, is named twice, or is the last one left.
        PlanError: a plan for another number of layers, or for other layers.
        ModelError: a file that is not there, damaged, split, or of an architecture or with
            metadata that cannot describe the survivors.
        OutputError: something is at ``out`` already, or it cannot be written to.
    """
    out = Path(out)
    if out.suffix != ".gguf":
        raise OutputError(f"{out}: a GGUF file is cut into a file whose name ends in .gguf")
    file, wanted = _open(source, layers, plan)
    texts = _exports(Path(source), wanted, out)
    for path in gguf_files(out)[1:]:
        check_free(path, overwrite)
    with ExitStack() as files:
        partial = files.enter_context(new_file(out, overwrite))
        wanted.save(files.enter_context(new_file(plan_path(out), overwrite)))
        for name, text in texts.items():
            beside = files.enter_context(new_file(export_path(out, name), overwrite))
            write_file(beside, text.encode())
        file.cut(list(wanted.survivors), partial, progress)
    return wanted


def _exports(source: Path, plan: Plan, out: Path) -> dict[str, str]:
    python = f"sh.prune_gguf({str(source)!r}, {range_list(plan)}, {out.name!r})"
    at = source.expanduser()
    own, shared = export_path(at, CARD_FILE), at.with_name(CARD_FILE)
    # The folder's README may be of anything: it is a model card by its front matter.
    card = shared if not own.is_file() and read_card(shared)[0] else own
    return exports(plan, str(source), python, source_card=card, gguf=out.name)


def plan_gguf(source: str | Path, layers: Layers, plan: Plan | None = None) -> Plan:
    """The plan that :func:`prune_gguf` would carry out, checked, with nothing written.

    Raises:
        LayersError, PlanError, ModelError: as :func:`prune_gguf`.
    """
    return _open(source, layers, plan)[1]


def count_gguf_layers(source: str | Path) -> int:
    """The number of decoder layers in a GGUF file, by its header alone.

    Raises:
        ModelError: as :func:`prune_gguf`.
    """
    return Gguf(Path(source).expanduser()).num_layers


def plan_path(out: str | Path) -> Path:
    """Where the plan of a cut lies: ``model.shallower_plan.json`` beside ``model.gguf``."""
    return export_path(Path(out), PLAN_FILE)


def gguf_files(out: str | Path) -> list[Path]:
    """All files of a cut: the GGUF file, its plan and the exports."""
    out = Path(out)
    return [out, plan_path(out), *(export_path(out, name) for name in EXPORT_FILES)]


def _open(source: str | Path, layers: Layers, plan: Plan | None) -> tuple[Gguf, Plan]:
    file = Gguf(Path(source).expanduser())
    if plan is not None and plan.num_layers != file.num_layers:
        raise PlanError(
            f"the plan is for {plan.num_layers} layers, {source} has {file.num_layers}: plan "
            f"again, or name the layers yourself"
        )
    dropped = dropped_layers(file.num_layers, layers)
    if plan is None:
        plan = Plan(file.num_layers, blocks_of(dropped))
    elif plan.dropped != dropped:
        raise PlanError(
            f"the plan drops the layers {list(plan.dropped)}, and {list(dropped)} are named: "
            f"name the plan's layers, or give no plan"
        )
    file.cut_size(list(plan.survivors))
    return file, plan

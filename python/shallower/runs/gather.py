"""Shards put together into the folder of the work: of a scan, or of an evaluation."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..reporting.charts.heat_map import draw_heat_map
from ..reporting.stories.evaluation import Values, evaluation_record
from ..scanning.scan import Scan
from ..scanning.shards import gather
from ..storage import check_apart, claimed, write_file
from ..values.files import EVAL_FILE, SCAN_FILE
from ..values.measured import Evaluation, gather_evaluation
from ..values.plan import Plan, key_of
from .store import Store


def gather_into(
    parts: Iterable[Path], out: Path, *, overwrite: bool = False
) -> tuple[Scan, list[Path]]:
    """Put shards together, and write the scan and its heat map; the shards stay.

    Returns the scan and the files. Raises as :func:`shallower.gather`, and OutputError.
    """
    parts = list(parts)
    check_apart(out / SCAN_FILE, [str(part) for part in parts if not part.is_dir()])
    with claimed(out / SCAN_FILE, overwrite):
        scanned = gather(parts)
        drawn = draw_heat_map(scanned, out)
        scanned.save(out / SCAN_FILE)
    return scanned, [out / SCAN_FILE, *drawn]


def gather_eval_into(
    parts: Iterable[Path], out: Path, *, store: Store, overwrite: bool = False
) -> Evaluation:
    """Put shards of an evaluation together, write and remember what was found; the shards stay.

    Raises ScanError as :func:`gather_evaluation`, and OutputError.
    """
    parts = list(parts)
    check_apart(out / EVAL_FILE, [str(part) for part in parts if not part.is_dir()])
    with claimed(out / EVAL_FILE, overwrite):
        found = gather_evaluation(parts)
        write_evaluation(out, found.values, found.model.dtype, plan=found.plan)
    keep_evaluation(found, store)
    return found


def write_evaluation(
    out: Path, values: Values, dtype: str, *, plan: Plan | None, overwrite: bool = True
) -> None:
    """Write what ``eval --json`` prints, unless that is there; OutputError if something else is."""
    record = evaluation_record(values, dtype, plan)
    place, content = out / EVAL_FILE, (json.dumps(record, indent=2) + "\n").encode()
    if not place.is_file() or place.read_bytes() != content:
        with claimed(place, overwrite):
            write_file(place, content)


def keep_evaluation(found: Evaluation, store: Store) -> None:
    """Remember what was found, as what one process measured."""
    for kind, sides in found.values.items():
        inputs = found.inputs[kind]
        for side, value in sides.items():
            key = None if inputs is None else {**inputs, **key_of(found.cuts[side])}
            store.put(kind, key, {kind: value.to_record(), "model": asdict(found.model)})

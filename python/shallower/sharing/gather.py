"""What shards give together, in the folder of the work."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..reporting.charts.heat_map import draw_heat_map
from ..reporting.stories.evaluation import Values, evaluation_record
from ..scanning.scan import Scan
from ..scanning.scan_file import scan_bytes
from ..scanning.shards import gather
from ..storage import check_apart, check_free, claimed, holds, write_file
from ..values.files import EVAL_FILE, HEAT_MAP_FILE, SCAN_FILE
from ..values.plan import Plan


def gather_into(
    parts: Iterable[Path], out: Path, *, overwrite: bool = False
) -> tuple[Scan, list[Path]]:
    """Put shards together, and write the scan and its heat map; the shards stay.

    Returns the scan and the files. Raises as :func:`shallower.gather`, and OutputError.
    """
    parts = list(parts)
    check_apart(out / SCAN_FILE, [str(part) for part in parts if not part.is_dir()])
    scanned = gather(parts)
    content = scan_bytes(scanned.contents)
    file = out / SCAN_FILE
    overwrite = overwrite or holds(file, content)
    for name in (SCAN_FILE, HEAT_MAP_FILE):
        check_free(out / name, overwrite)
    with claimed(file, overwrite):
        write_file(file, content)
        return scanned, [file, *draw_heat_map(scanned, out)]


def write_evaluation(
    out: Path, values: Values, dtype: str, *, plan: Plan | None, overwrite: bool = True
) -> None:
    """Write what ``eval --json`` prints, unless that is there; OutputError if something else is."""
    record = evaluation_record(values, dtype, plan)
    place, content = out / EVAL_FILE, (json.dumps(record, indent=2) + "\n").encode()
    if not holds(place, content):
        with claimed(place, overwrite):
            write_file(place, content)

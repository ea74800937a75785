"""Shards of a scan put together into the folder of the scan."""

from collections.abc import Iterable
from pathlib import Path

from ..reporting.charts.heat_map import draw_heat_map
from ..scanning.scan import Scan
from ..scanning.shards import gather
from ..storage import check_apart, claimed
from ..values.files import SCAN_FILE


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

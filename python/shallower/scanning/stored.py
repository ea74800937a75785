"""Scans in the store of results, found by the token ids of their texts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..settings.stages import ScanSettings
from ..values.entries import ResultStore, recalled
from ..values.identity import TextsIdentity
from .scan import Scan
from .scan_file import read_text, scan_text

LARGE_BYTES = 64 << 20
"""Samples of more bytes are not kept for others."""


def scan_inputs(
    texts: Sequence[TextsIdentity],
    looks: Sequence[int],
    settings: ScanSettings,
    *,
    num_rejected: int = 0,
) -> dict[str, Any]:
    """Name all that a scan depends on beside the model: the token ids, and the texts of a batch.

    ``num_rejected`` are the texts that it counts and has no tokens of.
    """
    return {
        "texts": [asdict(one) for one in texts],
        "looks": list(looks),
        "rejected": num_rejected,
        "positions": asdict(settings.positions),
        "metrics": list(settings.metrics),
        "experts": settings.experts,
    }


def known_scan(
    store: ResultStore | None, inputs: Mapping[str, Any], *, keep_samples: bool = False
) -> Scan | None:
    """Look a scan up, which may have to have its samples; CacheError for a damaged one."""
    known = None if store is None else store.get("scan", inputs)
    if known is None:
        return None
    contents = recalled(lambda one: read_text(one.get("content")), known, "a scan")
    return None if keep_samples and contents.samples is None else Scan(contents)


def keep_scan(store: ResultStore | None, inputs: Mapping[str, Any], scanned: Scan) -> None:
    """Keep a scan, unless its samples take too many bytes."""
    samples = scanned.contents.samples or {}
    if store is not None and sum(one.nbytes for one in samples.values()) <= LARGE_BYTES:
        store.put("scan", inputs, {"content": scan_text(scanned.contents)})

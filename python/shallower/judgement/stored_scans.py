"""Scans in the store of results, found by the token ids of their texts."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ScanError
from ..evaluation.kept import ResultStore
from ..memory.plan import fitting
from ..models.decoder import Decoder
from ..scanning.hidden_states import forward
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..scanning.scan_file import contents_of, scan_bytes
from ..texts.batches import AnyTexts, TokenBatches
from ..values.identity import TextsIdentity
from ..values.positions import Positions
from ..values.stage_settings import ScanSettings
from .trials import recalled

METRICS = ("angular", "cosine")
"""The metrics of a scan, if none are named."""

LARGE_BYTES = 64 << 20
"""Samples of more bytes are not kept for others."""


def scan_inputs(
    texts: Sequence[TextsIdentity],
    looks: Sequence[int],
    *,
    positions: Positions,
    metrics: Sequence[str],
    experts: bool = False,
    num_rejected: int = 0,
) -> dict[str, Any]:
    """Name all that a scan depends on beside the model: the token ids, and the texts of a batch.

    ``num_rejected`` are the texts that it counts and has no tokens of.
    """
    return {
        "texts": [asdict(one) for one in texts],
        "looks": list(looks),
        "rejected": num_rejected,
        "positions": asdict(positions),
        "metrics": list(metrics),
        "experts": experts,
    }


def known_scan(
    store: ResultStore | None, inputs: Mapping[str, Any], *, keep_samples: bool = False
) -> Scan | None:
    """Look a scan up, which may have to have its samples; CacheError for a damaged one."""
    known = None if store is None else store.get("scan", inputs)
    if known is None or (keep_samples and not known["samples"]):
        return None
    return recalled(_read, known, "a scan")


def keep_scan(store: ResultStore | None, inputs: Mapping[str, Any], scanned: Scan) -> None:
    """Keep a scan, unless its samples take too many bytes."""
    contents = scanned.contents
    size = sum(one.nbytes for one in (contents.samples or {}).values())
    if store is not None and size <= LARGE_BYTES:
        content = b64encode(scan_bytes(contents)).decode()
        store.put("scan", inputs, {"samples": contents.samples is not None, "content": content})


def _read(known: Mapping[str, Any]) -> Scan:
    try:
        return Scan(contents_of(b64decode(known["content"], validate=True), "it"))
    except ScanError as error:
        raise ValueError(str(error)) from error


def stored_scan(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    settings: ScanSettings,
    store: ResultStore,
    checkpoint: Path | None = None,
    progress: bool | None = None,
) -> Scan:
    """Scan texts, which are read twice, unless a command has scanned the same tokens.

    Samples are kept in the store, too, where that takes few bytes. Raises as
    :func:`shallower.scan`, and CacheError.
    """
    positions, experts = settings.positions, settings.experts
    tokens = fitting(decoder, settings.tokens, forward(positions, experts=experts))
    read = TokenBatches(tokenizer, texts, tokens)
    looks = [len(batch) for window in read.unpadded() for batch in window]
    inputs = scan_inputs(
        (read.identity,),
        looks,
        positions=positions,
        metrics=settings.metrics,
        experts=experts,
        num_rejected=read.num_rejected,
    )
    scanned = known_scan(store, inputs, keep_samples=settings.keep_samples)
    if scanned is None:
        pairs = len(decoder) * (len(decoder) + 1) // 2
        is_small = 4 * pairs * len(settings.metrics) * read.num_texts <= LARGE_BYTES
        scanned = scan(
            decoder,
            tokenizer,
            texts,
            settings=replace(
                settings,
                batch_size=tokens.texts,
                keep_samples=settings.keep_samples or (is_small and not experts),
            ),
            checkpoint=checkpoint,
            progress=progress,
        )
        keep_scan(store, inputs, scanned)
    if settings.keep_samples:
        return scanned
    return Scan(replace(scanned.contents, samples=None))

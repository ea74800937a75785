"""Contents of a scan: merged, written to a file, and read without loss.

The file is safetensors with a header in JSON. It holds the core's own bytes (``sums``, and ``cka``
if there is one), and the values of single samples if they are kept. Statistics of experts are the
core's bytes (``experts``), ratios of weights, and an entry in the header.
"""

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .._core import Cka, ExpertSums, Sums
from ..errors import ExpertsError, MetricError, PositionsError, ScanError, StatesError, why
from ..experts.statistics import ExpertStatistics
from ..settings.until import Settled
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import NAMED_REJECTIONS, Rejection
from ..values.positions import Positions
from ..values.schema import of_type, read

FORMAT = "shallower.scan.4"
"""The key of a scan file's metadata."""

T = TypeVar("T", Sums, Cka, ExpertSums)

Held = TypeVar("Held")

SUMS, CKA, EXPERTS = "sums", "cka", "experts"
"""The names of the core's bytes."""

AIMER, PAIRS = "experts.aimer", "experts.pairs"
"""The names of what the weights of experts say, and of the core's bytes of pairs of experts."""


Samples = Mapping[str, NDArray[np.float32]]
"""For each metric the sums over single sequences, (sequences, L(L+1)/2)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of a scan.

    Attributes:
        sums: the exact sums of every metric.
        rejections: the first of the samples that were left out, and why; no more than
            ``NAMED_REJECTIONS`` are kept.
        model: the model scanned, if a model was.
        texts: the texts behind it.
        samples: the values of single samples, if they are kept.
        cka: the sums for CKA, if the scan has it.
        positions: which tokens of the texts were compared, if that is known.
        settled: what a scan that stops when it is sure goes on with; only while it is not done.
        experts: the statistics of experts, if the scan has them.
        content: a hash of the weights of the model; only while it is not done.
    """

    sums: Sums
    rejections: tuple[Rejection, ...] = ()
    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    samples: Samples | None = None
    cka: Cka | None = None
    positions: Positions | None = None
    settled: Settled | None = None
    experts: ExpertStatistics | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rejections", tuple(self.rejections[:NAMED_REJECTIONS]))


def merged(parts: Sequence[Contents]) -> Contents:
    """Merge the contents of several scans, with the same bits in whatever order.

    ScanError: there is none, or they differ in layers, metrics, model or positions. StatesError:
    together they hold more than 2**31 samples.
    """
    if not parts:
        raise ScanError("there is no scan to merge")
    first = parts[0]
    sums = Sums(first.sums.num_states, first.sums.metrics)
    for part in parts:
        if (part.model and part.model.fingerprint) != (first.model and first.model.fingerprint):
            raise ScanError(
                f"cannot merge scans of different models: {first.model} and {part.model}"
            )
        if part.positions != first.positions:
            raise ScanError(
                f"cannot merge scans of different positions: {first.positions} and {part.positions}"
            )
        sums.merge(part.sums)
    return Contents(
        sums,
        tuple(rejection for part in parts for rejection in part.rejections),
        first.model,
        tuple(texts for part in parts for texts in part.texts),
        joined([part.samples for part in parts]),
        _added(sums.num_states, [part.cka for part in parts]),
        first.positions,
        experts=_experts([part.experts for part in parts]),
    )


def joined(parts: Sequence[Samples | None]) -> Samples | None:
    """The samples of several parts; None unless all have them."""
    kept = _if_all(parts)
    if kept is None:
        return None
    return {metric: np.concatenate([part[metric] for part in kept]) for metric in kept[0]}


def _if_all(parts: Sequence[Held | None]) -> list[Held] | None:
    """What parts hold; None unless all hold it."""
    held = [part for part in parts if part is not None]
    return held if len(held) == len(parts) else None


def _added(num_states: int, parts: Sequence[Cka | None]) -> Cka | None:
    """The sums of all parts for CKA; none, unless all have them."""
    if (held := _if_all(parts)) is None:
        return None
    total = Cka(num_states, held[0].batch_size)
    for part in held:
        total.merge(part)
    return total


def _experts(parts: Sequence[ExpertStatistics | None]) -> ExpertStatistics | None:
    """The statistics of all parts; none, unless all have them."""
    if (held := _if_all(parts)) is None:
        return None
    total = held[0].copy()
    for part in held[1:]:
        total.merge(part)
    return total


def scan_text(contents: Contents) -> str:
    """The file of a scan as text, for a value of JSON."""
    return b64encode(scan_bytes(contents)).decode()


def scan_bytes(contents: Contents) -> bytes:
    """The file of a scan."""
    from safetensors.numpy import save

    header: dict[str, Any] = {
        "rejections": [asdict(rejection) for rejection in contents.rejections],
        "model": asdict(contents.model) if contents.model else None,
        "texts": [asdict(texts) for texts in contents.texts],
        "positions": asdict(contents.positions) if contents.positions else None,
    }
    if contents.settled is not None:
        header["settled"] = contents.settled.to_json()
    if contents.content is not None:
        header["content"] = contents.content
    arrays: dict[str, NDArray[Any]] = {SUMS: np.frombuffer(contents.sums.to_bytes(), np.uint8)}
    if contents.cka is not None:
        arrays[CKA] = np.frombuffer(contents.cka.to_bytes(), np.uint8)
    if contents.experts is not None:
        header["experts"] = contents.experts.header()
        arrays[EXPERTS] = np.frombuffer(contents.experts.sums.to_bytes(), np.uint8)
        arrays[AIMER] = contents.experts.aimer
        if contents.experts.pairs is not None:
            arrays[PAIRS] = np.frombuffer(contents.experts.pairs.to_bytes(), np.uint8)
    for metric, values in (contents.samples or {}).items():
        arrays[_samples_name(metric)] = values
    header["sha256"] = digest(header, arrays)
    return save(arrays, metadata={FORMAT: json.dumps(header)})


def read_scan(path: str | Path) -> Contents:
    """Read a scan, and check it.

    ScanError: the file is not there, is truncated, damaged or of another version, or is not a scan.
    """
    from safetensors import safe_open

    with _reading(path):
        if not Path(path).is_file():
            raise ScanError(f"there is no scan file {path}")
        with safe_open(str(path), framework="numpy") as file:
            header = _header(path, file.metadata() or {})
            return _contents(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def read_text(text: Any) -> Contents:
    """Read what :func:`scan_text` gave; ScanError for anything else."""
    from safetensors.numpy import load

    with _reading("it"):
        content = b64decode(of_type(str, text), validate=True)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return _contents(_header("it", header["__metadata__"]), load(content))


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Raise what is wrong with a file, which is read meanwhile, as a ScanError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ScanError(
            f"{path} is truncated, or not a scan of shallower ({why(error, path)}): expected the "
            f"scan.safetensors that shallower scan or analyse wrote, or its folder"
        ) from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        ExpertsError,
        StatesError,
        MetricError,
        PositionsError,
    ) as error:
        raise ScanError(f"{path} is damaged, or not a scan of shallower: {why(error)}") from error


def digest(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """The SHA-256 of a scan file's header, but for the hash itself, and of its arrays."""
    hashed = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        hashed.update(name.encode() + array.tobytes())
    return hashed.hexdigest()


def _samples_name(metric: str) -> str:
    return f"{metric}.samples"


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of a scan; those of other versions are refused in words of their own."""
    if FORMAT in metadata:
        return of_type(dict, json.loads(metadata[FORMAT]))
    kind, _, number = FORMAT.rpartition(".")
    others = (re.fullmatch(re.escape(kind) + r"\.(\d{1,9})", key) for key in metadata)
    for found in filter(None, others):
        way = "scan again" if int(found[1]) < int(number) else "update shallower, or scan again"
        raise ScanError(
            f"{path} is a scan file of version {found[1]}, and this shallower reads version "
            f"{number}: {way}"
        )
    raise ValueError(f"its metadata has no {FORMAT}")


def _contents(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Contents:
    if header.pop("sha256") != digest(header, arrays):
        raise ValueError("its checksum does not fit its content")
    sums = _stored(Sums, SUMS, arrays.pop(SUMS))
    cka = None
    if CKA in arrays:
        cka = _stored(Cka, CKA, arrays.pop(CKA))
        if cka.num_states != sums.num_states or cka.samples > sums.count:
            raise ValueError("its sums for CKA are not of its samples")
    experts = None
    if EXPERTS in arrays:
        stored = _stored(ExpertSums, EXPERTS, arrays.pop(EXPERTS))
        pairs = arrays.pop(PAIRS, None)
        experts = ExpertStatistics.read(
            header["experts"],
            stored,
            pairs=None if pairs is None else _stored(ExpertSums, PAIRS, pairs),
            aimer=arrays.pop(AIMER),
        )
        if experts.layers[-1] >= sums.num_states - 1:
            raise ValueError(f"it has experts of layer {experts.layers[-1]}, which it has not")
    model = read(ModelIdentity | None, header["model"])
    if model and model.num_layers != sums.num_states - 1:
        raise ValueError(f"it is of {sums.num_states - 1} layers, its model has {model.num_layers}")
    return Contents(
        sums,
        read(tuple[Rejection, ...], header["rejections"]),
        model,
        read(tuple[TextsIdentity, ...], header["texts"]),
        _samples(arrays, sums),
        cka,
        read(Positions | None, header["positions"]),
        read(Settled | None, header.get("settled")),
        experts,
        read(str | None, header.get("content")),
    )


def _stored(kind: type[T], name: str, array: NDArray[Any]) -> T:
    """The core's sums of an array of their bytes."""
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{name}: expected 1-D uint8, got {array.ndim}-D {array.dtype}")
    try:
        return kind.from_bytes(array.tobytes())
    except ScanError as error:  # which does not know the file
        raise ValueError(str(error)) from error


def _samples(arrays: Mapping[str, NDArray[Any]], sums: Sums) -> Samples | None:
    names = {metric: _samples_name(metric) for metric in sums.metrics}
    if not arrays:
        return None
    if set(arrays) != set(names.values()):
        raise ValueError(f"it holds {sorted(arrays)}: expected {sorted(names.values())}, or none")
    shape = (sums.num_sequences, sums.num_states * (sums.num_states - 1) // 2)
    samples = {metric: arrays[name] for metric, name in names.items()}
    for metric, values in samples.items():
        if values.dtype != np.float32 or values.shape != shape:
            raise ValueError(
                f"{names[metric]}: expected float32 {shape}, got {values.dtype} {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{names[metric]}: a value is NaN or infinite")
    return samples

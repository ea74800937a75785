"""How alike the layers are: the scan, its storage, and scans of stored states.

Sees the Rust core and NumPy, no torch and no model. The core holds exact integer sums, so
a scan has the same bits at any number of threads, and merging is associative to the bit.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._core import Accumulator
from .artifacts import (
    NAMED_REJECTIONS,
    Block,
    ModelIdentity,
    Plan,
    Rejection,
    TextsIdentity,
    describe_rejections,
    from_fields,
    layer_number,
    of_type,
)
from .errors import (
    MetricError,
    RejectedSamplesWarning,
    ScanError,
    StatesError,
    ThreadsError,
)
from .selection import check_size
from .storage import write_file

FORMAT = "shallower.scan.2"
"""The key of a scan file's metadata."""

NORMS = "norms"
"""The name of the norms' sums beside those of the metrics."""

CHUNK_BYTES = 64 << 20
"""How much of an array goes to the core at a time."""

MAX_THREADS = 4096


class Scan:
    """Distances between all pairs of the L+1 states x^(0) .. x^(L), over samples.

    x^(l) is the input of layer l (0-based), x^(L) the output of the last layer before the
    final norm (2403.17887, §3). Made by :func:`shallower.scan` and
    :func:`shallower.analyse_states`; saved, loaded and merged without loss.

    Attributes:
        model: the model scanned, if a model was.
        texts: the texts behind it, one entry for each merged part.
        rejections: the first of the samples that were left out, and why.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        rejections: Sequence[Rejection] = (),
        model: ModelIdentity | None = None,
        texts: tuple[TextsIdentity, ...] = (),
    ) -> None:
        self._accumulator = accumulator
        self.rejections = tuple(rejections[:NAMED_REJECTIONS])
        self.model = model
        self.texts = texts

    def __repr__(self) -> str:
        return (
            f"Scan(num_layers={self.num_layers}, num_samples={self.num_samples}, "
            f"num_rejected={self.num_rejected}, metrics={self.metrics})"
        )

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return self._accumulator.num_states - 1

    @property
    def num_samples(self) -> int:
        """Samples in the means."""
        return self._accumulator.count

    @property
    def num_rejected(self) -> int:
        """Samples left out: no token, or a state with NaN, infinity or only zeros."""
        return self._accumulator.rejected

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics held, the deciding one first."""
        return tuple(self._accumulator.metrics)

    def mean(self, metric: str = "angular") -> NDArray[np.float64]:
        """The mean of ``metric`` over samples, (L+1, L+1) float64, symmetric.

        ``[l, m]`` compares x^(l) with x^(m): ``angular`` in [0, 1], 0 for equal
        directions; ``cosine`` in [-1, 1], 1 for equal directions. For l < m,
        ``relative_l2`` is |x^(m) - x^(l)| / |x^(l)| and ``norm_ratio`` |x^(m)| / |x^(l)|.

        Raises:
            MetricError: the scan does not hold the metric.
            StatesError: no sample was accepted.
        """
        return self._accumulator.mean(metric)

    def variance(self, metric: str = "angular") -> NDArray[np.float64]:
        """The sample variance (divisor S-1), (L+1, L+1) float64; NaN for one sample."""
        return self._accumulator.variance(metric)

    def stderr(self, metric: str = "angular") -> NDArray[np.float64]:
        """The standard error of the mean, (L+1, L+1) float64; NaN for one sample."""
        return np.sqrt(self.variance(metric) / self.num_samples)

    def norms(self) -> NDArray[np.float64]:
        """The mean norm of each state x^(0) .. x^(L), (L+1,) float64.

        Raises:
            StatesError: no sample was accepted.
        """
        return self._accumulator.norms()

    def best_block(self, n: int, metric: str | None = None) -> Block:
        """The block of ``n`` layers whose removal joins the most similar states.

        ``start = l*(n) = argmin_l d(l, l+n)`` over ``l = 0 .. L-n`` (2403.17887, eq. 6),
        the smallest of equals. The block's ``score`` is the mean distance of the pair
        (start, stop), for ``cosine`` ``1 - mean``, and ``stderr`` its standard error.

        Raises:
            LayersError: ``n`` is not in ``1 .. L-1``.
            MetricError: the scan does not hold the metric.
        """
        n = layer_number(n)
        metric = self._held(metric)
        check_size(self.num_layers, n)
        start = self._accumulator.best_start(metric, n)
        return self.scored(Block(start, start + n), metric)

    def scored(self, block: Block, metric: str | None = None) -> Block:
        """The block with its ``score`` and ``stderr``, as :meth:`best_block` gives them."""
        metric = self._held(metric)
        mean = float(self.mean(metric)[block.start, block.stop])
        stderr = float(self.stderr(metric)[block.start, block.stop])
        return Block(block.start, block.stop, 1 - mean if metric == "cosine" else mean, stderr)

    def plan(self, n: int, metric: str | None = None) -> Plan:
        """The plan that drops :meth:`best_block`."""
        return Plan(
            num_layers=self.num_layers,
            blocks=(self.best_block(n, metric),),
            strategy="similarity",
            metric=self._held(metric),
            model=self.model,
            texts=self.texts,
        )

    def _held(self, metric: str | None) -> str:
        if metric is None:
            return "angular" if "angular" in self.metrics else self.metrics[0]
        if metric not in self.metrics:
            raise MetricError(
                f"metric {metric!r} was not accumulated: the scan holds {self.metrics}"
            )
        return metric

    def save(self, path: str | Path) -> None:
        """Write the scan, whole or not at all: exact sums as safetensors.

        Raises:
            OutputError: the place cannot be written to.
        """
        from safetensors.numpy import save

        header = {
            "num_states": self._accumulator.num_states,
            "count": self.num_samples,
            "rejected": self.num_rejected,
            "metrics": list(self.metrics),
            "rejections": [asdict(rejection) for rejection in self.rejections],
            "model": asdict(self.model) if self.model else None,
            "texts": [asdict(texts) for texts in self.texts],
        }
        sums = {metric: self._accumulator.to_words(metric) for metric in self.metrics}
        sums[NORMS] = self._accumulator.norms_to_words()
        header["sha256"] = _digest(header, sums)
        write_file(Path(path), save(sums, metadata={FORMAT: json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> "Scan":
        """Read a scan.

        Raises:
            ScanError: the file is not there, is truncated or damaged, or is no scan.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if not Path(path).is_file():
                raise ScanError(f"there is no scan file {path}")
            with safe_open(str(path), framework="numpy") as file:
                return cls._from_file(file)
        except (SafetensorError, OSError) as error:
            raise ScanError(f"{path} is truncated, or is no scan of shallower: {error}") from error
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            StatesError,
            MetricError,
        ) as error:
            raise ScanError(f"{path} is no scan of shallower, or is damaged: {error}") from error

    @classmethod
    def _from_file(cls, file: Any) -> "Scan":
        described = (file.metadata() or {}).get(FORMAT)
        if described is None:
            raise ValueError(f"its metadata has no {FORMAT}")
        header = of_type(dict, json.loads(described))
        sums = {name: file.get_tensor(name) for name in (*header["metrics"], NORMS)}
        digest = header.pop("sha256")
        if digest != _digest(header, sums):
            raise ValueError("its checksum does not fit its content")
        if set(file.keys()) != set(sums):
            raise ValueError(f"it holds {sorted(file.keys())}, its header names {sorted(sums)}")
        num_states = of_type(int, header["num_states"])
        norms = sums.pop(NORMS)
        if norms.dtype != np.uint64 or norms.ndim != 1:
            raise ValueError("its norms are no words")
        pairs = num_states * (num_states - 1) // 2
        if any(words.dtype != np.uint64 or words.shape != (4 * pairs,) for words in sums.values()):
            raise ValueError(f"its sums are not those of {num_states} states")
        model = None if header["model"] is None else from_fields(ModelIdentity, header["model"])
        if model and model.num_layers != num_states - 1:
            raise ValueError(f"it is of {num_states - 1} layers, its model has {model.num_layers}")
        counts = of_type(int, header["count"]), of_type(int, header["rejected"])
        return cls(
            Accumulator.from_words(num_states, *counts, list(sums.items()), norms),
            [from_fields(Rejection, rejection) for rejection in header["rejections"]],
            model,
            tuple(from_fields(TextsIdentity, texts) for texts in header["texts"]),
        )

    @staticmethod
    def merge(scans: Iterable["Scan"]) -> "Scan":
        """One scan of all the samples of several, the same bits in whatever order.

        Raises:
            ScanError: there is none, or they differ in layers, metrics or model.
            StatesError: together they hold more than 2**31 samples.
        """
        scans = list(scans)
        if not scans:
            raise ScanError("there is no scan to merge")
        first = scans[0]
        accumulator = Accumulator(first.num_layers + 1, list(first.metrics), 1)
        for scan in scans:
            if (scan.model and scan.model.fingerprint) != (first.model and first.model.fingerprint):
                raise ScanError(
                    f"cannot merge scans of different models: {first.model} and {scan.model}"
                )
            accumulator.merge(scan._accumulator)
        return Scan(
            accumulator,
            [rejection for scan in scans for rejection in scan.rejections],
            first.model,
            tuple(texts for scan in scans for texts in scan.texts),
        )


def check_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics as a list.

    Raises:
        MetricError: a single string, an unknown metric, none, or one named twice.
    """
    if isinstance(metrics, str):
        raise MetricError(f"metrics must be a sequence of names, got the string {metrics!r}")
    return Accumulator(2, list(metrics), 1).metrics


class ScanBuilder:
    """A scan in the making: states go in batch by batch, and a :class:`Scan` comes out.

    Args:
        num_states: L+1.
        metrics: of ``angular``, ``cosine``, ``relative_l2``, ``norm_ratio``.
        threads: threads of the core, all by default.
        model: the model that the states come from.

    Raises:
        MetricError, StatesError, ThreadsError: what the arguments say cannot be done.
    """

    def __init__(
        self,
        num_states: int,
        metrics: Sequence[str],
        threads: int | None = None,
        model: ModelIdentity | None = None,
    ) -> None:
        names = check_metrics(metrics)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise ThreadsError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
        self._accumulator = Accumulator(num_states, names, threads)
        self._rejections: list[Rejection] = []
        self._model = model

    def add(
        self, states: Any, samples: Sequence[int] | NDArray[np.int64], state_first: bool = False
    ) -> None:
        """Add a C-contiguous batch, (B, L+1, D), or (L+1, B, D) if ``state_first``.

        ``samples`` are the (B,) indices by which rejected samples are named.
        """
        for sample, state, reason in self._accumulator.update(as_array(states), state_first):
            self._rejections.append(Rejection(int(samples[sample]), f"state {state} {reason}"))

    def resume(self, before: Scan, texts: TextsIdentity) -> None:
        """Take over an interrupted scan of the same model and metrics, and of ``texts``.

        Raises:
            ScanError: it is of another model, of other metrics or of other texts.
        """
        if before.model != self._model or before.metrics != tuple(self._accumulator.metrics):
            raise ScanError(
                f"it is of {before.model} by {', '.join(before.metrics)}, not of {self._model} by "
                f"{', '.join(self._accumulator.metrics)}"
            )
        if before.texts != (texts,):
            raise ScanError("it is of other texts")
        self._accumulator.merge(before._accumulator)
        self._rejections += before.rejections

    def reject(self, count: int, rejections: Sequence[Rejection]) -> None:
        """Count samples that never became states, the first of them by name."""
        self._accumulator.reject(count)
        self._rejections += rejections

    def so_far(self, texts: TextsIdentity) -> Scan:
        """The scan as it stands, to be saved and resumed."""
        return Scan(self._accumulator, self._rejections, self._model, (texts,))

    def finish(self, texts: tuple[TextsIdentity, ...] = ()) -> Scan:
        """The scan; warns of rejected samples.

        Raises:
            StatesError: no sample was accepted.
        """
        accepted, rejected = self._accumulator.count, self._accumulator.rejected
        named = sorted(self._rejections, key=lambda rejection: rejection.sample)
        if rejected:
            described = describe_rejections(rejected, accepted + rejected, named)
            if not accepted:
                raise StatesError(f"there is nothing to compare: {described}")
            warnings.warn(described, RejectedSamplesWarning, stacklevel=3)
        elif not accepted:
            raise StatesError("there are no samples to compare")
        return Scan(self._accumulator, named, self._model, texts)


def analyse_states(
    states: Any, metrics: Sequence[str] = ("angular",), threads: int | None = None
) -> Scan:
    """Compare stored hidden states, without a model.

    Args:
        states: (samples, L+1, D), a NumPy array or a torch tensor on the CPU, of float32,
            float16, bfloat16 or float64; an array of uint16 is read as bfloat16 bits. Read
            in place if C-contiguous as (samples, L+1, D) or (L+1, samples, D), else copied
            64 MiB at a time.
        metrics: of ``angular``, ``cosine``, ``relative_l2``, ``norm_ratio``.
        threads: threads of the core, all by default.

    Raises:
        StatesError: wrong shape or dtype, no samples, or none that can be compared. Single
            samples with NaN, infinity or zero vectors are counted and named in the result,
            with a warning.
        MetricError: an unknown metric, or one named twice.
        ThreadsError: ``threads`` is less than 1.
    """
    array = as_array(states)
    if array.ndim != 3:
        raise StatesError(f"states of shape {array.shape}: expected three axes (samples, L+1, D)")
    if len(array) == 0:
        raise StatesError("there are no samples to compare")
    builder = ScanBuilder(array.shape[1], metrics, threads)
    for start, chunk, state_first in _readable(array):
        builder.add(chunk, range(start, len(array)), state_first)
    return builder.finish()


def _digest(header: dict[str, Any], sums: dict[str, NDArray[np.uint64]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for metric, words in sums.items():
        digest.update(metric.encode() + words.tobytes())
    return digest.hexdigest()


def as_array(states: Any) -> NDArray[Any]:
    """A NumPy view of ``states``; bfloat16 becomes uint16 bits. Never copies a CPU tensor.

    Raises:
        StatesError: neither an array nor a dense tensor on the CPU.
    """
    if isinstance(states, np.ndarray):
        array = states
    elif "torch" in sys.modules and isinstance(states, sys.modules["torch"].Tensor):
        if states.device.type != "cpu":
            raise StatesError(f"states on {states.device}: bring them to the CPU first")
        tensor = states.detach()
        try:
            if str(tensor.dtype) == "torch.bfloat16":
                tensor = tensor.view(sys.modules["torch"].uint16)
            array = tensor.numpy()
        except (TypeError, RuntimeError) as error:
            raise StatesError(
                f"states of dtype {states.dtype}, layout {states.layout} cannot be read: {error}"
            ) from error
    else:
        raise StatesError(f"states must be a NumPy array or a torch tensor, got {type(states)}")
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype.newbyteorder("=") != array.dtype:
        raise StatesError(f"states of dtype {array.dtype}: expected the machine's byte order")
    return array


def _readable(array: NDArray[Any]) -> Iterable[tuple[int, NDArray[Any], bool]]:
    """Parts that the core can read: (first sample, part, whether the state axis is first)."""
    if array.flags.aligned and array.transpose(1, 0, 2).flags.c_contiguous:
        yield 0, array.transpose(1, 0, 2), True
        return
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        yield start, np.require(part, requirements=["C", "A"]), False

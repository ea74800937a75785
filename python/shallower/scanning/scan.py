"""How alike the layers are: the scan, and its storage.

Sees the Rust core and NumPy, no torch and no model. The core holds exact integer sums, so
a scan has the same bits at any number of threads, and merging is associative to the bit.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Accumulator, Cka, bootstrap
from ..errors import LayersError, MetricError, PositionsError, ScanError, StatesError, ThreadsError
from ..storage import write_file
from ..values.layers import Block, check_plan, check_size, layer_number
from ..values.plan import (
    NAMED_REJECTIONS,
    ModelIdentity,
    Plan,
    Rejection,
    TextsIdentity,
    positions_of,
)
from ..values.positions import Positions
from ..values.schema import from_fields, of_type

FORMAT = "shallower.scan.3"
"""The key of a scan file's metadata."""

NORMS = "norms"
"""The name of the norms' sums beside those of the metrics."""

MAX_THREADS = 4096

MAX_RESAMPLES = 2**31

Samples = Mapping[str, NDArray[np.float32]]
"""For each metric the sums over single sequences, (sequences, L(L+1)/2)."""


@dataclass(frozen=True, slots=True, eq=False)
class BootstrappedStart:
    """How sure the start of the best block of one size is.

    Attributes:
        start: l*(n), the start of :meth:`Scan.best_block`.
        probability: the share of resamples in which it is the best start as well.
        distribution: (L-n+1,) float64, the share of each start; their sum is 1.
    """

    start: int
    probability: float
    distribution: NDArray[np.float64]


class Scan:
    """Distances between all pairs of the L+1 states x^(0) .. x^(L), over samples.

    x^(l) is the input of layer l (0-based), x^(L) the output of the last layer before the
    final norm (2403.17887, §3). Made by :func:`shallower.scan` and
    :func:`shallower.analyse_states`; saved, loaded and merged without loss.

    Attributes:
        model: the model scanned, if a model was.
        texts: the texts behind it, one entry for each merged part.
        rejections: the first of the samples that were left out, and why.
        positions: which tokens of the texts were compared, if that is known.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        rejections: Sequence[Rejection] = (),
        model: ModelIdentity | None = None,
        texts: tuple[TextsIdentity, ...] = (),
        samples: Samples | None = None,
        cka: Cka | None = None,
        positions: Positions | None = None,
    ) -> None:
        self._accumulator = accumulator
        self._samples = samples
        self._cka = cka
        self.rejections = tuple(rejections[:NAMED_REJECTIONS])
        self.model = model
        self.texts = texts
        self.positions = positions

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
        """Samples in the means: tokens, or rows of stored states."""
        return self._accumulator.count

    @property
    def num_sequences(self) -> int:
        """The sequences that the samples are of; every sample is its own, if none were named."""
        return self._accumulator.num_sequences

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
        """The variance between sequences, (L+1, L+1) float64; NaN for one sequence.

        Of (s - m n) / n̄ with divisor G-1 over the G sequences: s is the sum over the n samples
        of one, m the mean over all samples, n̄ the mean of n. For sequences of one sample that
        is the sample variance.
        """
        return self._accumulator.variance(metric)

    def stderr(self, metric: str = "angular") -> NDArray[np.float64]:
        """The standard error of the mean, (L+1, L+1) float64; NaN for one sequence.

        The sequences are the independent units, the samples of one are not: the mean is a
        ratio of sums over sequences, √(variance / G) its error (Cochran, Sampling Techniques,
        ch. 6).
        """
        return np.sqrt(self.variance(metric) / self.num_sequences)

    def norms(self) -> NDArray[np.float64]:
        """The mean norm of each state x^(0) .. x^(L), (L+1,) float64.

        Raises:
            StatesError: no sample was accepted.
        """
        return self._accumulator.norms()

    @property
    def keeps_samples(self) -> bool:
        """Whether the values of single samples are kept, for :meth:`bootstrap`."""
        return self._samples is not None

    def samples(self, metric: str = "angular") -> NDArray[np.float32]:
        """The values of single samples, (S, L(L+1)/2) float32: the pairs (l, m), l < m, row
        by row, of every sample in the order they came. Where several samples are of one
        sequence, their sums: a row for each of the G sequences.

        Raises:
            MetricError: the scan does not hold the metric.
            ScanError: the scan keeps no samples.
        """
        metric = self._held(metric)
        if self._samples is None:
            raise ScanError(
                "the scan keeps only sums, not the values of single samples: scan with "
                "keep_samples=True (--keep-samples), and merge only scans that do"
            )
        return self._samples[metric]

    @property
    def cka(self) -> NDArray[np.float64]:
        """Linear CKA of all pairs of states, (L+1, L+1) float64, symmetric, in [-1, 1].

        Unlike the metrics it compares how samples lie towards one another. NaN for a state
        that was the same in all samples of each minibatch.

        Raises:
            ScanError: the scan was made without ``cka_batch``.
            StatesError: fewer than 4 samples were accepted.
        """
        return self._cka_sums.values()

    @property
    def cka_left_out(self) -> int:
        """Samples that no minibatch of :attr:`cka` holds: a last one of fewer than 4."""
        return self.num_samples - self._cka_sums.samples

    @property
    def _cka_sums(self) -> Cka:
        if self._cka is None:
            raise ScanError(
                "the scan holds no CKA: scan with cka_batch=64, say, and merge only scans that do"
            )
        return self._cka

    def best_block(self, n: int, metric: str | None = None) -> Block:
        """The block of ``n`` layers whose removal joins the most similar states.

        ``start = l*(n) = argmin_l d(l, l+n)`` over ``l = 0 .. L-n`` (2403.17887, eq. 6),
        the smallest of equals. The block's ``score`` is the mean distance of the pair
        (start, stop), for ``cosine`` ``1 - mean``, and ``stderr`` its standard error.

        Raises:
            LayersError: ``n`` is not in ``1 .. L-1``.
            MetricError: the scan does not hold the metric.
        """
        return self.best_blocks(n, 1, metric)[0]

    def best_blocks(self, n: int, k: int, metric: str | None = None) -> list[Block]:
        """The ``k`` best blocks of ``n`` layers, best first, as :meth:`best_block` scores them.

        Decided on the exact sums; of equals the smaller start comes first. All ``L-n+1``
        blocks there are, if ``k`` is more.

        Raises:
            LayersError: ``n`` is not in ``1 .. L-1``, or ``k`` is less than 1.
            MetricError: the scan does not hold the metric.
        """
        n, k = layer_number(n), layer_number(k)
        metric = self._held(metric)
        check_size(self.num_layers, n)
        if k < 1:
            raise LayersError(f"cannot name the best k = {k} blocks: expected at least 1")
        starts = self._accumulator.best_starts(metric, n, min(k, self.num_layers))
        return [self.scored(Block(start, start + n), metric) for start in starts]

    def scored(self, block: Block, metric: str | None = None) -> Block:
        """The block with its ``score`` and ``stderr``, as :meth:`best_block` gives them."""
        metric = self._held(metric)
        mean = float(self.mean(metric)[block.start, block.stop])
        stderr = float(self.stderr(metric)[block.start, block.stop])
        return Block(block.start, block.stop, 1 - mean if metric == "cosine" else mean, stderr)

    def bootstrap(
        self,
        num_resamples: int = 1000,
        seed: int = 0,
        metric: str | None = None,
        threads: int | None = None,
    ) -> dict[int, BootstrappedStart]:
        """How sure l*(n) is, for every ``n`` in ``1 .. L-1``.

        As many sequences as there are get drawn from them with replacement, with all their
        samples, and the best start of the mean over those is found, ``num_resamples`` times.
        The answer depends on the samples' values and the seed alone, not on threads, shards or
        the order of samples.

        Args:
            num_resamples: how many times.
            seed: 0 to 2**64 - 1.
            metric: what decides, as for :meth:`best_block`.
            threads: threads of the core, all by default.

        Raises:
            ScanError: the scan keeps no samples, or a single one; a number is out of range.
            MetricError: the scan does not hold the metric.
            ThreadsError: ``threads`` is out of range.
        """
        metric = self._held(metric)
        values = self.samples(metric)
        for name, value, least, most in (
            ("num_resamples", num_resamples, 1, MAX_RESAMPLES),
            ("seed", seed, 0, 2**64 - 1),
        ):
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if not is_integer or not least <= value <= most:
                raise ScanError(f"{name} = {value!r}: expected an integer, {least} to {most}")
        check_threads(threads)
        if self.num_sequences < 2:
            raise ScanError("a single sample cannot be resampled: scan at least 2")
        wins = bootstrap(values, self.num_layers + 1, metric, num_resamples, seed, threads)
        found = {}
        for n, counts in enumerate(wins, 1):
            distribution = np.array(counts) / num_resamples
            start = self.best_block(n, metric).start
            found[n] = BootstrappedStart(start, float(distribution[start]), distribution)
        return found

    def plan(self, n: int, metric: str | None = None) -> Plan:
        """The plan that drops :meth:`best_block`."""
        return self.best_plan(n, metric=metric)

    def best_plan(
        self,
        n: int,
        max_blocks: int = 1,
        protect_first: int = 0,
        protect_last: int = 0,
        metric: str | None = None,
    ) -> Plan:
        """The plan that drops ``n`` layers in blocks whose scores have the least sum.

        Found by dynamic programming over the exact sums. Of equals: fewer blocks, then
        smaller starts, then smaller stops.

        Args:
            n: layers to drop, all blocks together.
            max_blocks: blocks at most. At least one layer stays between two blocks: without
                it they would be one block, which joins another pair of states.
            protect_first: layers at the start that stay.
            protect_last: layers at the end that stay.
            metric: what decides, as for :meth:`best_block`.

        Raises:
            LayersError: ``n`` is not in ``1 .. L-1``, or fewer layers than ``n`` are free; a
                number is less than it can be.
            MetricError: the scan does not hold the metric.
        """
        metric = self._held(metric)
        demand = [layer_number(v) for v in (n, max_blocks, protect_first, protect_last)]
        check_plan(self.num_layers, *demand)
        demand[1] = min(demand[1], self.num_layers)
        blocks = self._accumulator.best_plan(metric, *demand)
        return Plan(
            num_layers=self.num_layers,
            blocks=tuple(self.scored(Block(*block), metric) for block in blocks),
            strategy="similarity",
            metric=metric,
            model=self.model,
            texts=self.texts,
            positions=self.positions,
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
            "lengths": list(self._accumulator.lengths),
            "rejected": self.num_rejected,
            "metrics": list(self.metrics),
            "rejections": [asdict(rejection) for rejection in self.rejections],
            "model": asdict(self.model) if self.model else None,
            "texts": [asdict(texts) for texts in self.texts],
            "positions": asdict(self.positions) if self.positions else None,
            "samples": self.keeps_samples,
            "cka": None,
        }
        arrays: dict[str, NDArray[Any]] = {}
        if self._cka is not None:
            header["cka"] = [self._cka.batch_size, self._cka.batches, self._cka.samples]
            arrays["cka"] = self._cka.to_words()
        for metric in self.metrics:
            arrays[metric] = self._accumulator.to_words(metric)
            if self._samples is not None:
                arrays[f"{metric}.samples"] = self._samples[metric]
        arrays[NORMS] = self._accumulator.norms_to_words()
        header["sha256"] = _digest(header, arrays)
        write_file(Path(path), save(arrays, metadata={FORMAT: json.dumps(header)}))

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
            PositionsError,
        ) as error:
            raise ScanError(f"{path} is no scan of shallower, or is damaged: {error}") from error

    @classmethod
    def _from_file(cls, file: Any) -> "Scan":
        described = (file.metadata() or {}).get(FORMAT)
        if described is None:
            raise ValueError(f"its metadata has no {FORMAT}")
        header = of_type(dict, json.loads(described))
        metrics = header["metrics"]
        kept = metrics if of_type(bool, header["samples"]) else []
        names = [*metrics, NORMS, *(f"{metric}.samples" for metric in kept)]
        if header["cka"] is not None:
            names.append("cka")
        if set(file.keys()) != set(names):
            raise ValueError(f"it holds {sorted(file.keys())}, its header names {sorted(names)}")
        arrays = {name: file.get_tensor(name) for name in names}
        if header.pop("sha256") != _digest(header, arrays):
            raise ValueError("its checksum does not fit its content")
        num_states = of_type(int, header["num_states"])
        alone, several, together, squares = (of_type(int, n) for n in header["lengths"])
        lengths = alone, several, together, squares
        norms = arrays[NORMS]
        if norms.dtype != np.uint64 or norms.ndim != 1:
            raise ValueError("its norms are no words")
        pairs = num_states * (num_states - 1) // 2
        sums = {metric: arrays[metric] for metric in metrics}
        shape = ((12 if several else 4) * pairs,)
        if any(words.dtype != np.uint64 or words.shape != shape for words in sums.values()):
            raise ValueError(f"its sums are not those of {num_states} states")
        samples = {metric: arrays[f"{metric}.samples"] for metric in kept}
        for values in samples.values():
            if values.dtype != np.float32 or values.shape != (alone + several, pairs):
                raise ValueError(f"its samples are not {alone + several} of {num_states} states")
            if not np.isfinite(values).all():
                raise ValueError("a value of its samples is NaN or infinite")
        cka = None
        if header["cka"] is not None:
            batch, batches, compared = (of_type(int, n) for n in header["cka"])
            if arrays["cka"].dtype != np.uint64 or not 0 <= compared <= alone + together:
                raise ValueError("its CKA is not of its samples")
            cka = Cka.from_words(num_states, batch, batches, compared, arrays["cka"])
        model = None if header["model"] is None else from_fields(ModelIdentity, header["model"])
        if model and model.num_layers != num_states - 1:
            raise ValueError(f"it is of {num_states - 1} layers, its model has {model.num_layers}")
        return cls(
            Accumulator.from_words(
                num_states, lengths, of_type(int, header["rejected"]), list(sums.items()), norms
            ),
            [from_fields(Rejection, rejection) for rejection in header["rejections"]],
            model,
            tuple(from_fields(TextsIdentity, texts) for texts in header["texts"]),
            samples if kept else None,
            cka,
            positions_of(header["positions"]),
        )

    @staticmethod
    def merge(scans: Iterable["Scan"]) -> "Scan":
        """One scan of all the samples of several, the same bits in whatever order.

        It keeps the values of single samples, and CKA, if all of them do. A sequence does not
        go on from one scan to another: with samples in two it counts as two.

        Raises:
            ScanError: there is none, or they differ in layers, metrics, model or positions.
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
            if scan.positions != first.positions:
                raise ScanError(
                    f"cannot merge scans of different positions: {first.positions} and "
                    f"{scan.positions}"
                )
            accumulator.merge(scan._accumulator)
        return Scan(
            accumulator,
            [rejection for scan in scans for rejection in scan.rejections],
            first.model,
            tuple(texts for scan in scans for texts in scan.texts),
            joined([scan._samples for scan in scans]),
            _added(first.num_layers + 1, [scan._cka for scan in scans]),
            first.positions,
        )


def joined(parts: Sequence[Samples | None]) -> Samples | None:
    """The samples of all parts; none, unless all have them."""
    kept = [part for part in parts if part is not None]
    if len(kept) < len(parts):
        return None
    return {metric: np.concatenate([part[metric] for part in kept]) for metric in kept[0]}


def _added(num_states: int, parts: Sequence[Cka | None]) -> Cka | None:
    """The sums of all parts for CKA; none, unless all have them."""
    held = [part for part in parts if part is not None]
    if len(held) < len(parts):
        return None
    total = Cka(num_states, held[0].batch_size, 1)
    for part in held:
        total.merge(part)
    return total


def check_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics as a list.

    Raises:
        MetricError: a single string, an unknown metric, none, or one named twice.
    """
    if isinstance(metrics, str):
        raise MetricError(f"metrics must be a sequence of names, got the string {metrics!r}")
    return Accumulator(2, list(metrics), 1).metrics


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot be started.

    Raises:
        ThreadsError: it is not 1 to 4096.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ThreadsError(f"threads must be 1 to {MAX_THREADS}, got {threads}")


def _digest(header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()

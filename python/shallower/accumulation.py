"""States into a scan, batch by batch; scans of stored states.

Sees the Rust core and NumPy, no torch and no model.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._core import Accumulator, Cka
from .artifacts import (
    NAMED_REJECTIONS,
    ModelIdentity,
    Rejection,
    TextsIdentity,
    describe_rejections,
)
from .cka import CkaBatches, check_batch
from .errors import RejectedSamplesWarning, ScanError, StatesError
from .positions import Positions
from .similarity import Samples, Scan, check_metrics, check_threads, joined
from .states_file import StatesFile

CHUNK_BYTES = 64 << 20
"""How much of an array goes to the core at a time."""

MANY_REJECTIONS = 10_000
"""Rejected samples that wait to be named, before all but the first are forgotten."""


class ScanBuilder:
    """A scan in the making: states go in batch by batch, and a :class:`Scan` comes out.

    Args:
        num_states: L+1.
        metrics: of ``angular``, ``cosine``, ``relative_l2``, ``norm_ratio``.
        threads: threads of the core, all by default.
        model: the model that the states come from.
        keep_samples: keep the values of single samples as well.
        cka_batch: samples in a minibatch for CKA, if that is wanted.
        positions: which tokens of a text the samples are, if they are.

    Raises:
        MetricError, StatesError, ThreadsError: what the arguments say cannot be done.
    """

    def __init__(
        self,
        num_states: int,
        metrics: Sequence[str],
        threads: int | None = None,
        model: ModelIdentity | None = None,
        keep_samples: bool = False,
        cka_batch: int | None = None,
        positions: Positions | None = None,
    ) -> None:
        names = check_metrics(metrics)
        check_threads(threads)
        if cka_batch is not None:
            check_batch(cka_batch)
        self._accumulator = Accumulator(num_states, names, threads)
        self._rejections: list[Rejection] = []
        self._samples: list[Samples] = []
        self._keep_samples = keep_samples
        self._model = model
        self._positions = positions
        self._last: tuple[np.int64, np.int64] | None = None  # the last sequence and its length
        self._cka = None if cka_batch is None else CkaBatches(num_states, cka_batch, threads)

    def add(
        self,
        states: Any,
        samples: Sequence[int] | NDArray[np.int64],
        state_first: bool = False,
        sequences: NDArray[np.int64] | None = None,
    ) -> None:
        """Add a C-contiguous batch, (B, L+1, D), or (L+1, B, D) if ``state_first``.

        ``samples`` are the (B,) indices by which rejected samples are named. ``sequences``,
        (B,) int64, says which of them are of one sequence: neighbours with the same number.
        One goes on in the next batch if that begins with its number.

        Raises:
            StatesError: a sequence has more than 2**20 samples.
        """
        accumulator, array = self._accumulator, as_array(states)
        rejected, kept, goes_on = accumulator.update(
            array, state_first, self._keep_samples, sequences
        )
        if self._cka is not None:
            by_sample = array.transpose(1, 0, 2) if state_first else array
            self._cka.add(by_sample, [sample for sample, _, _ in rejected])
        if goes_on and kept is not None:
            self._drop_last_kept()
        if kept is not None:
            self._samples.append(dict(zip(accumulator.metrics, kept, strict=True)))
        places = None
        if sequences is not None and self._positions is not None and len(sequences):
            places = self._places(sequences)
        for sample, state, reason in rejected:
            token = "" if places is None else f" of compared token {places[sample]}"
            self._rejections.append(
                Rejection(int(samples[sample]), f"state {state}{token} {reason}")
            )
        if len(self._rejections) > MANY_REJECTIONS:
            self._rejections = _first(self._rejections)[:NAMED_REJECTIONS]

    def _places(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of every sample in its sequence, which may have begun in an earlier batch."""
        starts = np.flatnonzero(np.concatenate([[True], sequences[1:] != sequences[:-1]]))
        lengths = np.diff(starts, append=len(sequences))
        places = np.arange(len(sequences)) - np.repeat(starts, lengths)
        if self._last is not None and self._last[0] == sequences[0]:
            places[: lengths[0]] += self._last[1]
        self._last = sequences[-1], places[-1] + 1
        return places

    def _drop_last_kept(self) -> None:
        """Forget the sum over a sequence that has gone on since."""
        while not all(map(len, self._samples[-1].values())):
            self._samples.pop()
        last = self._samples.pop()
        self._samples.append({metric: sums[:-1] for metric, sums in last.items()})

    def resume(self, before: Scan, texts: TextsIdentity) -> None:
        """Take over an interrupted scan of the same model, metrics and positions, and of ``texts``.

        Raises:
            ScanError: it is of another model, of other metrics, positions or texts.
        """
        if before.model != self._model or before.metrics != tuple(self._accumulator.metrics):
            raise ScanError(
                f"it is of {before.model} by {', '.join(before.metrics)}, not of {self._model} by "
                f"{', '.join(self._accumulator.metrics)}"
            )
        if before.positions != self._positions:
            raise ScanError(f"it is of the positions {before.positions}, not {self._positions}")
        if before.texts != (texts,):
            raise ScanError("it is of other texts")
        if before.keeps_samples != self._keep_samples:
            kept = "keeps" if before.keeps_samples else "does not keep"
            raise ScanError(f"it {kept} the values of single samples")
        if before._samples is not None:
            self._samples.append(before._samples)
        self._accumulator.merge(before._accumulator)
        self._rejections += before.rejections

    def reject(self, count: int, rejections: Sequence[Rejection]) -> None:
        """Count samples that never became states, the first of them by name."""
        self._accumulator.reject(count)
        self._rejections += rejections

    def so_far(self, texts: TextsIdentity) -> Scan:
        """The scan as it stands, to be saved and resumed."""
        return self._scan(_first(self._rejections), (texts,), None)

    def finish(self, texts: tuple[TextsIdentity, ...] = ()) -> Scan:
        """The scan; warns of rejected samples.

        Raises:
            StatesError: no sample was accepted.
        """
        accepted, rejected = self._accumulator.count, self._accumulator.rejected
        named = _first(self._rejections)
        if rejected:
            described = describe_rejections(rejected, accepted + rejected, named)
            if not accepted:
                raise StatesError(f"there is nothing to compare: {described}")
            warnings.warn(described, RejectedSamplesWarning, stacklevel=3)
        elif not accepted:
            raise StatesError("there are no samples to compare")
        return self._scan(named, texts, self._cka.finish() if self._cka else None)

    def _scan(
        self,
        rejections: Sequence[Rejection],
        texts: tuple[TextsIdentity, ...],
        cka: Cka | None,
    ) -> Scan:
        samples = joined(self._samples) if self._samples else None
        return Scan(
            self._accumulator, rejections, self._model, texts, samples, cka, self._positions
        )


def _first(rejections: list[Rejection]) -> list[Rejection]:
    return sorted(rejections, key=lambda rejection: rejection.sample)


def analyse_states(
    states: Any,
    metrics: Sequence[str] = ("angular",),
    threads: int | None = None,
    keep_samples: bool = False,
    cka_batch: int | None = None,
    sequences: ArrayLike | None = None,
    progress: bool | None = None,
    tensor: str | None = None,
) -> Scan:
    """Compare stored hidden states, without a model.

    Args:
        states: (samples, L+1, D), a NumPy array or a torch tensor on the CPU, of float32,
            float16, bfloat16 or float64; an array of uint16 is read as bfloat16 bits. Read
            in place if C-contiguous as (samples, L+1, D) or (L+1, samples, D), else copied
            64 MiB at a time. Or the path of a file of them, ``.npy`` or ``.safetensors``, which
            is read in constant memory; one that ``scan`` kept gives that scan again.
        metrics: of ``angular``, ``cosine``, ``relative_l2``, ``norm_ratio``.
        threads: threads of the core, all by default.
        keep_samples: keep the values of single samples for :meth:`Scan.bootstrap`, 4 bytes
            times samples times L(L+1)/2 a metric, in memory and in the file: 22 MB for
            10,000 samples of 33 layers.
        cka_batch: also find linear CKA, from minibatches of so many consecutive samples, 4 to
            1024; a last one of fewer than 4 is left out. See :attr:`Scan.cka`.
        sequences: (samples,) integers, which sequence a sample is of, if several are of one:
            tokens of a text, say. Those of one sequence must follow each other. Standard
            errors are then clustered, and kept samples are sums over sequences. Every sample
            is its own sequence by default, or of the one that the file tells.
        progress: a bar with ETA on standard error; by default for a file, if that is a
            terminal.
        tensor: the name of the tensor in a safetensors file; by default ``hidden_states``, or
            else the only one of three axes.

    Raises:
        StatesError: a file that is not there, truncated or damaged; wrong shape or dtype, no
            samples, or none that can be compared. Single samples with NaN, infinity or zero
            vectors are counted and named in the result, with a warning.
        MetricError: an unknown metric, or one named twice.
        ThreadsError: ``threads`` is less than 1.
    """
    options = metrics, threads
    kept = keep_samples, cka_batch
    if isinstance(states, str | Path):
        with StatesFile(states, tensor) as file:
            origin = file.origin
            builder = ScanBuilder(file.shape[1], *options, origin.model, *kept, origin.positions)
            told = file.sequences() if sequences is None else sequences
            numbers = None if told is None else sequence_numbers(told, len(file))
            with closing(file.parts(threads)) as parts, _progress(len(file), progress) as advance:
                for part in parts:
                    stop = part.start + len(part)
                    here = None if numbers is None else numbers[part.start : stop]
                    builder.add(part.states, part.samples, sequences=here)
                    advance(len(part))
            builder.reject(origin.num_rejected, origin.rejections)
        return builder.finish(origin.texts)
    array = as_array(states)
    if tensor is not None:
        raise StatesError(f"there is no tensor {tensor!r} in an array: name one of a file")
    if array.ndim != 3:
        raise StatesError(f"states of shape {array.shape}: expected three axes (samples, L+1, D)")
    if len(array) == 0:
        raise StatesError("there are no samples to compare")
    numbers = None if sequences is None else sequence_numbers(sequences, len(array))
    builder = ScanBuilder(array.shape[1], *options, None, *kept)
    with _progress(len(array), bool(progress)) as advance:
        for start, chunk, state_first in _readable(array):
            stop = start + chunk.shape[1 if state_first else 0]
            here = None if numbers is None else numbers[start:stop]
            builder.add(chunk, range(start, stop), state_first, here)
            advance(stop - start)
    return builder.finish()


def _progress(total: int, show: bool | None) -> AbstractContextManager[Callable[[int], None]]:
    if show is False:
        return nullcontext(lambda _: None)
    from .progress import track

    return track("analyse", total, show)


def sequence_numbers(sequences: ArrayLike, num_samples: int) -> NDArray[np.int64]:
    """The numbers of the sequences of so many samples, (samples,) int64.

    Raises:
        StatesError: not an integer for each sample, or the samples of a sequence do not
            follow each other.
    """
    numbers = np.asarray(sequences)
    if numbers.shape != (num_samples,) or numbers.dtype.kind not in "iu":
        raise StatesError(
            f"sequences of shape {numbers.shape} and dtype {numbers.dtype}: expected an integer "
            f"for each of {num_samples} samples"
        )
    if numbers.dtype.kind == "u" and num_samples and numbers.max() >= 2**63:
        raise StatesError("a sequence has a number of 2**63 or more: number them from 0")
    numbers = np.require(numbers, np.int64, requirements=["C", "A"])
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1) != 0)
    _, firsts = np.unique(numbers[starts], return_index=True)
    if len(firsts) < len(starts):
        again = int(starts[np.setdiff1d(np.arange(len(starts)), firsts)[0]])
        raise StatesError(
            f"sequence {numbers[again]} comes again at sample {again}, after another one: the "
            f"samples of a sequence must follow each other"
        )
    return numbers


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
        raise StatesError(
            f"states must be a path, a NumPy array or a torch tensor, got {type(states)}"
        )
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

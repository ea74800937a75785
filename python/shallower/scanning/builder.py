"""States into a scan, batch by batch.

Sees the Rust core and NumPy, no torch and no model.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Accumulator, Cka
from ..errors import RejectedSamplesWarning, ScanError, StatesError
from ..values.plan import (
    NAMED_REJECTIONS,
    ModelIdentity,
    Rejection,
    TextsIdentity,
    describe_rejections,
)
from ..values.positions import Positions
from .cka import CkaBatches, check_batch
from .scan import Samples, Scan, check_metrics, check_threads, joined

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

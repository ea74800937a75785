"""ScanBuilder: parts of states into a scan, from any source, or on top of an interrupted one.

CKA is summed over minibatches. Sees the Rust core and NumPy, no torch and no model.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Accumulator, Cka, Sums, Threads
from ..errors import MetricError, RejectedSamplesWarning, ScanError, StatesError
from ..experts.statistics import ExpertStatistics
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import NAMED_REJECTIONS, Rejection, describe_rejections
from ..values.positions import Positions
from .scan import Scan
from .scan_file import Contents, Samples, joined

SECONDS_BETWEEN_CHECKPOINTS = 20.0

MANY_REJECTIONS = 10_000
"""Rejected samples that wait to be named, before all but the first are forgotten."""

MIN_BATCH, MAX_BATCH = 4, 1024
"""Samples of a minibatch of CKA."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive samples on their way into a scan: all sources yield the same parts.

    Attributes:
        states: (B, L+1, D), or (L+1, B, D) if ``state_first``: an array or a tensor on the CPU,
            C-contiguous. The source may overwrite it when it makes the next part.
        samples: (B,) int64, the numbers that name rejected samples.
        steps: progress of a bar: texts of a model's batch, else samples.
        state_first: which axis comes first.
        sequences: (B,) int64; neighbours with the same number are of one sequence. By default
            every sample is its own.
    """

    states: Any
    samples: NDArray[np.int64]
    steps: int
    state_first: bool = False
    sequences: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.samples)


class ScanBuilder:
    """A scan in the making: parts go in one by one, and a :class:`Scan` comes out.

    The threads of the core live as long as the builder, not as long as the scan. ``experts`` are
    statistics that grow elsewhere, and are part of the scan; ``content`` is a hash of the weights.
    MetricError, StatesError, ThreadsError: an argument is out of range.
    """

    def __init__(
        self,
        num_states: int,
        metrics: Sequence[str],
        *,
        threads: int | None = None,
        model: ModelIdentity | None = None,
        keep_samples: bool = False,
        cka_batch: int | None = None,
        positions: Positions | None = None,
        experts: ExpertStatistics | None = None,
        content: str | None = None,
    ) -> None:
        self._metrics = check_metrics(metrics)
        if cka_batch is not None:
            check_batch(cka_batch)
        self._accumulator = Accumulator(num_states, self._metrics)
        self._threads = Threads(threads)
        self._rejections: list[Rejection] = []
        pairs = num_states * (num_states - 1) // 2
        none_yet = {metric: np.zeros((0, pairs), np.float32) for metric in self._metrics}
        self._samples: list[Samples] = [none_yet] if keep_samples else []
        self._taken = 0
        self._keep_samples = keep_samples
        self._model = model
        self._positions = positions
        self._experts = experts
        self._content = content
        self._last: tuple[np.int64, np.int64] | None = None  # the last sequence and its length
        self._cka = None
        if cka_batch is not None:
            self._cka = CkaBatches(num_states, cka_batch, self._threads)

    def take(
        self, parts: Iterable[Chunk], advance: Callable[[int], object] = lambda _: None
    ) -> None:
        """Add the parts of a source."""
        for part in parts:
            self.add(
                part.states, part.samples, state_first=part.state_first, sequences=part.sequences
            )
            advance(part.steps)

    def add(
        self,
        states: Any,
        samples: Sequence[int] | NDArray[np.int64],
        *,
        state_first: bool = False,
        sequences: NDArray[np.int64] | None = None,
    ) -> None:
        """Add a batch, (B, L+1, D), or (L+1, B, D) if ``state_first``, C-contiguous.

        ``samples`` are (B,) numbers that name rejected samples; ``sequences`` are (B,) int64,
        neighbours with the same number one sequence, which continues in the next batch if that
        begins with its number. StatesError: a wrong shape or dtype; a sequence has more than 2**20
        samples.
        """
        array = as_array(states)
        rejected, kept, goes_on = self._accumulator.update(
            array,
            self._threads,
            state_first=state_first,
            keep=self._keep_samples,
            sequences=sequences,
        )
        if self._cka is not None:
            by_sample = array.transpose(1, 0, 2) if state_first else array
            self._cka.add(by_sample, [sample for sample, _, _ in rejected])
        if goes_on and kept is not None:
            self._drop_last_kept()
        if kept is not None:
            self._samples.append(dict(zip(self._metrics, kept, strict=True)))
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
        """Take over an interrupted scan of the same job; ScanError if it is of another one."""
        if self._content is None:
            raise ScanError("the model has hooks or replaced code, so it may be of another one")
        self.join(before, texts)

    def join(self, before: Scan, texts: TextsIdentity) -> None:
        """Take over a part of the same job; ScanError if it is of another one."""
        if before.model != self._model or list(before.metrics) != self._metrics:
            raise ScanError(
                f"it is of {before.model} by {', '.join(before.metrics)}, not of {self._model} by "
                f"{', '.join(self._metrics)}"
            )
        if before.contents.content != self._content:
            raise ScanError("it is of a model with other weights, or does not say which they are")
        if before.positions != self._positions:
            raise ScanError(f"it is of the positions {before.positions}, not {self._positions}")
        if before.texts != (texts,):
            raise ScanError("it is of other texts")
        if before.keeps_samples != self._keep_samples:
            kept = "keeps" if before.keeps_samples else "does not keep"
            raise ScanError(f"it {kept} the values of single samples")
        held = before.contents
        if (held.experts is None) != (self._experts is None):
            holds = "has no" if held.experts is None else "has"
            raise ScanError(f"it {holds} statistics of experts")
        if held.experts is not None and self._experts is not None:
            self._experts.merge(held.experts)
        if held.samples is not None:
            self._samples.append(held.samples)
        self._accumulator.merge(held.sums)
        self._rejections += before.rejections

    def reject(self, count: int, rejections: Sequence[Rejection]) -> None:
        """Count samples that never became states, the first of them by name."""
        self._accumulator.reject(count)
        self._rejections += rejections

    def take_samples(self, metric: str) -> list[NDArray[np.float32]]:
        """The kept values of the sequences since the last call, none of which may go on."""
        parts = [part[metric] for part in self._samples[self._taken :]]
        self._taken = len(self._samples)
        return parts

    @property
    def tokens(self) -> float:
        """Samples of a sequence, on average."""
        sums = self._accumulator.sums()
        return sums.count / max(1, sums.num_sequences)

    def so_far(self, texts: TextsIdentity) -> Scan:
        """The scan as it stands, to be saved and resumed.

        No CKA, as its minibatch may be incomplete.
        """
        so_far = self._scan((texts,), None).contents
        return Scan(replace(so_far, content=self._content))

    def finish(self, texts: tuple[TextsIdentity, ...] = ()) -> Scan:
        """The scan of all samples, with a warning of rejected ones, and of many unused experts.

        StatesError if none was accepted.
        """
        done = self._scan(texts, self._cka.finish() if self._cka else None)
        accepted, rejected = done.num_samples, done.num_rejected
        if rejected:
            described = describe_rejections(rejected, accepted + rejected, done.rejections)
            if not accepted:
                raise StatesError(f"there is nothing to compare: {described}")
            warnings.warn(described, RejectedSamplesWarning, stacklevel=3)
        elif not accepted:
            raise StatesError("there are no samples to compare")
        if self._experts is not None:
            self._experts.warn_of_unrouted()
        return done

    def _scan(self, texts: tuple[TextsIdentity, ...], cka: Cka | None) -> Scan:
        return Scan(
            Contents(
                self._accumulator.sums(),
                tuple(_first(self._rejections)),
                self._model,
                texts,
                joined(self._samples) if self._samples else None,
                cka,
                self._positions,
                experts=self._experts,
            )
        )


class CkaBatches:
    """Accepted samples cut, in the order they come, into minibatches for the core.

    Where the batches of the caller end does not matter. At most one minibatch waits, as a copy.
    """

    def __init__(self, num_states: int, size: int, threads: Threads) -> None:
        self._core = Cka(num_states, size)
        self._threads = threads
        self._waiting: list[NDArray[Any]] = []

    def add(self, states: NDArray[Any], rejected: Sequence[int]) -> None:
        """Take the samples of (B, L+1, D) but the ``rejected`` ones, whose indices ascend."""
        accepted = np.delete(np.arange(len(states)), rejected)
        while len(accepted):
            room = self._core.batch_size - sum(map(len, self._waiting))
            taken, accepted = accepted[:room], accepted[room:]
            whole = taken[-1] - taken[0] + 1 == len(taken)
            part = states[taken[0] : taken[-1] + 1] if whole else states[taken]
            if len(taken) < room:
                self._waiting.append(part.copy())
            else:
                self._flush(part)

    def finish(self) -> Cka:
        """The sums of all minibatches; a last one counts if it has at least 4 samples."""
        if sum(map(len, self._waiting)) >= MIN_BATCH:
            self._flush(self._waiting.pop())
        return self._core

    def _flush(self, last: NDArray[Any]) -> None:
        batch = np.concatenate([*self._waiting, last]) if self._waiting else last
        self._core.update(np.require(batch, requirements=["C", "A"]), self._threads)
        self._waiting.clear()


def check_batch(size: int) -> None:
    """Refuse a size of minibatches, in samples, that is not an integer from 4 to 1024.

    StatesError.
    """
    is_integer = isinstance(size, int) and not isinstance(size, bool)
    if not is_integer or not MIN_BATCH <= size <= MAX_BATCH:
        raise StatesError(f"cka_batch = {size!r}: expected an integer, {MIN_BATCH} to {MAX_BATCH}")


def _first(rejections: list[Rejection]) -> list[Rejection]:
    return sorted(rejections, key=lambda rejection: rejection.sample)


def check_metrics(metrics: Sequence[str]) -> list[str]:
    """The names of metrics as a list.

    MetricError for an unknown metric, none, or one named twice.
    """
    if isinstance(metrics, str):
        raise MetricError(f"metrics must be a sequence of names, got the string {metrics!r}")
    return Sums(2, list(metrics)).metrics


def as_array(states: Any) -> NDArray[Any]:
    """View an array or a dense tensor on the CPU as the core reads it.

    bfloat16 becomes uint16 bits. StatesError: neither of the two, or not in the machine's byte
    order.
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

"""Scans of stored states: arrays, tensors and files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StatesError
from .builder import Chunk, ScanBuilder, as_array
from .scan import Scan
from .states_file import StatesFile

CHUNK_BYTES = 64 << 20
"""Bytes of an array that go to the core at a time."""


def analyse_states(
    states: Any,
    metrics: Sequence[str] = ("angular",),
    *,
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
        keep_samples: keep the values of single samples for :meth:`Scan.bootstrap`, in memory and in
            the file. They take 4 bytes times samples times L(L+1)/2 a metric: 22 MB for 10,000
            samples of 33 layers.
        cka_batch: also find linear CKA, from minibatches of so many consecutive samples, 4 to
            1024; a last one of fewer than 4 is left out. See :attr:`Scan.cka`.
        sequences: (samples,) integers, which sequence a sample is of, if several are of one:
            tokens of a text, say. Those of one sequence must follow each other. Standard
            errors are then clustered, and kept samples are sums over sequences. Every sample
            is its own sequence by default, or of the one that the file names.
        progress: a bar with ETA on standard error; by default for a file, if that is a
            terminal.
        tensor: the name of the tensor in a safetensors file; by default ``hidden_states``, or
            else the only one of three axes.

    Returns:
        The scan.

    Raises:
        StatesError: a file that is not there, truncated or damaged; wrong shape or dtype, no
            samples, or none that can be compared. Single samples with NaN, infinity or zero
            vectors are counted and named in the result, with a warning.
        MetricError: an unknown metric, or one named twice.
        ThreadsError: ``threads`` is out of range.

    Example:
        >>> import numpy as np, shallower as sh
        >>> states = np.random.default_rng(0).standard_normal((10, 5, 8)).cumsum(axis=1)
        >>> sh.analyse_states(states, ["cosine"])
        Scan(num_layers=4, num_samples=10, num_rejected=0, metrics=('cosine',))
    """
    options: dict[str, Any] = {
        "threads": threads,
        "keep_samples": keep_samples,
        "cka_batch": cka_batch,
    }
    if isinstance(states, str | Path):
        with StatesFile(states, tensor) as file:
            origin = file.origin
            builder = ScanBuilder(
                file.shape[1], metrics, model=origin.model, positions=origin.positions, **options
            )
            found = file.sequences() if sequences is None else sequences
            numbers = sequence_numbers(found, len(file))
            with (
                closing(file.parts(threads, numbers)) as parts,
                _progress(len(file), progress) as advance,
            ):
                builder.take(parts, advance)
            builder.reject(origin.num_rejected, origin.rejections)
        return builder.finish(origin.texts)
    array = _checked(states, tensor)
    numbers = sequence_numbers(sequences, len(array))
    builder = ScanBuilder(array.shape[1], metrics, **options)
    with _progress(len(array), bool(progress)) as advance:
        builder.take(array_parts(array, numbers), advance)
    return builder.finish()


def _checked(states: Any, tensor: str | None) -> NDArray[Any]:
    array = as_array(states)
    if tensor is not None:
        raise StatesError(f"there is no tensor {tensor!r} in an array: name one of a file")
    if array.ndim != 3:
        raise StatesError(f"states of shape {array.shape}: expected three axes (samples, L+1, D)")
    if len(array) == 0:
        raise StatesError("there are no samples to compare")
    return array


def _progress(total: int, show: bool | None) -> AbstractContextManager[Callable[[int], None]]:
    if show is False:
        return nullcontext(lambda _: None)
    from ..progress import track

    return track("analyse", total, show)


def sequence_numbers(sequences: ArrayLike | None, num_samples: int) -> NDArray[np.int64] | None:
    """Check the (samples,) integers that name the sequence of every sample; int64, C-contiguous.

    None if every sample is its own. StatesError: not an integer for each sample, or the samples of
    a sequence do not follow each other.
    """
    if sequences is None:
        return None
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


def array_parts(array: NDArray[Any], numbers: NDArray[np.int64] | None = None) -> Iterator[Chunk]:
    """Cut (samples, L+1, D) into parts that the core can read: one in place, or several copied."""
    in_place = array.flags.aligned and array.transpose(1, 0, 2).flags.c_contiguous
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), len(array) if in_place else step):
        stop = len(array) if in_place else min(start + step, len(array))
        states = array[start:stop]
        yield Chunk(
            states.transpose(1, 0, 2) if in_place else np.require(states, requirements=["C", "A"]),
            np.arange(start, stop),
            steps=stop - start,
            state_first=in_place,
            sequences=None if numbers is None else numbers[start:stop],
        )

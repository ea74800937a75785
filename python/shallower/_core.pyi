from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accumulator", "Checkpoint", "Gguf", "Job", "__version__", "bootstrap"]

__version__: str

@final
class Accumulator:
    def __new__(
        cls, num_states: int, metrics: list[str], threads: int | None = None
    ) -> Accumulator: ...
    @staticmethod
    def from_words(
        num_states: int,
        count: int,
        rejected: int,
        stored: list[tuple[str, NDArray[np.uint64]]],
    ) -> Accumulator: ...
    @property
    def num_states(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def rejected(self) -> int: ...
    @property
    def metrics(self) -> list[str]: ...
    def update(
        self, states: NDArray[Any], state_first: bool = False, keep: bool = False
    ) -> tuple[list[tuple[int, int, str]], list[NDArray[np.float32]] | None]: ...
    def reject(self, samples: int) -> None: ...
    def merge(self, other: Accumulator) -> None: ...
    def mean(self, metric: str) -> NDArray[np.float64]: ...
    def variance(self, metric: str) -> NDArray[np.float64]: ...
    def best_starts(self, metric: str, n: int, count: int) -> list[int]: ...
    def best_plan(
        self, metric: str, n: int, max_blocks: int, protect_first: int, protect_last: int
    ) -> list[tuple[int, int]]: ...
    def to_words(self, metric: str) -> NDArray[np.uint64]: ...

def bootstrap(
    values: NDArray[np.float32],
    num_states: int,
    metric: str,
    num_resamples: int,
    seed: int,
    threads: int | None = None,
) -> list[list[int]]: ...

@final
class Checkpoint:
    def __new__(cls, folder: str | PathLike[str]) -> Checkpoint: ...
    @property
    def folder(self) -> Path: ...
    def resolve(self, name: str) -> Path: ...
    def tensors(self) -> list[tuple[str, str, list[int], Path, int]]: ...
    def cut(
        self,
        prefixes: list[str],
        num_layers: int,
        survivors: list[int],
        max_shard_size: int,
    ) -> Job: ...

@final
class Job:
    @property
    def total_bytes(self) -> int: ...
    @property
    def journal(self) -> str: ...
    @property
    def files(self) -> list[tuple[str, int]]: ...
    def write(
        self,
        folder: str | PathLike[str],
        progress: Callable[[int, int], object] | None = None,
    ) -> None: ...

@final
class Gguf:
    def __new__(cls, path: str | PathLike[str]) -> Gguf: ...
    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    def cut_size(self, survivors: list[int]) -> int: ...
    def cut(
        self,
        survivors: list[int],
        out: str | PathLike[str],
        progress: Callable[[int, int], Any] | None = None,
    ) -> None: ...

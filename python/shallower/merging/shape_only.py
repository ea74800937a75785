"""A weight without values, which remembers which rows and columns became which."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_OPERATIONS = ("chunk", "split", "transpose")


class StandIn:
    """A stand-in for a weight in the operations that divide, turn and name it.

    Args:
        axes: for each axis, the axis of the whole weight and the indices there.
        fixed: the index on every axis of the weight that is gone.
    """

    def __init__(
        self, axes: Sequence[tuple[int, NDArray[np.int64]]], fixed: Mapping[int, int]
    ) -> None:
        self._axes, self._fixed = list(axes), dict(fixed)

    @classmethod
    def of(cls, shape: Sequence[int]) -> "StandIn":
        """Make a stand-in for a whole weight.

        Args:
            shape: (M, N), or (E, M, N) of a stack of experts.

        Returns:
            The stand-in, of which the experts' axis of a plain matrix is gone.
        """
        first = 3 - len(shape)
        axes = [(first + k, np.arange(size)) for k, size in enumerate(shape)]
        return cls(axes, {0: 0} if first else {})

    @classmethod
    def __torch_function__(
        cls, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in _OPERATIONS:
            raise NotImplementedError(f"{func.__name__} of a stand-in")
        return getattr(args[0], func.__name__)(*args[1:], **(kwargs or {}))

    @property
    def shape(self) -> torch.Size:
        """Its axes."""
        return torch.Size(len(indices) for _, indices in self._axes)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self._axes)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of experts' ones with the experts first."""
        order = [axis for axis, _ in self._axes]
        return [axis for axis in order if axis] in ([1, 2], [2, 1]) and 0 not in order[1:]

    def size(self, dim: int) -> int:
        """Tell the length of an axis."""
        return self.shape[dim]

    def contiguous(self) -> "StandIn":
        """Itself: it holds no values."""
        return self

    def squeeze(self, dim: int) -> "StandIn":
        """Leave out an axis of one index."""
        if self.size(dim) != 1:
            return self
        axes = list(self._axes)
        axis, indices = axes.pop(dim)
        return StandIn(axes, {**self._fixed, axis: int(indices[0])})

    def transpose(self, dim0: int, dim1: int) -> "StandIn":
        """Exchange two axes."""
        axes = list(self._axes)
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
        return StandIn(axes, self._fixed)

    def split(self, split_size: Sequence[int] | int, dim: int = 0) -> tuple["StandIn", ...]:
        """Divide an axis into parts of these sizes, or of one size."""
        length = self.size(dim)
        if isinstance(split_size, int):
            edges = list(range(split_size, length, split_size))
        else:
            edges = list(np.cumsum(split_size))[:-1]
        axis, indices = self._axes[dim]
        parts = []
        for part in np.split(indices, edges):
            axes = list(self._axes)
            axes[dim] = axis, part
            parts.append(StandIn(axes, self._fixed))
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple["StandIn", ...]:
        """Divide an axis into so many parts, as torch does."""
        return self.split(-(-self.size(dim) // chunks), dim)

    def of_product(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take from the factors of a whole weight those of this part of it.

        Args:
            left: (E, M, rank).
            right: (E, rank, N).

        Returns:
            (E', M', rank) and (E', rank, N'), whose product is this part of the product.
        """
        chosen = {axis: np.array([index]) for axis, index in self._fixed.items()}
        chosen |= dict(self._axes)
        left = _take(_take(left, 0, chosen[0]), 1, chosen[1])
        right = _take(_take(right, 0, chosen[0]), 2, chosen[2])
        if [axis for axis, _ in self._axes if axis] == [2, 1]:
            return right.mT, left.mT
        return left, right


def _take(tensor: torch.Tensor, dim: int, indices: NDArray[np.int64]) -> torch.Tensor:
    """Some of the indices of an axis; a view where they are neighbours."""
    start, count = int(indices[0]), len(indices)
    if np.array_equal(indices, np.arange(start, start + count)):
        return tensor.narrow(dim, start, count)
    return tensor.index_select(dim, torch.from_numpy(indices))

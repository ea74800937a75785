"""The sum of a weight and its adapter, a few rows at a time, and the check of the result."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..cutting.rewriting import Read
from ..errors import ModelError
from ..models.architecture import swapped

PANEL = 1 << 20
"""Values of a weight that are summed at once: 4 MiB in float32."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that adapters are merged into, by their names in safetensors."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Make products in float32 exact: no TF32 or bfloat16, whatever the process has set."""
    cuda, cpu = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    name, exact = ("fp32_precision", "ieee") if cpu else ("allow_tf32", False)  # torch 2.9
    backends = [backend for backend in (cuda, cpu) if backend]
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(swapped(backend, **{name: exact}))
        yield


@exact_products()
def add_low_rank(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """``weight + scaling · left @ right`` of (R, N), (R, rank) and (rank, N), in float32."""
    return weight.float() + (left @ right) * scaling


@dataclass(frozen=True, slots=True)
class LowRank:
    """What adapters add to a stored weight: ``scaling · left[e] @ right[e]`` for every expert."""

    name: str  # of the weight in its file
    left: torch.Tensor  # (E, M, rank) float32; E is 1 for plain matrices
    right: torch.Tensor  # (E, rank, N) float32
    scaling: float
    dtype: torch.dtype  # of the stored weight

    def panels(self, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The factors, (R, rank) and (rank, N), of panels of rows of about :data:`PANEL` values."""
        rows, columns = self.left.shape[1], self.right.shape[2]
        # Even panels: products of one or two rows take another path, and other bits, on CPUs.
        count = max(1, min(math.ceil(rows * columns / PANEL), rows // 4))
        edges = [index * rows // count for index in range(count + 1)]
        for left, right in zip(self.left, self.right, strict=True):
            moved = right.to(device)
            for start, stop in pairwise(edges):
                yield left[start:stop].to(device), moved

    def changed(self, read: Read, device: torch.device) -> Iterator[Any]:
        """Yield the bytes of the merged weight from the stored ones, float32 sums rounded once."""
        for left, right in self.panels(device):
            weight = self.read(read, left, right)
            merged = add_low_rank(weight, left, right, scaling=self.scaling).to(self.dtype)
            if not bool(torch.isfinite(merged).all()):
                raise self._not_finite(weight)
            yield merged.cpu().contiguous().view(torch.uint8).numpy()

    def read(self, read: Read, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Read the next panel of the weight: (R, N) in its dtype, on the device of the factors."""
        shape = left.shape[0], right.shape[1]
        data = read(shape[0] * shape[1] * self.dtype.itemsize)
        return torch.frombuffer(data, dtype=self.dtype).view(shape).to(left.device)

    def _not_finite(self, weight: torch.Tensor) -> ModelError:
        kind = str(self.dtype).removeprefix("torch.")
        if not bool(torch.isfinite(weight).all()):
            return ModelError(f"cannot merge into {self.name}: it holds NaN or infinity already")
        return ModelError(
            f"cannot merge into {self.name}: the sum of weight and adapter overflows {kind}; "
            f"merge into a cut that is stored in bfloat16 or float32"
        )


_EXPONENT = 0x7FF0000000000000
"""The bits of a float64 that hold its power of two."""


def rounding(
    values: torch.Tensor, dtype: torch.dtype, *, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Bound the rounding of a float32 sum of a weight and a product, itself rounded to a dtype.

    Half a unit in the last place of each exact sum in ``values``, (R, N) float64, and a rounding of
    float32 for each addition and product on the way. ``left`` holds the factor of the product.
    """
    form, fine = torch.finfo(dtype), torch.finfo(torch.float32).eps
    powers = values.view(torch.int64).bitwise_and(_EXPONENT).view(torch.float64)
    bound = powers.mul_(form.eps / 2 + 2 * fine).clamp_(min=form.tiny * form.eps / 2)
    norms = left.norm(dim=1).double(), right.double().norm(dim=0)
    return bound.addr_(*norms, alpha=(left.shape[1] + 2) * fine)


def deviation(
    low_rank: LowRank, was: Read, now: Read, *, device: torch.device
) -> tuple[float, float]:
    """Compare the bytes of a weight, before and after, with their float64 sum.

    Returns ‖merged − sum‖ / ‖sum‖, and the greatest difference of a value. ModelError: a value is
    off by more than half a unit in the last place, and the rounding of the float32 sum before it. A
    norm alone would not show that an adapter is missing whose change is smaller than the rounding.
    """
    off = whole = most = 0.0
    for left, right in low_rank.panels(device):
        left = left.double() * low_rank.scaling
        expected = low_rank.read(was, left, right).double()
        expected.addmm_(left, right.double())
        difference = low_rank.read(now, left, right).double().sub_(expected).abs_()
        largest = float(difference.amax())
        whole = math.hypot(whole, float(expected.norm()))
        off = math.hypot(off, float(difference.norm()))
        allowed = rounding(expected, low_rank.dtype, left=left, right=right)
        if not bool((difference <= allowed).all()):
            raise ModelError(
                f"{low_rank.name} was not merged as it should be: a value is off by "
                f"{largest:.2g} from the sum of weight and adapter"
            )
        most = max(most, largest)
    return off / whole if whole else off, most

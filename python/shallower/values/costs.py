"""The costs of blocks by any criterion, and the blocks of least cost.

Sees the core, which searches on whole numbers: order, ties and sums are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from ..errors import CostsError, LayersError, PlanError, ScanError
from .counts import counted
from .identity import ModelIdentity, TextsIdentity
from .layers import MAX_LAYERS, Block, check_plan, check_size, layer_number
from .plan import STRATEGIES, Plan
from .positions import Positions

MAX_RESAMPLES = 2**31

NUM_RESAMPLES = 1000
"""Resamples by which a page says how stable l* is."""


@dataclass(frozen=True, slots=True, eq=False)
class BootstrappedStart:
    """Stability of the best start of one block size over resamples.

    Attributes:
        start: l*(n), the start of the best block over all samples.
        probability: the share of resamples in which the best block starts there as well. It says
            how stable the choice is under other samples of the same kind; it is not the
            probability that the start is the true one.
        distribution: (L-n+1,) float64, the share of resamples that each start wins; their sum
            is 1.
    """

    start: int
    probability: float
    distribution: NDArray[np.float64]


class Costs:
    """Costs of dropping blocks of layers, by any criterion: lower is better.

    :meth:`Scan.costs` makes them of a scan, :meth:`of_blocks` and :meth:`of_layers` of any other
    criterion. A block that was not measured costs NaN, and is never proposed.

    Attributes:
        blocks: (L+1, L+1) float64; ``[l, m]``, l < m, is the cost of the block ``[l, m)``.
        metric: the name of the criterion.
        stderr: (L+1, L+1) float64, the standard errors of ``blocks``, if known.
        strategy: a row of ``STRATEGIES``, for plans and cards.
        samples: (S, L(L+1)/2) float32, the values of single samples behind the costs, if kept:
            the pairs (l, m), l < m, row by row.
        model: the model that the costs are of, if known.
        texts: the texts behind them.
        positions: the tokens of the texts that were compared, if known.
        of_single_layers: whether a block costs the sum of its layers.
    """

    def __init__(
        self,
        search: _core.Costs,
        blocks: NDArray[np.float64],
        *,
        metric: str,
        stderr: NDArray[np.float64] | None = None,
        strategy: str = "similarity",
        samples: NDArray[np.float32] | None = None,
        more_is_better: bool = False,
        of_single_layers: bool = False,
        model: ModelIdentity | None = None,
        texts: tuple[TextsIdentity, ...] = (),
        positions: Positions | None = None,
    ) -> None:
        """Join the values of one criterion; ``search`` has the same costs in whole numbers.

        ``more_is_better``: ``samples`` are similarities, not costs. Raises PlanError for no
        strategy.
        """
        if strategy not in STRATEGIES:
            raise PlanError(f"unknown strategy {strategy!r}: expected {', '.join(STRATEGIES)}")
        self._search = search
        self._more_is_better = more_is_better
        self.of_single_layers = of_single_layers
        self.blocks, self.stderr, self.samples = blocks, stderr, samples
        self.metric, self.strategy = metric, strategy
        self.model, self.texts, self.positions = model, tuple(texts), positions

    def __repr__(self) -> str:
        return f"Costs(num_layers={self.num_layers}, metric={self.metric!r})"

    @classmethod
    def of_blocks(
        cls,
        values: ArrayLike,
        *,
        metric: str,
        stderr: ArrayLike | None = None,
        strategy: str = "costs",
        samples: ArrayLike | None = None,
        model: ModelIdentity | None = None,
        texts: Sequence[TextsIdentity] = (),
        positions: Positions | None = None,
    ) -> "Costs":
        """Make costs of a matrix, an entry for each block.

        Args:
            values: (L+1, L+1); ``[l, m]``, l < m, is the cost of the block ``[l, m)``, NaN if it
                was not measured. Entries on and below the diagonal are not read.
            metric: the name of the criterion, for plans and cards.
            stderr: (L+1, L+1), the standard errors of ``values``.
            strategy: a row of ``STRATEGIES``.
            samples: (S, L(L+1)/2), the costs of single samples, for :meth:`bootstrap`: the pairs
                (l, m), l < m, row by row.
            model: the model that the costs are of.
            texts: the texts behind them.
            positions: the tokens of the texts that were compared.

        Returns:
            The costs.

        Raises:
            CostsError: a wrong shape, or a cost above the diagonal that is infinite.
            PlanError: there is no such strategy.

        Example:
            >>> import numpy as np, shallower as sh
            >>> costs = np.abs(np.subtract.outer(np.arange(5.0), np.arange(5.0)))
            >>> costs[1, 3] = 0.5
            >>> print(sh.Costs.of_blocks(costs, metric="mine").best_block(2))
            [1, 3)
        """
        blocks = _matrix("values", values)
        errors = None if stderr is None else _matrix("stderr", stderr)
        if errors is not None and errors.shape != blocks.shape:
            raise CostsError(f"stderr of shape {errors.shape}: expected {blocks.shape}")
        return cls(
            _core.Costs.of_blocks(blocks),
            blocks,
            metric=metric,
            stderr=errors,
            strategy=strategy,
            samples=_samples(samples, len(blocks)),
            model=model,
            texts=tuple(texts),
            positions=positions,
        )

    @classmethod
    def of_layers(
        cls,
        values: ArrayLike,
        *,
        metric: str,
        stderr: ArrayLike | None = None,
        strategy: str = "costs",
        model: ModelIdentity | None = None,
        texts: Sequence[TextsIdentity] = (),
        positions: Positions | None = None,
    ) -> "Costs":
        """Make costs of a vector, an entry for each layer: a block costs the sum of its layers.

        Args:
            values: (L,), NaN for a layer that was not measured.
            metric: the name of the criterion, for plans and cards.
            stderr: (L,), the standard errors of ``values``. Blocks of one layer have them; those
                of several layers have NaN, since the errors of layers are not independent.
            strategy: a row of ``STRATEGIES``.
            model: the model that the costs are of.
            texts: the texts behind them.
            positions: the tokens of the texts that were compared.

        Returns:
            The costs.

        Raises:
            CostsError: a wrong shape, or a cost that is infinite.
            PlanError: there is no such strategy.

        Example:
            >>> import shallower as sh
            >>> costs = sh.Costs.of_layers([3, 1, 1, 2, 5], metric="mine")
            >>> [str(block) for block in costs.best_plan(3, 2).blocks]
            ['[1, 4)']
        """
        layers = _vector("values", values)
        size = len(layers) + 1
        search = _core.Costs.of_layers(layers)
        blocks = np.zeros((size, size))
        with np.errstate(over="ignore"):  # the search is exact; the score is infinite then
            for start in range(len(layers)):
                blocks[start, start + 1 :] = np.cumsum(layers[start:])
        errors = None
        if stderr is not None:
            errors = np.full((size, size), np.nan)
            of_layers = _vector("stderr", stderr)
            if of_layers.shape != layers.shape:
                raise CostsError(f"stderr of shape {of_layers.shape}: expected {layers.shape}")
            errors[np.arange(size - 1), np.arange(1, size)] = of_layers
        return cls(
            search,
            blocks,
            metric=metric,
            stderr=errors,
            strategy=strategy,
            model=model,
            texts=tuple(texts),
            positions=positions,
            of_single_layers=True,
        )

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return self._search.num_layers

    def scored(self, block: Block) -> Block:
        """A block with its cost as ``score``, and ``stderr`` if known.

        LayersError if it is not there.
        """
        if block.stop > self.num_layers:
            raise LayersError(f"block {block}: the model has {counted(self.num_layers, 'layer')}")
        stderr = None if self.stderr is None else float(self.stderr[block.start, block.stop])
        score = float(self.blocks[block.start, block.stop])
        return Block(block.start, block.stop, score, stderr)

    def best_block(self, n: int) -> Block:
        """The block of ``n`` layers that costs least; of equals the one that starts first.

        LayersError: ``n`` is not in ``1 .. L-1``. CostsError: no block of ``n`` layers was
        measured.
        """
        return self.best_blocks(n, 1)[0]

    def best_blocks(self, n: int, k: int) -> list[Block]:
        """The ``k`` blocks of ``n`` layers that cost least, best first; fewer if no more are known.

        Of equals the one that starts first comes first. Raises as :meth:`best_block`, and
        LayersError if ``k`` is less than 1.
        """
        n, k = layer_number(n), layer_number(k)
        check_size(self.num_layers, n)
        if k < 1:
            raise LayersError(f"cannot name the best k = {k} blocks: expected at least 1")
        starts = self._search.best_starts(n, min(k, self.num_layers))
        return [self._chosen(start, start + n) for start in starts]

    def _chosen(self, start: int, stop: int) -> Block:
        names = ("strategy", "metric", "model", "texts", "positions")
        by = {name: getattr(self, name) for name in names}
        return replace(self.scored(Block(start, stop)), criterion=by)

    def plan(self, n: int) -> Plan:
        """The plan to drop :meth:`best_block`."""
        return self.best_plan(n)

    def cheapest(self, n: int) -> Plan:
        """The plan to drop the ``n`` layers that the criterion would drop.

        The best block; of costs of single layers the cheapest, wherever they are. Raises as
        :meth:`best_plan`.
        """
        return self.best_plan(n, n if self.of_single_layers else 1)

    def best_plan(
        self, n: int, max_blocks: int = 1, *, protect_first: int = 0, protect_last: int = 0
    ) -> Plan:
        """The plan to drop ``n`` layers in blocks whose costs have the least sum.

        Found by dynamic programming over whole numbers. Of equals: fewer blocks, then smaller
        starts, then smaller stops. At least one layer stays between two blocks: without it they
        would be one block, which joins another pair of states. LayersError: ``n`` is not in ``1 ..
        L-1``, or fewer layers than ``n`` are free; a number is less than it can be. CostsError:
        every such plan has a block that was not measured.
        """
        demand = [layer_number(v) for v in (n, max_blocks, protect_first, protect_last)]
        check_plan(self.num_layers, *demand[:2], protect_first=demand[2], protect_last=demand[3])
        demand[1] = min(demand[1], self.num_layers)
        blocks = [self._chosen(*block) for block in self._search.best_plan(*demand)]
        return Plan.of(self.num_layers, blocks)

    def bootstrap(
        self, num_resamples: int = 1000, seed: int = 0, *, threads: int | None = None
    ) -> dict[int, BootstrappedStart]:
        """How stable the best start is under other samples, for every ``n`` in ``1 .. L-1``.

        As many samples as there are get drawn with replacement, ``num_resamples`` times. Each time
        the best start of their mean is found (Efron, Annals of Statistics 7, 1979). The answer
        depends on the samples' values and the seed (0 to 2**64 - 1) alone, not on threads or the
        order of samples. ScanError: there are no samples, or a single one; a number is out of
        range; a sample's value is NaN or infinite. ThreadsError: ``threads`` is out of range.
        """
        if self.samples is None:
            raise ScanError("there are no samples behind these costs: a bootstrap draws from them")
        _check_number("num_resamples", num_resamples, 1, MAX_RESAMPLES)
        _check_number("seed", seed, 0, 2**64 - 1)
        pool = _core.Threads(threads)
        if len(self.samples) < 2:
            raise ScanError("a single sample cannot be resampled: scan at least 2")
        wins = _core.bootstrap(
            self.samples,
            self.num_layers + 1,
            num_resamples,
            seed,
            pool,
            more_is_better=self._more_is_better,
        )
        found = {}
        for n, counts in enumerate(wins, 1):
            distribution = np.array(counts) / num_resamples
            start = self.best_block(n).start
            found[n] = BootstrappedStart(start, float(distribution[start]), distribution)
        return found


def _check_number(name: str, value: int, least: int, most: int) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not least <= value <= most:
        raise ScanError(f"{name} = {value!r}: expected an integer, {least} to {most}")


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.array(values, np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise CostsError(f"{name}: expected an array of numbers: {error}") from error


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float64]:
    matrix = _numbers(name, values)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not 1 <= len(matrix) - 1 <= MAX_LAYERS:
        raise CostsError(
            f"{name} of shape {matrix.shape}: expected (L+1, L+1), L from 1 to {MAX_LAYERS}"
        )
    return matrix


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = _numbers(name, values)
    if vector.ndim != 1 or not 1 <= len(vector) <= MAX_LAYERS:
        raise CostsError(f"{name} of shape {vector.shape}: expected (L,), L from 1 to {MAX_LAYERS}")
    return vector


def _samples(samples: ArrayLike | None, num_states: int) -> NDArray[np.float32] | None:
    if samples is None:
        return None
    values = np.ascontiguousarray(_numbers("samples", samples), np.float32)
    pairs = num_states * (num_states - 1) // 2
    if values.ndim != 2 or values.shape[1] != pairs:
        raise CostsError(f"samples of shape {values.shape}: expected (S, {pairs}), a pair a column")
    return values

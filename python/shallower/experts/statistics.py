"""Statistics of the tokens that were sent to each expert: exact sums, with errors by text.

Sees the Rust core and NumPy, no torch and no model.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import ExpertSums
from ..errors import ExpertsError, ScanError
from ..values.counts import counted
from ..values.experts import Routing
from ..values.schema import of_type, read

VALUES = ("gate", "norm", "square", "gated", "gated_square", "moved")
"""What is summed over the tokens of an expert: g, ‖f‖, ‖f‖², g‖f‖, g²‖f‖² and s g‖f‖."""

MOVED = VALUES.index("moved")

MOST_PAIRS = 2**20
"""Pairs of experts of all layers whose products are summed; of a model with more none are."""

MANY_UNROUTED = 0.1
"""Share of experts without a token above which a scan warns."""

Array = NDArray[np.float64]
Pairs = tuple[NDArray[Any], NDArray[Any]]


class ExpertStatistics:
    """Sums over the tokens that each expert was sent, in every layer that has experts.

    f is an expert's output at a token, g the weight that multiplies it there, s one minus the
    cosine of the stream before and behind the routed experts; ``VALUES`` names what is summed.
    Every token of a text counts but padding, whichever are compared in the scan. Where a model
    multiplies an expert's *input* by g (Llama-4), f is the output that is added, of g times the
    input: ``gated`` is then ``norm``, ``gated_square`` is ``square``, and ``gate`` sums g still.
    What a block multiplies the sum of its experts by afterwards (BEAM, Laguna, MiniMax-M3) is the
    same for all experts of a layer, and is not in g or s.

    A text's sums are float64 in the order of its tokens; sums over texts are exact, and have the
    same bits in whatever order texts come and scans are merged. The outputs f are those of the
    model's own products in its dtype, and may differ in their last bits with the batch that a text
    is in, as the states of a scan do. It grows by :meth:`add` and :meth:`merge`.

    ``layers`` are the M that have experts, ascending. ``pairs`` are sums of the inner product of
    what two experts add to a token that both were sent, as ``pair_places`` orders them; None above
    ``MOST_PAIRS``. ``left_out`` counts experts' parts of texts that held NaN or infinity;
    ``has_stream`` says whether s is known. ``aimer`` is (M, E) float64, :func:`weight_ratios`
    (2603.18492); NaN where weights have not been seen.
    """

    def __init__(self, layers: Sequence[int], routing: Routing) -> None:
        self.layers, self.routing = tuple(layers), routing
        self.sums = ExpertSums(len(self.layers), routing.num_experts, len(VALUES))
        num_pairs = routing.num_experts * (routing.num_experts + 1) // 2
        fits = len(self.layers) * num_pairs <= MOST_PAIRS
        self.pairs = ExpertSums(len(self.layers), num_pairs, 1, errors=False) if fits else None
        self.left_out = 0
        self.has_stream = True
        self.aimer = np.full((len(self.layers), routing.num_experts), np.nan)

    def __repr__(self) -> str:
        return (
            f"ExpertStatistics({len(self.layers)} layers of {self.routing.num_experts} experts, "
            f"num_texts={self.num_texts})"
        )

    @property
    def num_texts(self) -> int:
        """Texts whose tokens are in the sums."""
        return max(self.sums.texts, default=0)

    @property
    def counts(self) -> NDArray[np.uint64]:
        """N, the tokens that each expert was sent, (M, E)."""
        return self.sums.counts()

    @property
    def unrouted(self) -> dict[int, tuple[int, ...]]:
        """By layer, the experts that no token was sent to: nothing is known of their outputs."""
        rows = zip(self.layers, self.counts, strict=True)
        none = {layer: np.flatnonzero(row == 0).tolist() for layer, row in rows}
        return {layer: tuple(experts) for layer, experts in none.items() if experts}

    def warn_of_unrouted(self) -> None:
        """Warn if many experts received no token: they go first, though others may need them."""
        num, total = sum(map(len, self.unrouted.values())), self.counts.size
        if num > MANY_UNROUTED * total:
            warnings.warn(
                f"{num:,} of {counted(total, 'expert')} received no token from these texts, and go "
                f"first by every criterion that reads texts: scan more texts, of every kind that "
                f"the cut is to serve",
                stacklevel=4,
            )

    def total(self, value: str) -> Array:
        """The sum of one of ``VALUES``, or of ``count``, over the tokens of each expert, (M, E)."""
        if value == "count":
            return self.counts.astype(np.float64)
        return self.sums.sums()[..., self._place(value)]

    def mean(self, value: str) -> Array:
        """The mean of one of ``VALUES`` over the tokens of each expert, (M, E); NaN for none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total(value) / self.counts

    def total_stderr(self, value: str) -> Array:
        """The standard error of :meth:`total`, (M, E), by text; NaN for one text.

        √(G/(G-1) Σ (x_t - X/G)²), x_t the sum over a text, X over all G texts that were seen.
        """
        if value == "count":
            square = self.sums.count_squares()
        else:
            square = self.sums.squares()[..., self._place(value)]
        total, texts = self.total(value), self._texts()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.maximum(square - total**2 / texts, 0) * _bessel(texts))

    def mean_stderr(self, value: str) -> Array:
        """The standard error of :meth:`mean`, (M, E), by text; NaN where all tokens are of one.

        That of a ratio of sums over texts (Cochran, Sampling Techniques, ch. 6), R = X/N:
        √(G/(G-1) Σ (x_t - R n_t)²) / N over the G texts that were seen.
        """
        place = self._place(value)
        square, product = self.sums.squares()[..., place], self.sums.products()[..., place]
        mean, texts = self.mean(value), self._texts()
        with np.errstate(invalid="ignore", divide="ignore"):
            counts, squares = self.total("count"), self.sums.count_squares()
            spread = square - 2 * mean * product + mean**2 * squares
            spread[squares == counts**2] = np.nan  # of one text, which has no spread
            return np.sqrt(np.maximum(spread, 0) * _bessel(texts)) / counts

    def products(self) -> Array:
        """The inner products of what experts add, summed over tokens, (M, E, E), symmetric.

        Leaving out a set of experts of a layer, and changing nothing else, changes the layer's
        output by the sum of its square of the products, summed over tokens as a squared norm.
        """
        if self.pairs is None:
            raise ExpertsError(
                f"the scan has no products of pairs of experts, which are kept of at most "
                f"{MOST_PAIRS:,} in all layers: choose another criterion than reconstruction"
            )
        size = self.routing.num_experts
        found, (rows, columns) = np.zeros((len(self.layers), size, size)), np.triu_indices(size)
        found[:, rows, columns] = found[:, columns, rows] = self.pairs.sums()[..., 0]
        return found

    def _texts(self) -> Array:
        return np.array(self.sums.texts, np.float64)[:, None]

    def _place(self, value: str) -> int:
        if value not in VALUES:
            raise ExpertsError(f"unknown statistic {value!r}: expected {', '.join(VALUES)}")
        if value == "moved" and not self.has_stream:
            raise ExpertsError(
                "how far the routed experts turn the residual stream was not measured: "
                "the layers of this model do more than add their outputs to it. Choose another "
                "criterion than easy-ep"
            )
        return VALUES.index(value)

    def add(
        self, place: int, counts: NDArray[np.int64], values: Array, *, pairs: Pairs | None = None
    ) -> None:
        """Add texts to the layer at a place in ``layers``.

        ``counts`` are (B, E), the tokens of each text that each expert was sent; ``values`` (B, E,
        6), the sums of ``VALUES`` over them; ``pairs`` the same of pairs of experts, (B, P) and (B,
        P, 1).
        """
        whole = np.array(values, np.float64, order="C")
        if not self.has_stream:
            whole[..., MOVED] = 0
        self.left_out += self.sums.update(place, np.ascontiguousarray(counts, np.uint64), whole)
        if self.pairs is not None and pairs is not None:
            self.pairs.update(place, np.ascontiguousarray(pairs[0], np.uint64), pairs[1])

    def lose_stream(self) -> None:
        """Give up s, which is not known of this model: ``moved`` is 0 from the beginning."""
        self.has_stream = False
        self.sums.clear(MOVED)

    def merge(self, other: "ExpertStatistics") -> None:
        """Add the texts of another scan of the same model; ScanError if it is of other experts."""
        if (self.layers, self.routing) != (other.layers, other.routing):
            raise ScanError("cannot merge statistics of experts of other layers or another router")
        self.sums.merge(other.sums)
        if self.pairs is not None and other.pairs is not None:
            self.pairs.merge(other.pairs)
        self.left_out += other.left_out
        if not (self.has_stream and other.has_stream):
            self.lose_stream()
        self.aimer = np.fmin(self.aimer, other.aimer)

    def copy(self) -> "ExpertStatistics":
        """The same in memory of its own."""
        twin = ExpertStatistics(self.layers, self.routing)
        twin.merge(self)
        return twin

    def header(self) -> dict[str, Any]:
        """What a file's header says of it."""
        return {
            "layers": list(self.layers),
            "routing": asdict(self.routing),
            "left_out": self.left_out,
            "has_stream": self.has_stream,
        }

    @classmethod
    def read(
        cls, header: Any, sums: ExpertSums, *, pairs: ExpertSums | None, aimer: NDArray[Any]
    ) -> "ExpertStatistics":
        """Read :meth:`header` and a file's arrays; ValueError, KeyError or TypeError if damaged."""
        layers, routing = read(tuple[int, ...], header["layers"]), read(Routing, header["routing"])
        if sums.shape != (len(layers), routing.num_experts, len(VALUES)):
            raise ValueError(f"its sums of experts are {sums.shape}")
        least = min(routing.chosen, routing.num_groups, routing.groups_chosen)
        if least < 1 or routing.num_experts % routing.num_groups:
            raise ValueError(f"{routing} is no router")
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError("its layers with experts are not ascending")
        if aimer.dtype != np.float64 or aimer.shape != sums.shape[:2] or not _are_ratios(aimer):
            raise ValueError("its ratios of weights are damaged")
        this = cls(layers, routing)
        if (pairs and pairs.shape) != (this.pairs and this.pairs.shape):
            raise ValueError("its sums of pairs of experts are not of its experts")
        this.sums, this.pairs, this.aimer = sums, pairs, aimer
        this.left_out = of_type(int, header["left_out"])
        this.has_stream = of_type(bool, header["has_stream"])
        if this.left_out < 0:
            raise ValueError("a number of experts that were left out is negative")
        return this


def pair_places(
    one: NDArray[np.int64], other: NDArray[np.int64], num_experts: int
) -> NDArray[np.int64]:
    """The places of pairs of experts among all, (0, 0), (0, 1) .. (1, 1) .., row by row."""
    low, high = np.minimum(one, other), np.maximum(one, other)
    places: NDArray[np.int64] = low * num_experts - low * (low - 1) // 2 + high - low
    return places


def _bessel(texts: Array) -> Array:
    """G/(G-1); NaN for one text or none, which say nothing of how texts differ."""
    return np.divide(texts, texts - 1, out=np.full_like(texts, np.nan), where=texts > 1)


def _are_ratios(aimer: Array) -> bool:
    """Whether all are means of magnitudes over root mean squares, in (0, 1], or NaN."""
    return bool(np.all(np.isnan(aimer) | ((aimer > 0) & (aimer <= 1 + 1e-12))))

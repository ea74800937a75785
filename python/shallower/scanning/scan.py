"""Scan: how alike the layers of a model are, with errors; kept in the store by its texts' ids.

The core's sums are exact: the same bits at any number of threads and in any order of merging.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Cka
from ..errors import LayersError, MetricError, ScanError
from ..experts.criteria import DEFAULT, experts_to_drop
from ..experts.statistics import ExpertStatistics
from ..settings.stages import ScanSettings
from ..settings.until import Settled
from ..storage import write_file
from ..values.costs import BootstrappedStart, Costs
from ..values.counts import counted
from ..values.entries import ResultStore, recalled
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.layers import Block
from ..values.plan import Plan, Rejection, check_plan
from ..values.positions import Positions
from .scan_file import Contents, merged, read_scan, read_text, scan_bytes, scan_text

NO_DISTANCE = "norm_ratio"
"""The one metric that does not tell how far apart two states are."""

LARGE_BYTES = 64 << 20
"""Samples of more bytes are not kept for others."""


def deciding(metrics: Sequence[str]) -> str | None:
    """The metric of several that blocks are chosen by: the angle, or else the first distance."""
    if "angular" in metrics:
        return "angular"
    return next((name for name in metrics if name != NO_DISTANCE), None)


class Scan:
    """Distances between all pairs of the L+1 states x^(0) .. x^(L), over samples.

    x^(l) is the input of layer l (0-based), x^(L) the output of the last layer before the final
    norm (2403.17887, §3). Made by :func:`scan` and :func:`analyse_states`; merged without loss.

    Attributes:
        contents: the sums, and what else a scan holds.
        settled: when a scan with ``until`` was sure of its best blocks; no file has it.
    """

    def __init__(self, contents: Contents, settled: Settled | None = None) -> None:
        self.contents, self.settled = contents, settled

    def __repr__(self) -> str:
        return (
            f"Scan(num_layers={self.num_layers}, num_samples={self.num_samples}, "
            f"num_rejected={self.num_rejected}, metrics={self.metrics})"
        )

    @property
    def model(self) -> ModelIdentity | None:
        """Model scanned, if a model was."""
        return self.contents.model

    @property
    def texts(self) -> tuple[TextsIdentity, ...]:
        """Texts behind the scan, one entry for each merged part."""
        return self.contents.texts

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """First of the samples that were left out, and why."""
        return self.contents.rejections

    @property
    def positions(self) -> Positions | None:
        """Tokens of the texts that were compared, if that is known."""
        return self.contents.positions

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return self.contents.sums.num_states - 1

    @property
    def num_samples(self) -> int:
        """Samples in the means: tokens, or rows of stored states."""
        return self.contents.sums.count

    @property
    def num_sequences(self) -> int:
        """Sequences that the samples are of: every sample is its own, if none were named."""
        return self.contents.sums.num_sequences

    @property
    def num_rejected(self) -> int:
        """Samples left out: no token, or a state with NaN, infinity or only zeros."""
        return self.contents.sums.rejected

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics held, the deciding one first."""
        return tuple(self.contents.sums.metrics)

    def mean(self, metric: str = "angular") -> NDArray[np.float64]:
        """The mean of a metric over samples, (L+1, L+1) float64, symmetric.

        ``[l, m]`` compares x^(l) with x^(m). For equal directions ``angular``, in [0, 1], is 0, and
        ``cosine``, in [-1, 1], is 1. For l < m, ``relative_l2`` is |x^(m) - x^(l)| / |x^(l)|,
        ``norm_ratio`` |x^(m)| / |x^(l)|. MetricError, StatesError: the metric is not held, or no
        sample was accepted.
        """
        return self.contents.sums.mean(metric)

    def variance(self, metric: str = "angular") -> NDArray[np.float64]:
        """The variance of a metric between sequences, (L+1, L+1) float64, NaN for one sequence.

        That of (s - m n) / n̄ with divisor G-1 over the G sequences. Of one sequence, s is the sum
        over its n samples; m is the mean over all samples, n̄ the mean of n. For sequences of one
        sample it is the sample variance. Raises as :meth:`mean`.
        """
        return self.contents.sums.variance(metric)

    def stderr(self, metric: str = "angular") -> NDArray[np.float64]:
        """The standard error of :meth:`mean`, (L+1, L+1) float64; NaN for one sequence.

        Sequences are independent; the samples of one are not. The mean is a ratio of sums over
        sequences, and √(variance / G) is its error (Cochran, Sampling Techniques, ch. 6). Raises as
        :meth:`mean`.
        """
        return np.sqrt(self.variance(metric) / self.num_sequences)

    def norms(self) -> NDArray[np.float64]:
        """The mean norm of each state x^(0) ..

        x^(L), (L+1,) float64; StatesError if there is no sample.
        """
        return self.contents.sums.norms()

    @property
    def keeps_samples(self) -> bool:
        """True if the values of single samples are kept, for :meth:`bootstrap`."""
        return self.contents.samples is not None

    def samples(self, metric: str = "angular") -> NDArray[np.float32]:
        """The values of single samples, (S, L(L+1)/2) float32: pairs (l, m), l < m, row by row.

        Where several samples are of one sequence, their sum. MetricError: the scan does not hold
        the metric. ScanError: it keeps no samples.
        """
        metric = self._metric(metric)
        if self.contents.samples is None:
            raise ScanError(
                "the scan keeps only sums, not the values of single samples: scan with "
                "keep_samples=True (--keep-samples), and merge only scans that do"
            )
        return self.contents.samples[metric]

    @property
    def cka(self) -> NDArray[np.float64]:
        """Linear CKA of all pairs of states, (L+1, L+1) float64, symmetric, in [-1, 1].

        Unlike the metrics it compares how samples lie towards one another. NaN for a state that was
        the same in all samples of each minibatch. ScanError: the scan was made without
        ``cka_batch``. StatesError: fewer than 4 samples were accepted.
        """
        return self._cka_sums.values()

    @property
    def _cka_sums(self) -> Cka:
        if self.contents.cka is None:
            raise ScanError(
                "the scan holds no CKA: scan with cka_batch=64, say, and merge only scans that do"
            )
        return self.contents.cka

    @property
    def experts(self) -> ExpertStatistics:
        """Statistics of the routed experts; ScanError: the scan was made without ``experts``."""
        if self.contents.experts is None:
            raise ScanError(
                "the scan holds no statistics of experts: scan a mixture with experts=True "
                "(--experts), and merge only scans that do"
            )
        return self.contents.experts

    @property
    def distance(self) -> str | None:
        """The metric that blocks are chosen by: the angle, or else the first distance held."""
        return deciding(self.metrics)

    def costs(self, metric: str | None = None) -> Costs:
        """The cost of each block by a metric: the distance of the states that it joins.

        The mean distance, for ``cosine`` 1 - mean, with standard errors; searched by the exact
        sums. ``metric`` is :attr:`distance` by default. MetricError, StatesError: the metric is
        not held or is no distance (``norm_ratio``); no sample was accepted.
        """
        metric = self._metric(metric)
        search = self.contents.sums.costs(metric)
        blocks, stderr = self._scores(metric)
        return Costs(
            search,
            blocks,
            metric=metric,
            stderr=stderr,
            samples=None if self.contents.samples is None else self.contents.samples[metric],
            more_is_better=metric == "cosine",
            model=self.model,
            texts=self.texts,
            positions=self.positions,
        )

    def best_block(self, n: int, metric: str | None = None) -> Block:
        """The block of ``n`` layers, ``1 .. L-1``, whose removal joins the most similar states.

        ``start = l*(n) = argmin_l d(l, l+n)`` over ``l = 0 .. L-n`` (2403.17887, eq. 6), decided on
        the exact sums; of equals the one that starts first. Its ``score`` is the mean distance of
        the pair (start, stop), for ``cosine`` ``1 - mean``; ``stderr`` its standard error.
        LayersError: ``n`` is out of range; else raises as :meth:`costs`.
        """
        return self.best_blocks(n, 1, metric)[0]

    def best_blocks(self, n: int, k: int, metric: str | None = None) -> list[Block]:
        """The ``k`` best blocks of ``n`` layers, best first, as :meth:`best_block` finds one.

        All ``L-n+1`` there are, if ``k`` is more; of equals the smaller start comes first.
        """
        return self.costs(metric).best_blocks(n, k)

    def scored(self, block: Block, metric: str | None = None) -> Block:
        """A block with its ``score`` and ``stderr``, as :meth:`best_block` gives them.

        LayersError: the model has no such layers; else raises as :meth:`costs`.
        """
        if block.stop > self.num_layers:
            raise LayersError(f"block {block}: the model has {counted(self.num_layers, 'layer')}")
        blocks, stderr = self._scores(self._metric(metric))
        place = block.start, block.stop
        return Block(*place, float(blocks[place]), float(stderr[place]))

    def bootstrap(
        self,
        num_resamples: int = 1000,
        seed: int = 0,
        *,
        metric: str | None = None,
        threads: int | None = None,
    ) -> dict[int, BootstrappedStart]:
        """How stable l*(n) is when sequences are drawn again: :meth:`Costs.bootstrap`.

        For every block size ``n`` the best start, and the share of resamples that each start wins.
        ScanError: the scan keeps no samples, or one; else raises as :meth:`costs` and
        :meth:`Costs.bootstrap`.
        """
        self.samples(self._metric(metric))  # says how to keep them
        return self.costs(metric).bootstrap(num_resamples, seed, threads=threads)

    def plan(
        self,
        n: int | None = None,
        metric: str | None = None,
        *,
        experts: int | None = None,
        criterion: str = DEFAULT,
        seed: int = 0,
    ) -> Plan:
        """The plan to drop :meth:`best_block`, or so many experts of every layer, or both.

        Experts go of the layers that stay, those that a criterion of ``experts/criteria``
        thinks least of; ``seed`` is of ``random``. LayersError: neither is asked for. ExpertsError:
        a criterion that is not known or not in the scan, or a number of experts that the router
        cannot do without. ScanError: the scan has no statistics of experts.
        """
        if n is None and experts is None:
            raise LayersError("nothing is to go: name a number of layers, or of experts")
        plan = None if n is None else self.best_plan(n, metric=metric)
        if experts is None and plan is not None:
            return plan
        assert experts is not None
        return self.with_experts(plan, experts, criterion=criterion, seed=seed)

    def with_experts(
        self, plan: Plan | None, count: int, *, criterion: str = DEFAULT, seed: int = 0
    ) -> Plan:
        """A plan that drops ``count`` experts of every layer that stays, too; raises as
        :meth:`plan`.

        None is the plan to drop no layer; PlanError: ``plan`` is none.
        """
        if plan is not None:
            check_plan(plan)
        gone = () if plan is None else plan.dropped
        dropped = experts_to_drop(self.experts, count, criterion=criterion, seed=seed, gone=gone)
        if plan is not None:
            return replace(plan, experts=dropped)
        return Plan(
            self.num_layers, (), "experts", criterion, self.model, self.texts, experts=dropped
        )

    def best_plan(
        self,
        n: int,
        max_blocks: int = 1,
        *,
        protect_first: int = 0,
        protect_last: int = 0,
        metric: str | None = None,
    ) -> Plan:
        """The plan to drop ``n`` layers in blocks whose scores have the least sum.

        By the rules of :meth:`Costs.best_plan`, on the exact sums.
        """
        return self.costs(metric).best_plan(
            n, max_blocks, protect_first=protect_first, protect_last=protect_last
        )

    def _metric(self, metric: str | None) -> str:
        if metric is None:
            return self.distance or self.metrics[0]
        if metric not in self.metrics:
            raise MetricError(
                f"metric {metric!r} was not accumulated: the scan holds {self.metrics}"
            )
        return metric

    def _scores(self, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The scores of all blocks by a held metric, and their standard errors."""
        mean = self.mean(metric)
        return 1 - mean if metric == "cosine" else mean, self.stderr(metric)

    def save(self, path: str | Path) -> None:
        """Write the scan as safetensors, whole or not at all, over a file that is there."""
        write_file(Path(path), scan_bytes(self.contents))

    @classmethod
    def load(cls, path: str | Path) -> "Scan":
        """Read a scan that :meth:`save` wrote, to the bit.

        ScanError: the file is not there, is truncated, damaged or of another version, or is not a
        scan.
        """
        return cls(read_scan(path))

    @staticmethod
    def merge(scans: Iterable["Scan"]) -> "Scan":
        """Merge the samples of several scans, with the same bits in whatever order.

        The values of single samples, and CKA, are kept if all scans have them. A sequence with
        samples in two scans counts as two. ScanError: there is no scan, or they differ in layers,
        metrics, model or positions. StatesError: together they hold more than 2**31 samples.
        """
        return Scan(merged([scan.contents for scan in scans]))


def scan_inputs(
    texts: Sequence[TextsIdentity],
    looks: Sequence[int],
    settings: ScanSettings,
    *,
    num_rejected: int = 0,
) -> dict[str, Any]:
    """Name all that a scan depends on beside the model: the token ids, and the texts of a batch.

    ``num_rejected`` are the texts that it counts and has no tokens of.
    """
    return {
        "texts": [asdict(one) for one in texts],
        "looks": list(looks),
        "rejected": num_rejected,
        "positions": asdict(settings.positions),
        "metrics": list(settings.metrics),
        "experts": settings.experts,
    }


def known_scan(
    store: ResultStore | None, inputs: Mapping[str, Any], *, keep_samples: bool = False
) -> Scan | None:
    """Look a scan up, which may have to have its samples; CacheError for a damaged one."""
    known = None if store is None else store.get("scan", inputs)
    if known is None:
        return None
    contents = recalled(lambda one: read_text(one.get("content")), known, "a scan")
    return None if keep_samples and contents.samples is None else Scan(contents)


def keep_scan(store: ResultStore | None, inputs: Mapping[str, Any], scanned: Scan) -> None:
    """Keep a scan, unless its samples take too many bytes."""
    samples = scanned.contents.samples or {}
    if store is not None and sum(one.nbytes for one in samples.values()) <= LARGE_BYTES:
        store.put("scan", inputs, {"content": scan_text(scanned.contents)})

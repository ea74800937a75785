"""Where the most alike blocks of a model start, and how that moves when texts are drawn again."""

import math

import numpy as np

from ..errors import ScanError
from ..results.comparison import Start
from ..scanning.scan import Scan
from ..settings.studies import CompareSettings
from ..values.costs import NUM_RESAMPLES, BootstrappedStart
from .study import Study


def wants_scans(study: Study[CompareSettings]) -> bool:
    """Whether layers are compared: for a page of several models or texts, or nothing else."""
    several = len(study.models) * len(study.named_texts) > 1
    return study.settings.unit == "layers" and (several or study.settings.judge == "none")


def starts_of(scan: Scan) -> tuple[Start, ...]:
    """The best start of every size; its spread where there are enough samples."""
    try:
        resampled = scan.bootstrap(NUM_RESAMPLES, metric="angular")
    except ScanError:  # it has too few samples
        resampled = {}
    return tuple(
        _start(n, scan.best_block(n, "angular").start, resampled.get(n))
        for n in range(1, scan.num_layers)
    )


def _start(n: int, start: int, resampled: BootstrappedStart | None) -> Start:
    if resampled is None:
        return Start(n, start, None, None)
    places = np.arange(len(resampled.distribution))
    mean = float(resampled.distribution @ places)
    spread = math.sqrt(float(resampled.distribution @ (places - mean) ** 2))
    return Start(n, start, resampled.probability, spread)

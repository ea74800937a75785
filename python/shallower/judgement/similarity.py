"""The scan that criteria of similarity share: one pass over the texts, at their last tokens."""

from contextlib import closing

from ..progress import track
from ..scanning.builder import ScanBuilder
from ..scanning.cka import MIN_BATCH
from ..scanning.hidden_states import stream
from ..scanning.scan import Scan
from ..values.positions import Positions
from .subject import Subject

METRICS = ("angular", "cosine", "relative_l2")

CKA_BATCH = 64
"""Texts in a minibatch of CKA, at most."""

COST = "One pass over the texts, shared by angular, cosine, relative_l2 and cka; last tokens alone."


def shared_scan(subject: Subject) -> Scan:
    """Compare all states at the last tokens of the texts that fit, once for all criteria.

    Args:
        subject: the model and its texts.

    Returns:
        The scan by ``METRICS``, and by CKA where there are enough texts: its minibatches are all
        of one size but for one text.

    Raises:
        StatesError: no text could be compared. Single texts that cannot are counted and named,
            with a warning.
    """
    return subject.meter.shared("scan", lambda: _scan(subject))


def _scan(subject: Subject) -> Scan:
    positions, count = Positions(), subject.num_texts
    minibatches = -(-count // CKA_BATCH)
    builder = ScanBuilder(
        subject.num_layers + 1, METRICS, model=subject.decoder.identity, positions=positions,
        cka_batch=-(-count // minibatches) if count >= MIN_BATCH else None,
    )  # fmt: skip
    states = stream(subject.decoder, subject.batches, positions)
    with track("scan", count, subject.progress) as advance, closing(states) as parts:
        builder.take(parts, advance)
    subject.meter.ran(subject.num_layers, count)
    return builder.finish(subject.texts)

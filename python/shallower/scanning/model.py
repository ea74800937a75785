"""The scan of a model: hidden states of forwards into a ``ScanBuilder``, and how it resumes."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ScanError, TextsError
from ..experts.hooks import ExpertHooks
from ..memory.plan import fitting
from ..memory.streaming import text_steps
from ..models.decoder import Decoder
from ..models.source import place_of
from ..processes import refuse_several
from ..progress import say_goes_on, track
from ..settings.stages import ScanSettings
from ..storage import check_apart
from ..texts.batches import AnyTexts, Batch, TokenBatches
from ..texts.sources import place_of_texts
from ..values.entries import ResultStore
from .builder import SECONDS_BETWEEN_CHECKPOINTS, ScanBuilder
from .hidden_states import forward, states_of
from .scan import LARGE_BYTES, Scan, deciding, keep_scan, known_scan, scan_inputs
from .settling import JUDGED, Settling


def scan(
    model: PreTrainedModel | Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    settings: ScanSettings | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    cka_batch: int | None = None,
    **options: Any,
) -> Scan:
    """Compare all L+1 states of a model, at one token of every text or more, in one pass.

    Args:
        model: a causal language model of transformers, quantised or not, on any device.
        tokenizer: its tokenizer.
        texts: any iterable of strings, read once, tokenised as the tokenizer does by default
            and truncated to ``max_length`` tokens.
        settings: the settings; by default those of :class:`ScanSettings`.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        checkpoint: a file that keeps the work so far, every 20 seconds; if it is there, the scan
            resumes from it. It stays when the scan is done: delete it.
        total: how many texts there are, for the ETA, where ``len(texts)`` is unknown.
        cka_batch: also find linear CKA, from minibatches of so many consecutive texts, 4 to
            1024; not with ``checkpoint``. See :attr:`Scan.cka`. Minibatches are of tokens, if
            several of a text are compared, which are not independent. A ``batch_size`` that is
            ``auto`` is then 8, as minibatches follow the order of the batches.
        options: settings by keyword, as ``max_length=128``: any field of :class:`ScanSettings`.

    Returns:
        The scan.

    Raises:
        SettingsError: there is no such setting.
        PositionsError: ``positions`` names none, or ``seed`` is out of range.
        TextsError: no texts, or one that is not a string.
        StatesError: no text could be compared. Single texts without a token, or whose
            states hold NaN, infinity or only zeros, are counted and named, with a warning.
        ModelError: the model has no list of decoder layers; or no routed experts that can be
            observed, with ``experts``.
        LayersError, MetricError: ``until`` names sizes that the model cannot lose, or no metric
            with bounds decides; with bets, PositionsError for several tokens of a text.
        ScanError: ``checkpoint`` is of another model, other weights, texts or positions, or stops
            otherwise; or it does not go with ``cka_batch``, since a file of sums cannot divide
            minibatches.
        OutputError: ``checkpoint`` lies in the model or among the texts.
        ProcessesError: this is one of several processes, as torchrun starts them.
    """
    refuse_several()
    settings = ScanSettings.of(settings, options)
    positions, metrics, experts = settings.positions, settings.metrics, settings.experts
    if checkpoint and cka_batch is not None:
        raise ScanError("a scan with cka_batch keeps no checkpoint: leave out one of them")
    decoder = Decoder.of(model)
    if checkpoint:
        check_apart(checkpoint, [place_of(decoder.model), place_of_texts(texts)])
    settling, until, tokens = None, settings.stops, settings.tokens
    if until is not None:
        metric = deciding(metrics)
        until.check(metric, positions)
        settling = Settling(until.of(len(decoder)), len(decoder), str(metric))
    if cka_batch is not None:
        tokens = replace(tokens, batch_size=tokens.texts)
    tokens = fitting(decoder, tokens, forward(positions, experts=experts))
    batches = TokenBatches(tokenizer, texts, tokens, window=JUDGED if settling else None)
    identity = decoder.identity
    observed = ExpertHooks(decoder) if experts else None
    builder = ScanBuilder(
        len(decoder) + 1,
        metrics,
        threads=settings.threads,
        model=identity,
        keep_samples=settings.keep_samples or settling is not None,
        cka_batch=cka_batch,
        positions=positions,
        experts=observed.statistics if observed else None,
        content=decoder.content if checkpoint else None,
    )
    if total is None:
        total = length_hint(texts) or None
    saved = time.monotonic()
    with ExitStack() as stack:
        steps = text_steps(decoder)
        advance = stack.enter_context(track("scan", total and total * steps, progress))
        if observed:
            stack.enter_context(observed)
        if checkpoint and Path(checkpoint).exists():
            _resume(builder, batches, Path(checkpoint), settling)
            of = f" of {total:,}" if total else ""
            say_goes_on(f"{batches.num_texts:,}{of} texts were scanned", progress)
            advance(batches.num_texts * steps)
        found = states_of(
            decoder,
            _unsettled(batches.windows(), settling),
            positions,
            experts=observed,
            advance=advance,
            apart=settling is not None,
        )
        for states in found:
            with closing(states) as parts:
                builder.take(parts, advance)
            builder.reject(*batches.take_rejections())
            if settling:
                settling.take(builder.take_samples(settling.metric))
                settling.judge(batches.num_texts, builder.tokens)
            if checkpoint and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(builder.so_far(batches.identity), Path(checkpoint), settling)
                saved = time.monotonic()
        if batches.num_texts == 0:
            raise TextsError("there are no texts to scan")
        builder.reject(*batches.take_rejections())  # of texts behind the last states
        done = builder.finish((batches.identity,))
        if checkpoint:
            _save(builder.so_far(batches.identity), Path(checkpoint), settling)
    if settling:
        samples = done.contents.samples if settings.keep_samples else None
        return Scan(replace(done.contents, samples=samples), settling.settled)
    return done


def stored_scan(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    settings: ScanSettings,
    store: ResultStore,
    checkpoint: Path | None = None,
    progress: bool | None = None,
) -> Scan:
    """Scan texts, which are read twice, unless a command has scanned the same tokens.

    Samples are kept in the store, too, where that takes few bytes. Raises as :func:`scan`, and
    CacheError.
    """
    experts = settings.experts
    tokens = fitting(decoder, settings.tokens, forward(settings.positions, experts=experts))
    read = TokenBatches(tokenizer, texts, tokens)
    looks = [len(batch) for window in read.unpadded() for batch in window]
    inputs = scan_inputs((read.identity,), looks, settings, num_rejected=read.num_rejected)
    scanned = known_scan(store, inputs, keep_samples=settings.keep_samples)
    if scanned is None:
        pairs = len(decoder) * (len(decoder) + 1) // 2
        is_small = 4 * pairs * len(settings.metrics) * read.num_texts <= LARGE_BYTES
        keeps = settings.keep_samples or (is_small and not experts)
        more = replace(settings, batch_size=tokens.texts, keep_samples=keeps)
        how: Any = {"checkpoint": checkpoint, "progress": progress}
        scanned = scan(decoder, tokenizer, texts, settings=more, **how)
        keep_scan(store, inputs, scanned)
    if settings.keep_samples:
        return scanned
    return Scan(replace(scanned.contents, samples=None))


def _unsettled(windows: Iterator[list[Batch]], settling: Settling | None) -> Iterator[list[Batch]]:
    """The windows before all sizes are settled; none is read behind."""
    while not (settling and settling.settled.all) and (window := next(windows, None)) is not None:
        yield window


def _save(scanned: Scan, checkpoint: Path, settling: Settling | None) -> None:
    """Save the work so far."""
    if settling:
        scanned = Scan(replace(scanned.contents, settled=settling.settled))
    scanned.save(checkpoint)


def _resume(
    builder: ScanBuilder, batches: TokenBatches, checkpoint: Path, settling: Settling | None
) -> None:
    try:
        before = Scan.load(checkpoint)
        if settling:
            settling.resume(before.contents.settled)
        elif before.contents.settled is not None:
            raise ScanError(f"it stops when {before.contents.settled.until}")
        builder.resume(before, batches.skip(sum(texts.num_texts for texts in before.texts)))
        batches.take_rejections()  # the scan before has them
        if settling:
            settling.take(builder.take_samples(settling.metric))
    except ScanError as error:
        raise ScanError(
            f"cannot go on from {checkpoint}: {error}; delete it to start anew"
        ) from error

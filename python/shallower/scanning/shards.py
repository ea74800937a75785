"""Shards of a scan: whole batches of all texts, scanned apart and put together to the same bits.

Every shard tokenises all texts, so that it knows the batches of the whole and their one hash, and
runs its own. What shards have in common stands in each, and is compared when they are gathered.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ScanError, TextsError
from ..experts.statistics import ExpertStatistics
from ..progress import say_goes_on, track
from ..storage import write_file
from ..values.counts import counted
from ..values.positions import Positions
from ..values.provenance import forward_versions
from ..values.shard import Shard, ShardOfScan, read_shards
from ..values.tokens import Tokens
from .builder import SECONDS_BETWEEN_CHECKPOINTS, ScanBuilder
from .scan import Scan
from .scan_file import Contents, read_shard, scan_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..experts.hooks import ExpertHooks
    from ..models.decoder import Decoder
    from ..texts.batches import AnyTexts, Batch


@dataclass(frozen=True, slots=True)
class ScannedShard:
    """What was found of a shard, and what it is of.

    Attributes:
        contents: sums over its batches; the texts are all of the scan.
        of: which shard it is, and of what.
    """

    contents: Contents
    of: ShardOfScan

    @property
    def shard(self) -> Shard:
        """Which it is."""
        return self.of.shard

    @property
    def job(self) -> str | None:
        """A hash of all that the scan depends on."""
        return self.of.job

    @property
    def is_complete(self) -> bool:
        """Whether all of its batches are in it."""
        return self.of.is_complete

    @property
    def common(self) -> dict[str, object]:
        """What all shards of a scan have in common, by the words of an error."""
        of = {
            "model": _model_of,
            "weights": lambda one: str(one.content)[:12],
            "texts": _texts_of,
            "settings": _settings_of,
        }
        return {**self.of.common, **{name: one(self.contents) for name, one in of.items()}}

    def to_bytes(self) -> bytes:
        """Give its file."""
        return scan_bytes(self.contents, self.of)

    @classmethod
    def load(cls, path: str | Path) -> "ScannedShard":
        """Read a shard from its file; ScanError as :meth:`Scan.load`."""
        return cls(*read_shard(path))


class Shards:
    """A model, and all texts as token ids, of which any shard can be scanned.

    Raises as :func:`shallower.scan`.

    Attributes:
        texts: the identity of all texts.
        num_batches: the batches of all texts.
    """

    def __init__(
        self,
        model: "PreTrainedModel | Decoder",
        tokenizer: "PreTrainedTokenizerBase",
        texts: "AnyTexts",
        tokens: Tokens,
        *,
        metrics: Sequence[str] = ("angular", "cosine"),
        positions: Positions | None = None,
        threads: int | None = None,
        keep_samples: bool = False,
        experts: bool = False,
        job: str | None = None,
    ) -> None:
        from ..models.decoder import Decoder
        from ..texts.batches import TokenBatches

        self._decoder = Decoder.of(model)
        # Equal on all machines, whatever memory they have.
        self._tokens = Tokens(tokens.max_length, tokens.texts)
        self._positions = positions or Positions()
        self._metrics, self._threads, self._keep = metrics, threads, keep_samples
        self._experts = experts
        self._job = job
        batches = TokenBatches(tokenizer, texts, self._tokens)
        self._batches = [batch for window in batches.unpadded() for batch in window]
        if batches.num_texts == 0:
            raise TextsError("there are no texts to scan")
        self.texts = batches.identity
        self._rejected = batches.take_rejections()

    @property
    def num_batches(self) -> int:
        """The batches of all texts."""
        return len(self._batches)

    @property
    def common(self) -> dict[str, object]:
        """What is the same wherever the same scan is opened, by the words of an error."""
        model, texts = self._decoder.identity, self.texts
        return {
            "dtype": model.dtype,
            "model": model.fingerprint,
            "weights": self._decoder.content,
            "texts": texts.fingerprint,
            "number of batches": self.num_batches,
        }

    def texts_of(self, shard: Shard) -> list[int]:
        """The first text of a shard and the one behind the last, counted from 0."""
        texts = [index for batch in shard.of(self.num_batches) for index, _ in self._batches[batch]]
        return [min(texts, default=0), max(texts, default=-1) + 1]

    def scan(
        self, shard: Shard, *, checkpoint: Path | None = None, progress: bool | None = None
    ) -> ScannedShard:
        """Scan one shard, going on from what an interrupted scan left at ``checkpoint``.

        ScanError: what is at ``checkpoint`` is of other work.
        """
        from ..experts.hooks import ExpertHooks
        from ..memory.streaming import text_steps

        observed = ExpertHooks(self._decoder) if self._experts else None
        builder = ScanBuilder(
            len(self._decoder) + 1,
            self._metrics,
            threads=self._threads,
            model=self._decoder.identity,
            keep_samples=self._keep,
            positions=self._positions,
            experts=observed.statistics if observed else None,
            content=self._decoder.content,
        )
        mine, of = shard.of(self.num_batches), self._of(shard)
        if checkpoint is not None and checkpoint.exists():
            of = _resume(builder, of, checkpoint, self)
            say_goes_on(f"{of.num_done:,} of {len(mine):,} batches were scanned", progress)
        elif shard.index == 0:
            builder.reject(*self._rejected)  # once, however many shards there are
        saved = time.monotonic()
        steps = text_steps(self._decoder)
        bar = track(f"scan, shard {shard}", self._num_texts(mine) * steps, progress)
        with bar as advance, observed or nullcontext():
            advance(self._num_texts(mine[: of.num_done]) * steps)
            for num_batches in self._take(builder, mine[of.num_done :], advance, experts=observed):
                of = replace(of, num_done=of.num_done + num_batches)
                if (
                    checkpoint is not None
                    and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
                ):
                    write_file(checkpoint, self._so_far(builder, of).to_bytes())
                    saved = time.monotonic()
        return self._so_far(builder, of)

    def _num_texts(self, batches: Iterable[int]) -> int:
        return sum(len(self._batches[batch]) for batch in batches)

    def _take(
        self,
        builder: ScanBuilder,
        mine: range,
        advance: Callable[[int], None],
        *,
        experts: "ExpertHooks | None",
    ) -> Iterator[int]:
        """Add the states of batches; how many were added, each time work may be kept."""
        from .hidden_states import states_of

        given = 0

        def windows() -> "Iterator[list[Batch]]":
            from ..texts.batches import WINDOW, padded

            nonlocal given
            for start in range(0, len(mine), WINDOW):
                window = mine[start : start + WINDOW]
                given += len(window)
                yield [padded(self._batches[batch]) for batch in window]

        added = 0
        found = states_of(
            self._decoder, windows(), self._positions, advance=advance, experts=experts
        )
        for states in found:
            with closing(states) as parts:
                builder.take(parts, advance)
            yield given - added
            added = given

    def _of(self, shard: Shard) -> ShardOfScan:
        made_by = forward_versions()
        batch_size = self._tokens.texts
        return ShardOfScan(shard, self.num_batches, 0, batch_size, made_by, self._job)

    def _so_far(self, builder: ScanBuilder, of: ShardOfScan) -> ScannedShard:
        return ScannedShard(builder.so_far(self.texts).contents, of)


def _resume(builder: ScanBuilder, of: ShardOfScan, checkpoint: Path, shards: Shards) -> ShardOfScan:
    try:
        before = ScannedShard.load(checkpoint)
        if replace(before.of, num_done=0) != of:
            raise ScanError("it is of other work, or of another version")
        builder.resume(Scan(before.contents), shards.texts)
    except ScanError as error:
        raise ScanError(
            f"cannot go on from {checkpoint}: {error}; delete it to start anew"
        ) from error
    return before.of


def gather(parts: Iterable[str | Path]) -> Scan:
    """Put the shards of a scan together, to the bytes of the scan that one process makes.

    Args:
        parts: files of shards, as ``shallower scan --shard`` writes them, or folders of such, in
            any order. A shard that is there twice counts once.

    Returns:
        The scan.

    Raises:
        ScanError: shards are missing, incomplete or of different scans: of other models, texts,
            settings or versions.
        StatesError: no sample of all was accepted.
    """
    return joined_shards(read_shards(parts, ScannedShard.load, "scan"))


def _model_of(contents: Contents) -> str:
    return str(contents.model and replace(contents.model, name="the model"))


def _texts_of(contents: Contents) -> str:
    return "; ".join(
        f"{counted(texts.num_texts, 'text')} of at most {counted(texts.max_length, 'token')}, "
        f"{texts.fingerprint[:12]}"
        for texts in contents.texts
    )


def _settings_of(contents: Contents) -> str:
    kept = "with" if contents.samples is not None else "without"
    experts = "" if contents.experts is None else ", with experts"
    return f"{', '.join(contents.sums.metrics)} of {contents.positions}, {kept} samples{experts}"


def joined_shards(shards: Sequence[ScannedShard]) -> Scan:
    """Put all shards together, in their order; raises as :func:`gather`."""
    first = shards[0].contents
    assert first.positions is not None
    builder = ScanBuilder(
        first.sums.num_states,
        first.sums.metrics,
        threads=1,
        model=first.model,
        keep_samples=first.samples is not None,
        positions=first.positions,
        experts=first.experts and ExpertStatistics(first.experts.layers, first.experts.routing),
        content=first.content,
    )
    for shard in shards:
        builder.join(Scan(replace(shard.contents, model=first.model)), *first.texts)
    return builder.finish(first.texts)

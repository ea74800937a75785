"""Parts of a scan: whole batches of all texts, scanned apart and put together to the same bits.

Every process tokenises all texts, so that it knows the batches of the whole and their one hash, and
runs its own.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ScanError, TextsError
from ..experts.statistics import ExpertStatistics
from ..progress import say_goes_on, track
from ..storage import write_file
from ..values.counts import counted
from ..values.positions import Positions
from ..values.schema import of_type
from ..values.shard import Shard
from ..values.tokens import Tokens
from .builder import SECONDS_BETWEEN_CHECKPOINTS, ScanBuilder
from .scan import Scan
from .scan_file import Contents, read_text, scan_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..experts.hooks import ExpertHooks
    from ..models.decoder import Decoder
    from ..texts.batches import AnyTexts, Batch


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
    ) -> None:
        from ..models.decoder import Decoder
        from ..texts.batches import TokenBatches

        self._decoder = Decoder.of(model)
        # Equal on all machines, whatever memory they have.
        self._tokens = Tokens(tokens.max_length, tokens.texts)
        self._positions = positions or Positions()
        self._metrics, self._threads, self._keep = metrics, threads, keep_samples
        self._experts = experts
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
        kept = "with samples" if self._keep else "without samples"
        experts = ", with experts" if self._experts else ""
        return {
            "number of batches": self.num_batches,
            "batch size": self._tokens.batch_size,
            "dtype": model.dtype,
            "model": model.fingerprint[:12],
            "weights": str(self._decoder.content)[:12],
            "texts": f"{counted(texts.num_texts, 'text')} of at most "
            f"{counted(texts.max_length, 'token')}, {texts.fingerprint[:12]}",
            "settings": f"{', '.join(self._metrics)} of {self._positions}, {kept}{experts}",
        }

    def texts_of(self, shard: Shard) -> list[int]:
        """The first text of a shard and the one behind the last, counted from 0."""
        texts = [index for batch in shard.of(self.num_batches) for index, _ in self._batches[batch]]
        return [min(texts, default=0), max(texts, default=-1) + 1]

    def scan(
        self, shard: Shard, *, checkpoint: Path | None = None, progress: bool | None = None
    ) -> Contents:
        """Scan one part, going on from what an interrupted scan left at ``checkpoint``.

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
        mine, done = shard.of(self.num_batches), 0
        if checkpoint is not None and checkpoint.exists():
            done = _resume(builder, shard, checkpoint, self)
            say_goes_on(f"{done:,} of {len(mine):,} batches were scanned", progress)
        elif shard.index == 0:
            builder.reject(*self._rejected)  # once, however many parts there are
        saved = time.monotonic()
        steps = text_steps(self._decoder)
        bar = track(f"scan, shard {shard}", self._num_texts(mine) * steps, progress)
        with bar as advance, observed or nullcontext():
            advance(self._num_texts(mine[:done]) * steps)
            for num_batches in self._take(builder, mine[done:], advance, experts=observed):
                done += num_batches
                if (
                    checkpoint is not None
                    and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
                ):
                    content = scan_text(builder.so_far(self.texts).contents)
                    begun = {"shard": str(shard), "done": done, "content": content}
                    write_file(checkpoint, json.dumps(begun).encode())
                    saved = time.monotonic()
        return builder.so_far(self.texts).contents

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


def _resume(builder: ScanBuilder, shard: Shard, checkpoint: Path, shards: Shards) -> int:
    """Take over what was scanned of a part before; the batches that were."""
    try:
        before: Any = json.loads(checkpoint.read_bytes())
        if before["shard"] != str(shard):
            raise ScanError("it is of other work")
        builder.resume(Scan(read_text(before["content"])), shards.texts)
        return of_type(int, before["done"])
    except (ScanError, ValueError, KeyError, TypeError) as error:
        raise ScanError(
            f"cannot go on from {checkpoint}: {error}; delete it to start anew"
        ) from error


def joined(parts: Sequence[Contents]) -> Scan:
    """Put all parts together, in their order.

    ScanError: they are of different scans. StatesError: no sample of all was accepted.
    """
    first = parts[0]
    if first.positions is None:
        raise ScanError("it does not say which tokens were compared")
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
    for part in parts:
        builder.join(Scan(replace(part, model=first.model)), *first.texts)
    return builder.finish(first.texts)

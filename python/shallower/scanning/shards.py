"""Parts of a scan: whole batches of all texts, scanned apart and put together to the same bits.

Every process tokenises all texts, so that it knows the batches of the whole and their one hash, and
runs its own.
"""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ScanError, TextsError
from ..experts.statistics import ExpertStatistics
from ..progress import say_goes_on, track
from ..storage import write_file
from ..values.counts import counted
from ..values.schema import of_type
from ..values.shard import Shard
from ..values.tokens import Tokens
from .builder import SECONDS_BETWEEN_CHECKPOINTS, ScanBuilder
from .scan import Scan
from .scan_file import Contents, read_text, scan_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.decoder import Decoder
    from ..settings.stages import ScanSettings
    from ..texts.batches import AnyTexts


class Shards:
    """A model, and all texts as token ids, of which any shard can be scanned."""

    def __init__(
        self,
        model: "PreTrainedModel | Decoder",
        tokenizer: "PreTrainedTokenizerBase",
        texts: "AnyTexts",
        settings: "ScanSettings",
    ) -> None:
        from ..models.decoder import Decoder
        from ..texts.batches import TokenBatches

        self._decoder, self._settings = Decoder.of(model), settings
        # Equal on all machines, whatever memory they have.
        tokens = Tokens(settings.tokens.max_length, settings.tokens.texts)
        batches = TokenBatches(tokenizer, texts, tokens)
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
        model, texts, of = self._decoder.identity, self.texts, self._settings
        kept = "with samples" if of.keep_samples else "without samples"
        experts = ", with experts" if of.experts else ""
        return {
            "number of batches": self.num_batches,
            "batch size": of.tokens.texts,
            "dtype": model.dtype,
            "model": model.fingerprint[:12],
            "weights": str(self._decoder.content)[:12],
            "texts": f"{counted(texts.num_texts, 'text')} of at most "
            f"{counted(texts.max_length, 'token')}, {texts.fingerprint[:12]}",
            "settings": f"{', '.join(of.metrics)} of {of.positions}, {kept}{experts}",
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
        from ..texts.batches import WINDOW, padded
        from .hidden_states import states_of

        settings = self._settings
        observed = ExpertHooks(self._decoder) if settings.experts else None
        builder = ScanBuilder(
            len(self._decoder) + 1,
            settings.metrics,
            threads=settings.threads,
            model=self._decoder.identity,
            keep_samples=settings.keep_samples,
            positions=settings.positions,
            experts=observed.statistics if observed else None,
            content=self._decoder.content,
        )
        mine, done = shard.of(self.num_batches), 0
        if checkpoint is not None and checkpoint.exists():
            done = _resume(builder, shard, checkpoint, self)
            say_goes_on(f"{done:,} of {len(mine):,} batches were scanned", progress)
        elif shard.index == 0:
            builder.reject(*self._rejected)  # once, however many parts there are
        saved, steps = time.monotonic(), text_steps(self._decoder)
        rest = iter(mine[done:])
        windows = iter(lambda: [padded(self._batches[one]) for one in islice(rest, WINDOW)], [])
        bar = track(f"scan, shard {shard}", self._num_texts(mine) * steps, progress)
        with bar as advance, observed or nullcontext():
            advance(self._num_texts(mine[:done]) * steps)
            for states in states_of(
                self._decoder, windows, settings.positions, advance=advance, experts=observed
            ):
                with closing(states) as parts:
                    builder.take(parts, advance)
                if checkpoint and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    done = len(mine) - length_hint(rest)
                    content = scan_text(builder.so_far(self.texts).contents)
                    begun = {"shard": str(shard), "done": done, "content": content}
                    write_file(checkpoint, json.dumps(begun).encode())
                    saved = time.monotonic()
        return builder.so_far(self.texts).contents

    def _num_texts(self, batches: Iterable[int]) -> int:
        return sum(len(self._batches[batch]) for batch in batches)


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

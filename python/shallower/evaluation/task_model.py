"""A model in memory as lm-eval uses it: log-likelihoods of continuations, and generated text."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from ..errors import ModelError, TextsError
from ..memory.retry import Halving
from ..models.architecture import admitted_length, evaluating
from ..models.decoder import Decoder
from ..models.head import Head
from ..progress import track
from ..texts.batches import Batch, padded
from ..values.counts import counted
from ..values.tokens import BatchSize, Tokens
from .answers import generated
from .loss import LOGITS_PER_CHUNK, fitting_tokens, logits_at

MAX_NEW_TOKENS = 256
"""Tokens that are generated where a task does not say how many, as lm-eval has it."""

Instances = Sequence[Any]
"""lm-eval's requests: each an ``Instance``, of which ``args`` is read."""


_Sequence = tuple[tuple[int, ...], dict[int, list[int]]]
"""Tokens that run once, and the continuations that end in them or in one more, by request."""


class TaskModel:
    """A causal language model that answers lm-eval; :meth:`as_lm` is what lm-eval takes.

    Unlike ``HFLM`` it holds few logits, plans its batches by free memory, and leaves the tokenizer
    alone. ``sampling`` precedes a task's own generation settings.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: BatchSize = "auto",
        sampling: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        description: str = "tasks",
    ) -> None:
        self.tokenizer: Any = tokenizer
        self._decoder, self._head = decoder, Head.of(decoder)
        self._batch_size, self._sampling = batch_size, sampling or {}
        self._progress, self._description = progress, description

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return admitted_length(self._decoder.config) or 2048

    def as_lm(self) -> Any:
        """Give the model as lm-eval's ``LM``."""
        from lm_eval.api.model import LM

        model = self

        class TaskLM(LM):  # type: ignore[misc]
            def loglikelihood(self, requests: Instances) -> list[tuple[float, bool]]:
                return model.loglikelihood(requests)

            def loglikelihood_rolling(self, requests: Instances) -> list[float]:
                return model.loglikelihood_rolling(requests)

            def generate_until(self, requests: Instances) -> list[str]:
                return model.generate_until(requests)

        return TaskLM()

    def loglikelihood(self, requests: Instances) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each (context, continuation), and whether it is the greedy one.

        TextsError if a continuation has no own token or too many, ModelError for a value that is
        not finite.
        """
        distinct = self._distinct([self._encode(*one.args) for one in requests])
        tokens = Tokens(max(2, len(distinct[0][0])), self._batch_size)
        texts = int(fitting_tokens(self._decoder, tokens).batch_size)
        found: dict[int, tuple[float, bool]] = {}
        halving = Halving()
        model = self._decoder.model
        with track(self._description, len(requests), self._progress) as advance, evaluating(model):
            for start in range(0, len(distinct), texts):
                places = range(start, min(start + texts, len(distinct)))
                batch = padded([(place, np.array(distinct[place][0], int)) for place in places])
                for part, answers in halving.run(batch, lambda one: self._score(one, distinct)):
                    found |= answers
                    advance(sum(len(distinct[i][1]) for i in part.samples))
        return [found[place] for place in range(len(requests))]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, divided as lm-eval does: spaces between belong to the second."""
        if not context:
            ids = self._tokens(continuation, special=False)
            first = self.tokenizer.bos_token_id
            start = int(self.tokenizer.eos_token_id if first is None else first)
            return ([start], ids) if ids[:1] != [start] else (ids[:1], ids[1:])
        alone = context.rstrip()
        whole = self._tokens(context + continuation)
        given = self._tokens(alone)
        return given, whole[len(given) :]

    def _tokens(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with what the tokenizer adds by default, but that never twice."""
        start = self.tokenizer.bos_token
        special = special and not (start and text.startswith(start))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids

    def _say_cut_off(self, lengths: Iterable[int], room: int) -> None:
        """Warn of requests that lose their beginnings, as they do by lm-eval."""
        long = sum(length > room for length in lengths)
        if long:
            warnings.warn(
                f"{counted(long, 'request')} of tasks would not fit the {self.max_length:,} tokens "
                f"that the model's config admits: each goes without its beginning (--num-shots "
                f"makes them shorter)",
                stacklevel=3,
            )

    def _distinct(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[_Sequence]:
        """The sequences to run, the longest first, each once."""
        self._say_cut_off((len(one) + len(other) - 1 for one, other in requests), self.max_length)
        sequences: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for place, (context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise TextsError(
                    f"an answer of a task has {counted(len(continuation), 'token')}: expected 1 to "
                    f"{self.max_length}, the positions that the model has"
                )
            ids = (context + continuation)[-(self.max_length + 1) : -1]
            sequences.setdefault(tuple(ids), {})[place] = continuation
        return sorted(sequences.items(), key=lambda one: (-len(one[0]), one[0]))

    @torch.inference_mode()
    def _score(self, batch: Batch, sequences: Sequence[_Sequence]) -> dict[int, tuple[float, bool]]:
        """The answers to the requests of a batch, by their places."""
        predicting = np.zeros(batch.input_ids.shape, bool)
        rows: list[int] = []
        tokens: list[int] = []
        places: list[int] = []
        seen = 0
        for number, index in enumerate(batch.samples):
            ids, continuations = sequences[index]
            first = len(ids) - max(map(len, continuations.values()))
            predicting[number, first : len(ids)] = True
            seen += len(ids) - first  # rows up to the last one of this sequence
            for place, continuation in continuations.items():
                rows += range(seen - len(continuation), seen)
                tokens += continuation
                places += [place] * len(continuation)
        logs, hits = self._predicted(batch, predicting, np.array(rows), np.array(tokens))
        return {
            place: (float(logs[mine].sum()), bool(hits[mine].all()))
            for place in dict.fromkeys(places)
            for mine in [np.array(places) == place]
        }

    def _predicted(
        self,
        batch: Batch,
        predicting: NDArray[np.bool_],
        rows: NDArray[np.int64],
        tokens: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The log-probability of each token at its row, and whether no other is likelier."""
        logs, hits = np.zeros(len(rows)), np.zeros(len(rows), bool)
        start = 0
        for logits in logits_at(self._head, batch, predicting):
            here = np.flatnonzero((rows >= start) & (rows < start + len(logits)))
            row = torch.from_numpy(rows[here] - start).to(logits.device)
            token = torch.from_numpy(tokens[here]).to(logits.device)
            chunks = logits.split(max(1, LOGITS_PER_CHUNK // logits.shape[1]))
            total = torch.cat([some.float().logsumexp(-1) for some in chunks])
            best = torch.cat([some.argmax(-1) for some in chunks])
            logs[here] = (logits[row, token].float() - total[row]).double().cpu().numpy()
            hits[here] = (best[row] == token).cpu().numpy()
            start += len(logits)
            del logits, chunks  # before the next are made
        if not np.isfinite(logs).all():
            raise ModelError(
                f"the log-likelihood of an answer is not finite: the model's logits overflow or "
                f"are NaN in {self._head.dtype}; load it as bfloat16 or float32"
            )
        return logs, hits

    def loglikelihood_rolling(self, requests: Instances) -> list[float]:
        """Refuse by TextsError: no task whose scores can be paired by item needs this."""
        raise TextsError("a task of perplexity is measured by --perplexity (evaluate_perplexity)")

    def generate_until(self, requests: Instances) -> list[str]:
        """Continue each (text, settings) until a stop sequence, its end, or the last token allowed.

        ModelError where the model cannot generate, or has no room.
        """
        if not self._decoder.model.can_generate():
            raise ModelError(
                f"{type(self._decoder.model).__name__} cannot generate text, which a task needs: "
                f"leave out tasks that are answered in text (tasks, --tasks)"
            )
        settings = [_Generation.of({**one.args[1], **self._sampling}) for one in requests]
        alike: dict[str, list[int]] = {}
        for place, one in enumerate(settings):
            alike.setdefault(repr(one), []).append(place)
        found: dict[int, str] = {}
        with (
            track(self._description, len(requests), self._progress) as advance,
            evaluating(self._decoder.model),
        ):
            for places in alike.values():
                way = settings[places[0]]
                encoded = {place: self._tokens(requests[place].args[0]) for place in places}
                self._say_cut_off(map(len, encoded.values()), self.max_length - way.num_tokens)
                places.sort(key=lambda place: (-len(encoded[place]), place))
                step = 8 if self._batch_size == "auto" else self._batch_size
                for start in range(0, len(places), step):
                    some = places[start : start + step]
                    texts = self._continue([encoded[place] for place in some], way)
                    found.update(zip(some, texts, strict=True))
                    advance(len(some))
        return [found[place] for place in range(len(requests))]

    def _continue(self, contexts: list[list[int]], way: "_Generation") -> list[str]:
        """Generate behind contexts."""
        room = self.max_length - way.num_tokens
        if room < 1:
            raise ModelError(
                f"a task generates {way.num_tokens} tokens, and the model has only "
                f"{self.max_length} positions: leave it out (tasks, --tasks)"
            )
        given = [np.array(ids[-room:], np.int64) for ids in contexts]
        width = max(map(len, given))
        output = generated(
            self._decoder,
            given,
            max_new_tokens=way.num_tokens,
            stopping_criteria=_stopping(self.tokenizer, way.until, width),
            **dict(way.settings),
        )
        answers = [self._up_to_end(ids) for ids in output[:, width:].tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [_before(way.until, text) for text in texts]

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """The tokens before the first that ends a text; behind it a batch may have anything."""
        own = getattr(self._decoder.model.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return list(takewhile(lambda one: one not in ends, ids))


@dataclass(frozen=True)
class _Generation:
    """How a task has text generated; ``settings`` are of transformers' ``generate``, by name."""

    num_tokens: int
    until: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Generation":
        """Read settings by the names that lm-eval has for them."""
        settings = dict(given)
        until = settings.pop("until", None) or ()
        counts = [settings.pop(name, None) for name in _COUNTS]
        if not settings.setdefault("do_sample", False):
            settings = {name: one for name, one in settings.items() if name not in _SAMPLERS}
        return cls(
            next((int(one) for one in counts if one is not None), MAX_NEW_TOKENS),
            (until,) if isinstance(until, str) else tuple(until),
            tuple(sorted(settings.items())),
        )


_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLERS = ("temperature", "top_p", "top_k", "min_p")


def _stopping(tokenizer: Any, until: tuple[str, ...], given: int) -> StoppingCriteriaList:
    """End rows whose last tokens hold what ends an answer, however that is tokenised."""
    lengths = [len(tokenizer.encode(one, add_special_tokens=False)) for one in until]
    last = max(lengths, default=0) + 2

    def has_ended(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids[:, given:][:, -last:].tolist())
        ended = [any(one in text for one in until) for text in texts]
        return torch.tensor(ended, device=input_ids.device)

    return StoppingCriteriaList([has_ended])


def _before(until: Sequence[str], text: str) -> str:
    """A text up to what ends it."""
    for one in until:
        text = text.split(one)[0] if one else text
    return text

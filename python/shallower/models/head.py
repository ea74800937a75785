"""The head of a causal language model: from final states to logits, a few rows at a time.

All logits of a batch are (B, T, V), which at a vocabulary of 262,144 are 34 GB for 8 texts of 4,096
tokens. Since a row of them is made of its own final state alone, they are never held together.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from .architecture import DecoderLayers, evaluating
from .decoder import Decoder
from .offload import is_on_disk, resident

LOGITS_AT_ONCE = 1 << 26
"""Logits that are made at once: 256 MiB in float32."""

FEWEST_ROWS = 4
"""Rows from which on a product has the same bits for any number of rows, in float32 on a CPU."""

_PROBE = ((0, 1, 2), (2, 0, 1))
"""Token ids that every vocabulary has."""

_PICKED = (4, 2, 5, 0)
"""Tokens of the probe, in an order that no sequence has."""


class ForwardEnded(Exception):  # noqa: N818 - no error
    """Ends a forward; carries the states behind the last layer, or the inner model, that ran."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


@dataclasses.dataclass(frozen=True)
class Head:
    """The part of a causal language model behind its inner model.

    The model's own forward makes the logits while its inner model returns the given states, so soft
    caps, scales and hooks stay its own. If that is impossible the whole forward runs (``by_rows``
    is False); :meth:`of` checks it.
    """

    decoder: Decoder
    vocab_size: int  # logits of a row
    dtype: torch.dtype  # of the logits
    output: Any  # of the inner model for a few tokens; None: run as a whole

    @classmethod
    def of(cls, decoder: Decoder) -> "Head":
        """Find the head of a model, which runs once, on six tokens."""
        head, expected, found = cls.probe(decoder)
        return head if found is not None and _agree(found, expected) else head.whole()

    @classmethod
    def probe(cls, decoder: Decoder) -> tuple["Head", torch.Tensor, torch.Tensor | None]:
        """Make a head, and the logits of a few tokens: the model's, and the head's or None."""
        runner, outputs = decoder.layers.runner, []
        run = runner.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            outputs.append(run(*args, **kwargs))
            return outputs[-1]

        ids = torch.tensor(_PROBE, device=decoder.device)
        with torch.no_grad(), evaluating(decoder.model), one_of_each(decoder.layers):
            if runner is decoder.model:
                logits = _run(decoder.model, ids).logits
            else:
                with replaced(runner, keep):
                    logits = _run(decoder.model, ids).logits
            head = cls(decoder, logits.shape[-1], logits.dtype, outputs[0] if outputs else None)
            expected = logits.flatten(0, 1)[list(_PICKED)]
            if len(outputs) != 1:
                return head, expected, None
            try:
                states = _first(head.output)
                return head, expected, head.logits(states.flatten(0, 1)[list(_PICKED)])
            except torch.OutOfMemoryError:
                raise
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError):
                return head, expected, None

    def whole(self) -> "Head":
        """The head that runs the whole model for logits."""
        return dataclasses.replace(self, output=None)

    @property
    def by_rows(self) -> bool:
        """Whether logits are made of final states, a few rows at a time."""
        return self.output is not None

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Run the model up to its head: (B, T) ids to (B, T, D) states; the mask is 1 at tokens."""
        return self.reached_by(
            self.decoder.model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
        )

    def reached_by(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a forward up to the inner model's (B, T, D) states; ModelError if that never runs."""
        runner = self.decoder.layers.runner
        run = runner.forward

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise ForwardEnded(_first(run(*args, **kwargs)))

        try:
            with replaced(runner, stop):
                forward(*args, **kwargs)
        except ForwardEnded as reached:
            return reached.states
        raise ModelError(
            f"the forward of {type(self.decoder.model).__name__} did not run its layers"
        )

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the head to (R, D) final states: (R, V), as to dtype and device the model's own."""
        # Sequences of one token each: no mask is made between rows, no position is beyond the last.
        ids = torch.zeros((len(rows), 1), dtype=torch.long, device=self.decoder.device)
        output = _with_states(self.output, rows[:, None])
        with replaced(self.decoder.layers.runner, lambda *_args, **_kwargs: output):
            logits: torch.Tensor = _run(self.decoder.model, ids).logits
        return logits[:, 0]

    def logits_of(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: NDArray[np.int64]
    ) -> Iterator[torch.Tensor]:
        """Make the logits of some tokens, in parts of (R, V).

        ``tokens`` are ascending places counted through the batch; the mask is 0 at padding.
        """
        if not self.by_rows:
            outputs = self.decoder.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
            for part in self._parts(tokens):
                yield outputs.logits.flatten(0, 1)[part.to(outputs.logits.device)]
            return
        states = self.states(input_ids, attention_mask).flatten(0, 1)
        if len(tokens) < FEWEST_ROWS:
            yield self.logits(states)[torch.from_numpy(tokens)]
            return
        with self._resident():
            for part in self._parts(tokens):
                yield self.logits(states[part.to(states.device)])

    def states_at(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: NDArray[np.int64]
    ) -> torch.Tensor:
        """The (R, ...) from which :meth:`logits_from` makes the logits of some tokens.

        Their final states, or the logits themselves where the head needs the whole model; tokens
        and mask as for :meth:`logits_of`.
        """
        if not self.by_rows:
            return torch.cat([*self.logits_of(input_ids, attention_mask, tokens)])
        states = self.states(input_ids, attention_mask).flatten(0, 1)
        return states[torch.from_numpy(tokens).to(states.device)]

    def logits_from(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Make logits of what :meth:`states_at` gave, in parts of (R, V)."""
        with self._resident():
            for part in rows.split(part_sizes(len(rows), self.vocab_size)):
                yield self.logits(part) if self.by_rows else part

    @contextmanager
    def _resident(self) -> Iterator[None]:
        """Move offloaded weights of the head to their device once."""
        inner = set(self.decoder.layers.runner.modules())
        with ExitStack() as stack:
            for module in self.decoder.model.modules():
                if module not in inner and any(True for _ in module.parameters(recurse=False)):
                    stack.enter_context(resident(module))
            yield

    def _parts(self, tokens: NDArray[np.int64]) -> Sequence[torch.Tensor]:
        return torch.from_numpy(tokens).split(part_sizes(len(tokens), self.vocab_size))


def part_sizes(num_rows: int, vocab_size: int) -> list[int]:
    """Divide rows into parts of ``LOGITS_AT_ONCE`` logits at most, ``FEWEST_ROWS`` at least."""
    most = max(1, LOGITS_AT_ONCE // vocab_size)
    parts = max(1, min(-(-num_rows // most), num_rows // FEWEST_ROWS))
    return [num_rows * (i + 1) // parts - num_rows * i // parts for i in range(parts)]


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward inside the ``with`` statement; accelerate's hooks return after."""
    kept = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if kept is None:
            vars(module).pop("forward", None)
        else:
            module.forward = kept


@contextmanager
def one_of_each(layers: DecoderLayers) -> Iterator[None]:
    """Run the first streamed layer of each class alone, to probe a model; others repeat it."""
    given: dict[type, Any] = {}

    def first(module: nn.Module) -> Callable[..., Any]:
        work = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            given[type(module)] = work(*args, **kwargs)
            return given[type(module)]

        return forward

    def like_it(module: nn.Module) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: given[type(module)]

    seen: set[type] = set()
    with ExitStack() as stack:
        for module in layers.modules if any(map(is_on_disk, layers.modules)) else ():
            ways = like_it if type(module) in seen else first
            seen.add(type(module))
            stack.enter_context(replaced(module, ways(module)))
        yield


def _run(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _first(output: Any) -> torch.Tensor:
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """What an inner model would return with these states, and nothing beside them if it can."""
    if isinstance(output, torch.Tensor):
        return states
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{next(iter(output)): states})


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if logits are the same but for rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    finite = expected.float().nan_to_num(0, 0, 0)
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps) * float(finite.abs().max())
    return torch.allclose(found.float(), expected.float(), 0, tolerance, equal_nan=True)


def divergence_terms(
    log_p: torch.Tensor, log_q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms of KL(p ‖ q), and p and q, from normalised (R, V) logits, which are overwritten.

    A term is p (log p - log q) + q - p, so that rounding cancels: equal logits give 0 exactly.
    """
    p = log_p.exp()
    terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0)
    q = log_q.exp_()
    return terms.add_(q).sub_(p), p, q

"""The states of all layers at a few thousand tokens, and how much of one a linear map explains."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CriterionError, ModelError
from ..memory.budget import BUDGET
from ..memory.streaming import look_at_states
from ..models.layerwise import rows
from ..patching.least_squares import NormalEquations
from ..results.scores import Scores
from ..texts.batches import Batch
from ..values.counts import counted
from .subject import Subject, evenly

FIT_TOKENS = 4096
HELD_OUT_TOKENS = 512
"""Tokens to fit and tokens held out, at most; evenly over all but the first ones of texts."""

TOKENS_RUN = 8192
"""Calibration tokens that are run, about: more than are kept, so that no text counts too much."""

HELD_OUT_TEXTS = 4
"""Every k-th text is held out."""

MASSIVE = 10.0
"""Medians of the norms of a state beyond which a token carries massive activations."""

FEWEST_TEXTS = 2 * HELD_OUT_TEXTS
"""Texts of which two are held out, so that there is an error."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """Tokens to fit and tokens held out, without padding, first tokens and massive activations."""

    batches: list[Batch]
    fitted: list[NDArray[np.bool_]]  # for every batch, (B, T), true at the tokens to fit
    held_out: list[NDArray[np.bool_]]  # likewise
    texts: NDArray[np.int64]  # (held-out tokens,), the held-out text of each, from 0

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "KeptTokens":
        """Choose tokens of batches that are padded on the right; CriterionError if too few."""
        lengths = np.concatenate([batch.attention_mask.sum(axis=1) for batch in batches])
        share = min(1.0, TOKENS_RUN / lengths.sum())
        some = evenly(batches, max(FEWEST_TEXTS, math.ceil(len(lengths) * share)))
        masks = [batch.attention_mask.astype(bool) for batch in some]
        texts = np.concatenate([[0], np.cumsum([len(mask) for mask in masks])])
        numbers = [
            np.broadcast_to(np.arange(start, start + len(mask))[:, None], mask.shape)
            for start, mask in zip(texts, masks, strict=False)
        ]
        for mask in masks:
            mask[:, 0] = False
        flat, text = (np.concatenate([a.ravel() for a in arrays]) for arrays in (masks, numbers))
        held = text % HELD_OUT_TEXTS == HELD_OUT_TEXTS - 1
        ends = np.cumsum([mask.size for mask in masks])[:-1]
        parts = []
        for wanted, most in ((flat & ~held, FIT_TOKENS), (flat & held, HELD_OUT_TOKENS)):
            kept = np.zeros(len(flat), dtype=bool)
            kept[_evenly(np.flatnonzero(wanted), most)] = True
            parts.append(kept)
        numbered = np.unique(text[parts[1]], return_inverse=True)[1]
        if not parts[0].any() or not len(numbered) or numbered[-1] < 1:
            raise CriterionError(
                f"{counted(texts[-1], 'text')}, too few to fit a map and to hold two out of "
                f"{HELD_OUT_TEXTS}: give at least {FEWEST_TEXTS} of two tokens (--texts)"
            )
        fitted, held_out = (
            [
                part.reshape(mask.shape)
                for part, mask in zip(np.split(kept, ends), masks, strict=True)
            ]
            for kept in parts
        )
        return cls(some, fitted, held_out, numbered)

    def only(self, fitted: NDArray[np.bool_], held_out: NDArray[np.bool_]) -> "KeptTokens":
        """Keep only the tokens to fit, (N,), and held out, (M,), at which these are true."""
        masks = (_narrowed(self.fitted, fitted), _narrowed(self.held_out, held_out))
        return KeptTokens(self.batches, *masks, self.texts[held_out])


def _evenly(places: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)
    return places[chosen]


def _narrowed(masks: list[NDArray[np.bool_]], stay: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    ends = np.cumsum([mask.sum() for mask in masks])[:-1]
    narrowed = [np.zeros_like(mask) for mask in masks]
    for new, mask, part in zip(narrowed, masks, np.split(stay, ends), strict=True):
        new[mask] = part
    return narrowed


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class KeptStates:
    """The states of all layers at the tokens that are kept, in the model's dtype, on one device."""

    tokens: KeptTokens
    fitted: list[torch.Tensor]  # x^(0) .. x^(L), (N, D) each
    held_out: list[torch.Tensor]  # likewise
    spreads: NDArray[np.float64]  # (L+1, held-out texts), Σ ‖x − mean of the fitted x‖² over tokens

    def unexplained(
        self, start: int, inputs: torch.Tensor, held_out: torch.Tensor
    ) -> Iterator[Scores]:
        """Measure how much of later states no linear map of some inputs reaches.

        What is missing to x^(stop) at ``start`` is fitted by ridge regression: each input's penalty
        is F/N times its sum of squares, F inputs and N tokens. ``inputs`` are (N, F) at the tokens
        to fit, ``held_out`` the same at those held out.

        Yields for stop = start + 1 .. L the 1 - R² on held-out text by text: the squared length of
        what is missing after the map, over the spread of x^(stop).
        """
        solved = _predictor(inputs, held_out)
        for stop in range(start + 1, len(self.fitted)):
            fitted, missing = (
                states[stop].float() - states[start].float()
                for states in (self.fitted, self.held_out)
            )
            errors = (missing - solved @ fitted).double().square().sum(-1)
            yield Scores(self._by_text(errors), self.spreads[stop])

    def _by_text(self, values: torch.Tensor) -> NDArray[np.float64]:
        weights = values.cpu().numpy()
        sums = np.bincount(self.tokens.texts, weights, minlength=self.spreads.shape[1])
        return sums.astype(np.float64, copy=False)


def _predictor(inputs: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """The (M, N) float32 matrix from targets at N tokens to predictions at M held-out tokens.

    It is A (XᵀX + F/N diag(XᵀX))⁻¹ Xᵀ for inputs X (N, F) and A (M, F): of all targets alike.
    """
    count, width = inputs.shape
    equations = NormalEquations.empty(width, 0, inputs.device)
    equations.add(inputs, inputs.new_empty(count, 0))
    squares = equations.gram.diagonal().clone()
    squares.clamp_(min=float(squares.mean()) * 1e-12)  # an input that is always zero
    solution = NormalEquations(equations.gram, held_out.double().T, count)
    return solution.solve(width / count, squares).float() @ inputs.float().T


def kept_states(subject: Subject) -> KeptStates:
    """Run the calibration texts and keep states of all layers, once for all criteria."""
    return subject.shared("kept_states", lambda: _kept_states(subject))


def _kept_states(subject: Subject) -> KeptStates:
    model, tokens = subject.layerwise, KeptTokens.of(subject.batches)
    model.check(tokens.batches[0].split(1)[0])
    parts: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [
        ([], []) for _ in range(len(model) + 1)
    ]

    def look(index: int, state: int, states: torch.Tensor) -> None:
        for kept, masks in zip(parts[state], (tokens.fitted, tokens.held_out), strict=True):
            kept.append(rows(states, masks[index]).to(subject.decoder.device))

    look_at_states(model, tokens.batches, look)
    fitted, held_out = ([torch.cat(found[i]) for found in parts] for i in range(2))
    plain, plain_held = _without_massive(fitted, held_out)
    tokens = tokens.only(plain, plain_held)
    fitted, held_out = (
        [states[torch.from_numpy(np.flatnonzero(stay))] for states in some]
        for some, stay in ((fitted, plain), (held_out, plain_held))
    )
    spreads = []
    for state, (fit, held) in enumerate(zip(fitted, held_out, strict=True)):
        spread = (held.double() - fit.double().mean(0)).square().sum(-1)
        sums = np.bincount(tokens.texts, weights=spread.cpu().numpy())
        if not np.isfinite(sums).all():
            raise ModelError(
                f"state {state} is not finite on the calibration texts: load the model as "
                f"bfloat16 or float32 (dtype, --dtype)"
            )
        spreads.append(sums)
    made = KeptStates(tokens, fitted, held_out, np.array(spreads))
    BUDGET.hold(made, sum(states.nbytes for states in (*fitted, *held_out)))
    return made


def _without_massive(
    fitted: list[torch.Tensor], held_out: list[torch.Tensor]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens to fit, and which held out, carry massive activations at no state."""
    massive = [np.zeros(len(some[0]), dtype=bool) for some in (fitted, held_out)]
    for fit, held in zip(fitted, held_out, strict=True):
        norms = [states.float().norm(dim=-1) for states in (fit, held)]
        bound = MASSIVE * norms[0].median()
        for found, of_tokens in zip(massive, norms, strict=True):
            found |= (of_tokens > bound).cpu().numpy()
    return ~massive[0], ~massive[1]

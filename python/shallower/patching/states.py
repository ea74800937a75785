"""The texts of a patch as batches, the states of two models on them, and what one misses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import PatchError, TextsError
from ..models.layerwise import Layerwise, rows
from ..models.offload import in_file
from ..models.residual_writers import Writer
from ..texts.batches import AnyTexts, Batch, TokenBatches, TokenisedText, tokenise
from ..texts.splits import is_held_out
from ..values.counts import counted
from ..values.layers import Block
from ..values.tokens import Tokens
from .least_squares import HeldOut, NormalEquations

MAX_HELD_OUT = 8192
"""Tokens on which choices are made, at most."""

BATCH_TOKENS = 1024
"""Tokens of a batch, about, where ``batch_size`` is no less: a step takes whole batches."""

FILES = 3
"""Files of states of all tokens: both models', and those that the descent begins at."""

FARTHEST = 12.0
"""How far a text's first token is moved at most, in mean norms of the other tokens' states.

It carries massive activations (Sun et al., 2402.17762), some hundred times as long, that one layer
makes. Where that layer is dropped, all of them are out of reach of one matrix, and what comes near
costs the other tokens; norms stand before all that reads the stream, so that a part does as well.
"""

TINY = torch.finfo(torch.float32).tiny


def divide(
    tokenizer: PreTrainedTokenizerBase,
    texts: AnyTexts,
    *,
    tokens: Tokens,
    num_tokens: int,
) -> tuple[list[Batch], list[Batch]]:
    """Divide texts into batches to fit and batches held out, every eighth text.

    No more texts are read than ``num_tokens`` to fit take, and each is tokenised once.
    """
    counts = [0, 0]
    enough = (num_tokens, min(MAX_HELD_OUT, num_tokens))
    parts: tuple[list[TokenisedText], list[TokenisedText]] = ([], [])
    for index, text in enumerate(texts):
        held = is_held_out(index)
        if counts[0] >= enough[0] and counts[1] >= enough[1]:
            break
        if counts[held] < enough[held]:
            (tokenised,) = tokenise(tokenizer, [text], tokens.max_length)
            parts[held].append(tokenised)
            counts[held] += len(tokenised.ids)
    for part in parts:
        part.sort(key=lambda one: (len(one.ids), one.text))  # of one length together: less padding
    at_once = BATCH_TOKENS * len(parts[0]) // max(1, counts[0])
    tokens = replace(tokens, batch_size=max(1, min(tokens.texts, at_once)))
    fitted, held_out = (
        [
            replace(batch, given=np.array([part[index].given for index in batch.samples]))
            for batch in TokenBatches(tokenizer, part, tokens, min_tokens=2)
        ]
        for part in parts
    )
    if not fitted or not held_out:
        raise TextsError(
            f"{counted(len(parts[0]) + len(parts[1]), 'text')}, too few to fit and to hold out: "
            f"give at least 8 with two tokens each, better some thousand"
        )
    return fitted, held_out


class Spool:
    """States of batches on the CPU, (B, T, D) a batch, in memory or in one temporary file."""

    def __init__(
        self, batches: Sequence[Batch], width: int, dtype: torch.dtype, *, on_disk: bool
    ) -> None:
        self.batches, self._width = batches, width
        sizes = [batch.input_ids.size * width for batch in batches]
        like = torch.empty(sum(sizes), dtype=dtype, device="meta" if on_disk else "cpu")
        whole = in_file(like) if on_disk else like
        self._parts = [
            part.view(*batch.input_ids.shape, width)
            for part, batch in zip(whole.split(sizes), batches, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(part.nbytes for part in self._parts)

    def like(self) -> "Spool":
        """Make room for other states of the same batches, in memory."""
        return Spool(self.batches, self._width, self._parts[0].dtype, on_disk=False)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._parts[index]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        self._parts[index].copy_(states)


def _first_rows(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """(B, D) of (B, T, D): the first tokens of the texts."""
    mask = np.zeros(batch.input_ids.shape, dtype=bool)
    mask[:, 0] = True
    return rows(states, mask)


def _other_rows(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """(N, D) of (B, T, D): all tokens that are learned but the first."""
    mask = batch.learned
    mask[:, 0] = False
    return rows(states, mask)


def missing_equations(
    model: Layerwise, layer: int, writers: Sequence[Writer], *, whole: Spool, cut: Spool
) -> NormalEquations:
    """Run a layer, and sum up what is missing behind it to the whole model's states.

    ``cut`` are the cut model's states before the layer, and ``whole`` those of the whole model to
    reach behind it: first tokens come as near as :data:`FARTHEST` lets them. Inputs of the
    equations are those of the layer's writers, joined; first tokens are kept apart, of prompts too,
    since all that follows them attends to them. Other tokens of prompts are in neither, nor is
    padding.
    """
    equations: NormalEquations | None = None
    for batch, inputs, missing, _ in _missing(model, layer, writers, whole, cut):
        if equations is None:
            sizes = inputs.shape[-1], missing.shape[-1]
            equations = NormalEquations.empty(*sizes, inputs.device)
        equations.add(_other_rows(batch, inputs), _other_rows(batch, missing))
        equations.keep(_first_rows(batch, inputs), _first_rows(batch, missing))
    assert equations is not None
    return equations


def missing_rows(
    model: Layerwise, layer: int, writers: Sequence[Writer], *, whole: Spool, cut: Spool
) -> HeldOut:
    """Run a layer on held-out texts, and keep what :func:`missing_equations` sums, by token."""
    held_out = HeldOut()
    kinds = (held_out.others, _other_rows), (held_out.firsts, _first_rows)
    for batch, inputs, missing, aim in _missing(model, layer, writers, whole, cut):
        for kind, take in kinds:
            kind.parts.append((take(batch, inputs), take(batch, missing)))
            kind.reached += float(take(batch, aim).double().square().sum())
    return held_out


def _missing(
    model: Layerwise, layer: int, writers: Sequence[Writer], whole: Spool, cut: Spool
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Run a layer batch by batch: inputs (B, T, F), and what is missing to states (B, T, D).

    Then these states that are aimed at, first tokens no farther than ``FARTHEST``.
    """
    for index, batch in enumerate(cut.batches):
        with _inputs([writer.module for writer in writers]) as taken:
            output = model.run(batch, cut[index], (layer,))
        inputs = torch.cat([x.view(*output.shape[:2], -1) for x in taken()], dim=-1)
        aim = whole[index].to(output.device, torch.float32, copy=True)
        missing = aim - output.float()
        missing[:, 0] *= _share_within_reach(batch, aim, missing[:, 0])
        aim[:, 0] = output[:, 0].float() + missing[:, 0]
        yield batch, inputs, missing, aim


def _share_within_reach(batch: Batch, aim: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(B, 1): how much of what is missing at the first tokens, (B, D), is aimed at."""
    others = torch.from_numpy(batch.attention_mask[:, 1:]).to(aim)
    mean = (aim[:, 1:].norm(dim=-1) * others).sum(-1) / others.sum(-1).clamp(min=1.0)
    return (FARTHEST * mean / first.norm(dim=-1).clamp(min=TINY)).clamp(max=1.0)[:, None]


@contextmanager
def _inputs(modules: Sequence[nn.Module]) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Watch modules; gives a function that returns their last inputs."""
    taken: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            taken[place] = args[0]

        return hook

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.enter_context(module.register_forward_pre_hook(keep(place)))
        yield lambda: [taken[place] for place in range(len(modules))]


def no_layer_before(block: Block) -> PatchError:
    """The error for a block that begins with the first layer."""
    return PatchError(
        f"there is no layer before the block {block} that could be solved anew: drop later layers"
    )


def no_writer(layer: int) -> PatchError:
    """The error for a layer that cannot be solved."""
    return PatchError(
        f"layer {layer}, before the block, does not write into the residual stream by a plain "
        f"linear map (experts, a norm behind it, or quantised weights): load the model "
        f"unquantised, or drop another block"
    )


def not_finite() -> PatchError:
    """The error for states that are no numbers."""
    return PatchError(
        "the states before a block are not finite: load the model as bfloat16 or float32 (--dtype)"
    )

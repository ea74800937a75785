"""Hidden states of a model at the chosen tokens, by hooks.

For every batch: the base model runs once, without its head and without a cache; a hook on
every layer keeps the rows of the chosen tokens (the last that is no padding, by default) of
x^(l), the layer's input, and one more those of x^(L), the last layer's output before the final
norm. Nothing else of a batch is kept. On CUDA the rows travel to pinned memory while the next
batch runs.
"""

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..models.architecture import DecoderLayers, evaluating
from ..models.decoder import Decoder
from ..models.positions import check_length
from ..texts.batches import Batch
from ..values.positions import Positions
from .parts import Part

LAST = Positions()


def chosen_tokens(
    batch: Batch, positions: Positions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the tokens of a batch that are compared; padding may be left or right.

    Args:
        batch: B texts of T tokens.
        positions: which tokens of each.

    Returns:
        Their (N,) rows and columns, by row.
    """
    rows, columns = [], []
    for row, (mask, text) in enumerate(zip(batch.attention_mask, batch.samples, strict=True)):
        tokens = np.flatnonzero(mask)
        chosen = tokens[positions.chosen(len(tokens), int(text))]
        rows.append(np.full(len(chosen), row))
        columns.append(chosen)
    return np.concatenate(rows), np.concatenate(columns)


def stream(
    model: nn.Module | Decoder, batches: Iterable[Batch], positions: Positions = LAST
) -> Generator[Part, None, None]:
    """Run batches through a model, and keep the states of the chosen tokens.

    Args:
        model: a model of transformers or its base model, or what was found out about it.
        batches: padded tokens.
        positions: which tokens of each text.

    Yields:
        A part for each batch. The states are (L+1, N, D) on the CPU in the model's dtype, by text
        in the batch's order, then by position; ``samples`` are the texts; they are the sequences,
        too, unless no text can have several tokens.

    Raises:
        ModelError: the model has no list of decoder layers, or did not run them once each.
        TextsError: a batch is longer than the positions that the model has learned.
    """
    decoder = Decoder.of(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(decoder.model))
        hooks = stack.enter_context(_RowHooks(decoder.layers))
        pending: tuple[_HostCopy, NDArray[np.int64], int] | None = None
        for batch in batches:
            check_length(batch.input_ids.shape[1], decoder.positions)
            rows, columns = chosen_tokens(batch, positions)
            copy = _HostCopy(hooks.run(batch, rows, columns, decoder.device))
            if pending:
                yield _part(*pending, positions)
            pending = copy, batch.samples[rows], len(batch)
        if pending:
            yield _part(*pending, positions)


def _part(copy: "_HostCopy", texts: NDArray[np.int64], steps: int, positions: Positions) -> Part:
    sequences = None if positions.one_a_text else texts
    return Part(copy.wait(), texts, steps, state_first=True, sequences=sequences)


def _positions(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Positions from the first token that is no padding; models count so by themselves
    where the padding is on the right.
    """
    if batch.attention_mask[:, 0].all():
        return {}
    counted = torch.from_numpy(batch.attention_mask).cumsum(dim=1) - 1
    return {"position_ids": counted.clamp(min=0).to(device)}


class _RowHooks:
    """Hooks that keep the chosen tokens' rows of one forward at a time."""

    def __init__(self, layers: DecoderLayers) -> None:
        self.layers = layers
        self.rows: list[torch.Tensor | None] = [None] * (len(layers) + 1)
        self.places: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self.shape = torch.Size()
        self.handles: list[Any] = []

    def __enter__(self) -> "_RowHooks":
        for index, layer in enumerate(self.layers.modules):
            self.handles.append(
                layer.register_forward_pre_hook(self._input_hook(index), with_kwargs=True)
            )
        self.handles.append(self.layers.modules[-1].register_forward_hook(self._output_hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """One forward of the base model; the rows of the L+1 states, (N, D) each."""
        self.rows = [None] * len(self.rows)
        attention_mask = torch.from_numpy(batch.attention_mask).to(device)
        self.places = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        self.shape = attention_mask.shape
        self.layers.runner(
            input_ids=torch.from_numpy(batch.input_ids).to(device),
            attention_mask=attention_mask,
            use_cache=False,
            **_positions(batch, device),
        )
        states = [state for state in self.rows if state is not None]
        if len(states) != len(self.rows):
            missing = [index for index, state in enumerate(self.rows) if state is None]
            raise ModelError(f"{self.layers.path}: the forward gave no states for {missing}")
        return states

    def _input_hook(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(index, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _output_hook(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._keep(len(self.layers), output[0] if isinstance(output, tuple) else output)

    def _keep(self, index: int, states: Any) -> None:
        if not isinstance(states, torch.Tensor) or states.shape[:-1] != self.shape:
            shape = tuple(getattr(states, "shape", ()))
            raise ModelError(
                f"{self.layers.path}: expected hidden states of shape (B, T, D) with (B, T) = "
                f"{tuple(self.shape)} at layer {index}, got {shape}"
            )
        rows, columns = (place.to(states.device) for place in self.places)
        self.rows[index] = states[rows, columns]


class _HostCopy:
    """Rows on their way to the CPU."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        dtype = rows[0].dtype
        for row in rows[1:]:
            dtype = torch.promote_types(dtype, row.dtype)
        devices = {row.device for row in rows if row.device.type == "cuda"}
        self.states = torch.empty(
            (len(rows), *rows[0].shape), dtype=dtype, pin_memory=bool(devices)
        )
        for state, row in zip(self.states, rows, strict=True):
            state.copy_(row, non_blocking=row.device.type == "cuda")
        self.events = []
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.events.append(event)

    def wait(self) -> torch.Tensor:
        """The states, once they have arrived."""
        for event in self.events:
            event.synchronize()
        return self.states

"""Hidden states out of a model, last token only, by hooks.

For every batch: the base model runs once, without its head and without a cache; a hook on
every layer keeps the row of the last token that is no padding of x^(l), the layer's input,
and one more that of x^(L), the last layer's output before the final norm. Nothing else of
a batch is kept. On CUDA the rows travel to pinned memory while the next batch runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .calibration import Batch
from .errors import ModelError
from .models.architecture import DecoderLayers, evaluating, find_layers, input_device
from .models.positions import check_length, learned_positions


def last_token(attention_mask: torch.Tensor) -> torch.Tensor:
    """The position of the last token that is no padding, left or right: (B, T) to (B,)."""
    positions = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask.bool() * positions).argmax(dim=1)


def stream(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield every batch with its states, (L+1, B, D) on the CPU in the model's dtype.

    Raises:
        ModelError: the model has no list of decoder layers, or did not run them once each.
        TextsError: a batch is longer than the positions that the model has learned.
    """
    layers = find_layers(model)
    positions = learned_positions(model)
    device = input_device(layers)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        hooks = stack.enter_context(_LastTokenHooks(layers))
        pending: tuple[Batch, _HostCopy] | None = None
        for batch in batches:
            check_length(batch.input_ids.shape[1], positions)
            copy = _HostCopy(hooks.run(batch, device))
            if pending:
                yield pending[0], pending[1].wait()
            pending = batch, copy
        if pending:
            yield pending[0], pending[1].wait()


def _positions(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Positions from the first token that is no padding; models count so by themselves
    where the padding is on the right.
    """
    if batch.attention_mask[:, 0].all():
        return {}
    counted = torch.from_numpy(batch.attention_mask).cumsum(dim=1) - 1
    return {"position_ids": counted.clamp(min=0).to(device)}


class _LastTokenHooks:
    """Hooks that keep the last tokens' rows of one forward at a time."""

    def __init__(self, layers: DecoderLayers) -> None:
        self.layers = layers
        self.rows: list[torch.Tensor | None] = [None] * (len(layers) + 1)
        self.last = torch.empty(0)
        self.shape = torch.Size()
        self.handles: list[Any] = []

    def __enter__(self) -> "_LastTokenHooks":
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
    def run(self, batch: Batch, device: torch.device) -> list[torch.Tensor]:
        """One forward of the base model; the L+1 rows, (B, D) each."""
        self.rows = [None] * len(self.rows)
        attention_mask = torch.from_numpy(batch.attention_mask).to(device)
        self.last, self.shape = last_token(attention_mask), attention_mask.shape
        self.layers.runner(
            input_ids=torch.from_numpy(batch.input_ids).to(device),
            attention_mask=attention_mask,
            use_cache=False,
            **_positions(batch, device),
        )
        rows = [row for row in self.rows if row is not None]
        if len(rows) != len(self.rows):
            missing = [index for index, row in enumerate(self.rows) if row is None]
            raise ModelError(f"{self.layers.path}: the forward gave no states for {missing}")
        return rows

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
        last = self.last.to(states.device)
        self.rows[index] = states[torch.arange(len(last), device=states.device), last]


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

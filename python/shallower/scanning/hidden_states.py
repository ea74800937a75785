"""Hidden states of a model at the chosen tokens, by hooks.

For every batch the base model runs once, without its head and without a cache. A hook on every
layer keeps the rows of the chosen tokens of x^(l), the layer's input; one more keeps those of
x^(L), the last layer's output before the final norm. By default the token is the last that is no
padding. Nothing else of a batch is kept. On CUDA the rows travel to pinned memory while the next
batch runs (``models.transfers``).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ModelError
from ..experts.hooks import ExpertHooks
from ..memory.plan import Forward
from ..memory.retry import Halving
from ..memory.streaming import Streamed
from ..models.architecture import DecoderLayers, evaluating
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise, check_states
from ..models.transfers import Gathered, HostCopies
from ..texts.batches import Batch
from ..values.positions import Positions
from .builder import Chunk

LAST = Positions()


def forward(positions: Positions = LAST, *, experts: bool = False) -> Forward:
    """The forward of a scan, as its memory is rehearsed; with ``experts`` they run twice.

    Beside it lie the states of the batch before, on their way to the CPU.
    """

    def run(decoder: Decoder, batch: Batch) -> None:
        with ExitStack() as stack:
            if experts:
                stack.enter_context(ExpertHooks(decoder)).turn_to(batch)
            hooks = stack.enter_context(_RowHooks(decoder.layers, HostCopies()))
            hooks.run(batch, positions, decoder.device)

    def beside(decoder: Decoder, length: int) -> int:
        count = min(length, positions.count or length)
        width = getattr(decoder.config, "hidden_size", 0)
        return (len(decoder) + 1) * count * int(width) * decoder.model.dtype.itemsize

    return Forward(run, beside)


def chosen_tokens(
    batch: Batch, positions: Positions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The (N,) rows and columns of the tokens that are compared, by row.

    Padding may be left or right.
    """
    rows, columns = [], []
    for row, (mask, text) in enumerate(zip(batch.attention_mask, batch.samples, strict=True)):
        tokens = np.flatnonzero(mask)
        chosen = tokens[positions.chosen(len(tokens), int(text))]
        rows.append(np.full(len(chosen), row))
        columns.append(chosen)
    return np.concatenate(rows), np.concatenate(columns)


def compared_of(positions: Positions) -> Callable[[Batch], int]:
    """Count the tokens of a batch that are compared."""
    return lambda batch: len(chosen_tokens(batch, positions)[0])


def states_of(
    decoder: Decoder,
    windows: Iterable[list[Batch]],
    positions: Positions = LAST,
    *,
    advance: Callable[[int], object] = lambda _: None,
    experts: ExpertHooks | None = None,
    apart: bool = False,
) -> Iterator[Generator[Chunk, None, None]]:
    """The states of windows of batches; of a model whose layers are streamed, of several at once.

    Each is to be closed before the next is asked for. ``experts`` as for :func:`stream`, and
    ``advance`` as for :func:`stream_by_layer`; windows stay ``apart`` where each is judged.
    """
    copies, halving = HostCopies(), Halving()
    if not decoder.is_streamed:
        for window in windows:
            yield stream(
                decoder, window, positions, copies=copies, halving=halving, experts=experts
            )
        return
    streamed = Streamed(Layerwise(decoder))
    for group in windows if apart else streamed.groups(windows, compared_of(positions)):
        yield stream_by_layer(streamed, group, positions, experts=experts, advance=advance)


def stream(
    model: nn.Module | Decoder,
    batches: Iterable[Batch],
    positions: Positions = LAST,
    *,
    copies: HostCopies | None = None,
    halving: Halving | None = None,
    experts: ExpertHooks | None = None,
) -> Generator[Chunk, None, None]:
    """Run batches through a model, and keep the states of the chosen tokens.

    A part is given while the next batch runs, so that two batches' states are in memory at most.
    ``copies`` and ``halving`` of earlier calls bring buffers, and how many texts the device takes.
    ``experts`` count what runs meanwhile.

    Yields:
        A part for each batch, or several where the device has no memory for the whole. The states
        are (L+1, N, D) on the CPU in the model's dtype, by text in the batch's order, then by
        position; ``samples`` are the texts; they are the sequences, too, unless no text can have
        several tokens. Those of a model on CUDA are overwritten by the next part.

    Raises:
        ModelError: the model has no list of decoder layers, or did not run them once each; or
            there is no memory for a single text.
        TextsError: a batch is longer than the positions that the model has learned.
    """
    decoder = Decoder.of(model)
    copies, halving = copies or HostCopies(), halving or Halving()
    with ExitStack() as stack:
        stack.enter_context(evaluating(decoder.model))
        hooks = stack.enter_context(_RowHooks(decoder.layers, copies))
        pending: tuple[Callable[[], torch.Tensor], NDArray[np.int64], int] | None = None

        def forward(batch: Batch) -> tuple[list[Gathered], NDArray[np.int64]]:
            with nullcontext() if experts is None else experts.watching(batch):
                return hooks.run(batch, positions, decoder.device)

        for batch in batches:
            decoder.check_length(batch.input_ids.shape[1])
            for part, (gathered, texts) in halving.run(batch, forward):
                copy = copies.start(gathered)
                if pending:
                    yield _part(pending[0](), *pending[1:], positions)
                pending = copy, texts, len(part)
        if pending:
            yield _part(pending[0](), *pending[1:], positions)


def stream_by_layer(
    streamed: Streamed,
    batches: Iterable[Batch],
    positions: Positions = LAST,
    *,
    experts: ExpertHooks | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Generator[Chunk, None, None]:
    """Run batches through a model whose layers are streamed, each read once for all with room.

    Gives what :func:`stream` does, to the same bits on a CPU, when the last layer has run.
    ``advance`` receives the texts of a batch that a layer has run on.
    """
    size, kept = len(streamed.model) + 1, list[_ChosenRows]()

    def look(place: int, state: int, states: torch.Tensor) -> None:
        kept[place].keep(state, states)
        if experts is not None:
            experts.turn_to(kept[place].batch)
            experts.check_stream(state - 1, states)

    for group in streamed.groups(([batch] for batch in batches), compared_of(positions)):
        copies = HostCopies()
        kept[:] = [_ChosenRows(batch, positions, size, copies) for batch in group]
        streamed.run(group, look=look, advance=advance)
        if experts is not None:
            experts.turn_to(None)
        yield from (
            _part(copies.start([*rows.gathered.values()])(), rows.texts, 0, positions)
            for rows in kept
        )


def _part(
    states: torch.Tensor, texts: NDArray[np.int64], steps: int, positions: Positions
) -> Chunk:
    sequences = None if positions.one_a_text else texts
    return Chunk(states, texts, steps, state_first=True, sequences=sequences)


def _positions(batch: Batch) -> dict[str, torch.Tensor]:
    """Positions from the first token that is no padding.

    Models count so by themselves where the padding is on the right.
    """
    if batch.attention_mask[:, 0].all():
        return {}
    counted = torch.from_numpy(batch.attention_mask).cumsum(dim=1) - 1
    return {"position_ids": counted.clamp(min=0)}


class _ChosenRows:
    """The rows of a batch's chosen tokens in its states, beside those of one device and dtype."""

    def __init__(
        self, batch: Batch, positions: Positions, num_states: int, copies: HostCopies
    ) -> None:
        rows, columns = chosen_tokens(batch, positions)
        self.batch, self.texts = batch, batch.samples[rows]
        self.missing = set(range(num_states))
        self.gathered: dict[tuple[torch.device, torch.dtype, int], Gathered] = {}
        self._tokens = torch.from_numpy(rows * batch.input_ids.shape[1] + columns)
        self._tokens_on: dict[torch.device, torch.Tensor] = {}
        self._copies = copies

    def keep(self, index: int, states: torch.Tensor) -> None:
        """Keep the rows of a state, (B, T, D)."""
        device = states.device
        if device not in self._tokens_on:
            self._tokens_on[device] = self._copies.send(self._tokens, device)
        tokens = self._tokens_on[device]
        torch.index_select(states.flatten(0, 1), 0, tokens, out=self._place(index, states))

    def free(self) -> None:
        """Let go of the memory on devices."""
        self.gathered, self._tokens_on = {}, {}

    def _place(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Where the rows of a state go, beside those of the same device and dtype."""
        key = states.device, states.dtype, states.shape[-1]
        if key not in self.gathered:
            shape = len(self.missing), len(self._tokens), key[2]
            with torch.inference_mode(False):
                rows = torch.empty(shape, dtype=key[1], device=states.device)
            self.gathered[key] = Gathered(rows, [])
        gathered = self.gathered[key]
        if index not in gathered.states:
            gathered.states.append(index)
            self.missing.discard(index)
        return gathered.rows[gathered.states.index(index)]


class _RowHooks:
    """Hooks that keep the chosen tokens' rows of one forward at a time."""

    def __init__(self, layers: DecoderLayers, copies: HostCopies) -> None:
        self.layers, self.copies = layers, copies
        self.rows: _ChosenRows | None = None
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
        self, batch: Batch, positions: Positions, device: torch.device
    ) -> tuple[list[Gathered], NDArray[np.int64]]:
        """One forward of the base model; the (N, D) rows of the L+1 states, and their texts."""
        rows = self.rows = _ChosenRows(batch, positions, len(self.layers) + 1, self.copies)
        inputs = {
            "input_ids": torch.from_numpy(batch.input_ids),
            "attention_mask": torch.from_numpy(batch.attention_mask),
            **_positions(batch),
        }
        inputs = {name: self.copies.send(tensor, device) for name, tensor in inputs.items()}
        try:
            self.layers.runner(**inputs, use_cache=False)
            if missing := sorted(rows.missing):
                raise ModelError(f"{self.layers.path}: the forward gave no states for {missing}")
            return list(rows.gathered.values()), rows.texts
        finally:  # of a forward that failed, too: a smaller one may need the memory
            rows.free()

    def _input_hook(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(index, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _output_hook(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._keep(len(self.layers), output[0] if isinstance(output, tuple) else output)

    def _keep(self, index: int, states: Any) -> None:
        assert self.rows is not None
        check_states(self.rows.batch, states, index, path=self.layers.path)
        self.rows.keep(index, states)

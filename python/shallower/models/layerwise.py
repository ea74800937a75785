"""Running some of a model's layers, from the states before them.

The model's own forward makes positions, masks and caches, while all other layers pass on what they
get. This works in any family whose layers are joined by the residual stream alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..texts.batches import Batch
from .architecture import evaluating, swapped
from .decoder import Decoder
from .head import ForwardEnded, Head, one_of_each, replaced
from .offload import is_offloaded, read_to_cpu, reading_of, stored_bytes
from .prefetch import Ahead


@contextmanager
def _requiring_grad(weights: Iterable[torch.Tensor], wanted: bool) -> Iterator[None]:
    """Let weights require gradients in the body, or not."""
    others = [weight for weight in weights if weight.requires_grad != wanted]
    try:
        for weight in others:
            weight.requires_grad_(wanted)
        yield
    finally:
        for weight in others:
            weight.requires_grad_(not wanted)


Gradients = Callable[[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor | None]]]
"""Takes gradients behind a layer back through it; once, since its graph is freed.

From (B, T, D) gradients in the states behind the layer to those before it, and those in its
weights, None for one that has no part in the states.
"""


class Layerwise:
    """A model whose layers can be run by themselves; it is probed by two short forwards.

    ``modules`` are its L decoder layers, which ``is_streamed`` from disk or not; ``head`` makes its
    logits.
    """

    def __init__(self, model: PreTrainedModel | Decoder) -> None:
        decoder = Decoder.of(model)
        self.head = Head.of(decoder)
        self.modules, self.is_streamed = decoder.layers.modules, decoder.is_streamed
        self._model, self._device = decoder.model, decoder.device
        self._runner, self._path = decoder.layers.runner, decoder.layers.path
        self._extras: list[int] = []
        self._is_evaluating = self._is_checked = False
        self._ahead = Ahead()
        read_to_cpu(self._model)
        self._probe()

    def __len__(self) -> int:
        return len(self.modules)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Run the embedding: x^(0), (B, T, D) in the model's dtype."""
        self.head.decoder.check_length(batch.input_ids.shape[1])
        return self._reach(batch, None, (0,), run_last=False)

    def run(
        self,
        batch: Batch,
        states: torch.Tensor,
        layers: Sequence[int],
        *,
        each: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Run layers, whose indices ascend, from (B, T, D) states before the first of them.

        Returns the states after the last; ``each`` is called with the states after each layer.
        """
        if not layers or each is None:
            return self._reach(batch, states, layers) if layers else states

        def receive(_module: nn.Module, _args: Any, output: Any) -> None:
            each(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for layer in layers[:-1]:
                stack.enter_context(self.modules[layer].register_forward_hook(receive))
            states = self._reach(batch, states, layers)
        each(states)  # the forward ends within the last layer, before its hook would run
        return states

    def trace(
        self, batch: Batch, states: torch.Tensor, layer: int, *, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, Gradients]:
        """Run a layer from (B, T, D) states, with its graph to some weights, frozen or not."""
        given = states.clone().requires_grad_()
        with _requiring_grad(weights, True):
            output = self.differentiable(batch, given, layer)

        def gradients(behind: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
            behind = behind.to(output, copy=True)
            with _requiring_grad(weights, True):
                before, *found = torch.autograd.grad(
                    output, [given, *weights], behind, allow_unused=True
                )
            return before, list(found)

        return output, gradients

    def passes(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Divide layers into passes over all batches: one, or one a layer if they are offloaded."""
        if not any(is_offloaded(self.modules[layer]) for layer in layers):
            yield layers
            return
        for layer in self.one_by_one(layers):
            yield (layer,)

    def one_by_one(self, layers: Iterable[int]) -> Iterator[int]:
        """Give layers in their order, each with its weights on its device while it is looked at."""
        order = list(layers)
        yield from self._there([iter(order)], dict(pairwise(order)).get)

    def in_step(self, jobs: Iterable[Iterator[int]], order: Iterable[int]) -> None:
        """Carry out jobs, each of which yields the ascending layers that it needs.

        Each layer is brought to its device once for all jobs that need it next. ``order``, all that
        may be needed, helps to fetch the next one.
        """
        for _ in self._there(jobs, dict(pairwise(sorted(order))).get):
            pass

    def _there(
        self, jobs: Iterable[Iterator[int]], ahead: Callable[[int], int | None]
    ) -> Iterator[int]:
        """Each layer that jobs need, while it is there; the one ``ahead`` is fetched meanwhile."""
        needed = [(job, next(job, None)) for job in jobs]
        reading = reading_of(self._model)
        try:
            while waiting := [(job, layer) for job, layer in needed if layer is not None]:
                layer = min(layer for _, layer in waiting)
                module = self.modules[layer]
                reading.bytes_read += stored_bytes(module)
                with self._ahead.resident(module):
                    following = ahead(layer)
                    if following is not None:
                        self._ahead.fetch(self.modules[following])
                    yield layer
                    needed = [
                        (job, next(job, None) if wanted == layer else wanted)
                        for job, wanted in waiting
                    ]
        finally:
            self._ahead.drop()

    @contextmanager
    def starting_from(self, states: torch.Tensor, layers: Sequence[int]) -> Iterator[None]:
        """Start all forwards in the body from (B, T, D) states before the first of ``layers``.

        Only these run, then the final norm and the head.
        """
        with self._only(layers, states, stop=False):
            yield

    def check(self, batch: Batch) -> None:
        """Check that the layers, run one after the other, make what the whole model makes."""
        if self._is_checked:
            return
        states = self.embed(batch)
        expected = self.run(batch, states, range(len(self)))
        reading_of(self._model).bytes_read += sum(map(stored_bytes, self.modules))
        with self.alone():
            for layer in self.one_by_one(range(len(self))):
                states = self.run(batch, states, (layer,))
        made, wanted = token_rows(batch, states), token_rows(batch, expected)
        if not torch.allclose(made, wanted, rtol=0, atol=0, equal_nan=True):  # what is NaN is both
            raise self._joined_by_more()
        self._is_checked = self.is_streamed  # read twice for it

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Say in a ModelError that layers cannot be run one by one, where one fails by itself."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
            raise self._joined_by_more() from error

    def _joined_by_more(self) -> ModelError:
        instead = "; load it without --stream" if self.is_streamed else ""
        return ModelError(
            f"the layers of {type(self._model).__name__} cannot be run one by one: more than the "
            f"residual stream goes from one to the next{instead}"
        )

    @torch.enable_grad()
    def check_joints(self) -> bool:
        """Check by stand-ins, without weights, that each layer's states go on as they are.

        What stand-ins make requires gradients, so it is recognised wherever it is passed on. False
        where a layer is given more than the states: :meth:`check` decides whether that counts. What
        layers pass on in secret is not found.
        """
        made: list[torch.Tensor] = []
        is_more = False

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal is_more
                states = args[0] if args else kwargs.pop("hidden_states")
                if index != len(made) or (made and states is not made[-1]):
                    raise self._joined_by_more()
                is_more |= any(one.requires_grad for one in _tensors([args[1:], kwargs]))
                made.append(states.detach().clone().requires_grad_())
                extras = [states.new_zeros((), requires_grad=True)] * self._extras[index]
                return (made[-1], *extras) if self._is_tuple[index] else made[-1]

            return forward

        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.enter_context(replaced(module, stand_in(index)))
            stack.enter_context(self.evaluating())
            weights = (one for one in self._model.parameters() if not one.is_inference())
            stack.enter_context(_requiring_grad(weights, False))
            stack.enter_context(self.alone())
            self._runner(**self._probed(), use_cache=False)
        if len(made) < len(self):
            raise self._joined_by_more()
        return not is_more

    @torch.enable_grad()
    def differentiable(self, batch: Batch, states: torch.Tensor, layer: int) -> torch.Tensor:
        """Run a layer from (B, T, D) states, with the graph to its states and weights."""
        return self._ended(batch, states, (layer,))

    @torch.inference_mode()
    def _reach(
        self,
        batch: Batch,
        states: torch.Tensor | None,
        layers: Sequence[int],
        run_last: bool = True,
    ) -> torch.Tensor:
        return self._ended(batch, states, layers, run_last)

    def _ended(
        self,
        batch: Batch,
        states: torch.Tensor | None,
        layers: Sequence[int],
        run_last: bool = True,
    ) -> torch.Tensor:
        """The states behind a forward that ends within its layers."""
        try:
            with self._only(layers if run_last else (), states, stop=True):
                self._forward(self._runner, batch)
            raise ModelError(f"{self._path}: the forward did not run the layers {list(layers)}")
        except ForwardEnded as reached:
            check_states(batch, reached.states, layers[-1] + 1 if run_last else 0, path=self._path)
            return reached.states
        except torch.OutOfMemoryError:  # whose traceback would hold the tensors of what failed
            if len(layers) > 1 or not self._ahead.give_way():
                raise
        return self._ended(batch, states, layers, run_last)

    def _forward(self, module: nn.Module, batch: Batch) -> Any:
        return module(
            input_ids=torch.from_numpy(batch.input_ids).to(self._device),
            attention_mask=torch.from_numpy(batch.attention_mask).to(self._device),
            use_cache=False,
        )

    @contextmanager
    def _only(
        self, layers: Sequence[int], states: torch.Tensor | None, stop: bool
    ) -> Iterator[None]:
        """Let only ``layers`` work: the first gets ``states``, the last ends the forward."""
        first, last = (layers[0], layers[-1]) if layers else (0, 0)
        wanted = set(layers)
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                given = states if index == first else None
                work = module.forward if index in wanted else None
                ends = stop and index == last
                stack.enter_context(replaced(module, self._replacement(index, work, given, ends)))
            stack.enter_context(self.evaluating())
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch the model to evaluation in the body, once for many runs, since it takes time."""
        if self._is_evaluating:
            yield
            return
        with evaluating(self._model), swapped(self, _is_evaluating=True):
            yield

    def _replacement(
        self,
        index: int,
        work: Callable[..., Any] | None,
        given: torch.Tensor | None,
        ends: bool,
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if given is not None:
                hidden = given.to(hidden.device)
            if work is None:
                output = (hidden, *[None] * self._extras[index])
            else:
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
                output = work(*args, **kwargs)
                output = output if isinstance(output, tuple) else (output,)
            if ends:
                raise ForwardEnded(output[0])
            return output if self._is_tuple[index] else output[0]

        return forward

    @torch.inference_mode()
    def _probe(self) -> None:
        """Learn what the layers return: a tensor, or a tuple that begins with one."""
        self._is_tuple = [False] * len(self.modules)
        self._extras = [0] * len(self.modules)

        def hook(index: int) -> Callable[..., None]:
            def note(_module: nn.Module, _args: Any, output: Any) -> None:
                self._is_tuple[index] = isinstance(output, tuple)
                self._extras[index] = len(output) - 1 if isinstance(output, tuple) else 0

            return note

        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.enter_context(module.register_forward_hook(hook(index)))
            with evaluating(self._model), one_of_each(self.head.decoder.layers):
                self._runner(**self._probed(), use_cache=False)

    def _probed(self) -> dict[str, torch.Tensor]:
        """The inputs of a short forward."""
        return {"input_ids": torch.zeros((1, 2), dtype=torch.long, device=self._device)}


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def check_states(batch: Batch, states: Any, index: int, *, path: str) -> None:
    """Check that a state is of shape (B, T, D); ModelError names the layers and its index."""
    expected = batch.input_ids.shape
    if not isinstance(states, torch.Tensor) or states.shape[:-1] != expected:
        shape = tuple(getattr(states, "shape", ()))
        raise ModelError(
            f"{path}: expected hidden states of shape (B, T, D) with (B, T) = {tuple(expected)} at "
            f"layer {index}, got {shape}"
        )


def token_rows(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """(N, D) of (B, T, D): the states of a batch's tokens without the padding, text by text."""
    return rows(states, batch.attention_mask.astype(bool))


def rows(states: torch.Tensor, mask: NDArray[np.bool_]) -> torch.Tensor:
    """(N, D) of (B, T, D) where a (B, T) mask is true, found on the CPU without synchronising."""
    places = torch.from_numpy(np.flatnonzero(mask)).to(states.device)
    return states.flatten(0, 1).index_select(0, places)

"""States behind the first layers that cuts share, cached so that no layer runs twice.

A cut's path is the indices of its layers; it starts from its longest cached beginning.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import TypeVar

import torch

from ..models.layerwise import Layerwise
from ..texts.batches import Batch
from .budget import BUDGET

KEPT_PATHS = 2
"""Paths kept in any case, thinned if need be: the whole model's, and that of a cut in search."""

Item = TypeVar("Item")

Place = tuple[int, tuple[int, ...]]
"""A batch, and the layers that have run on it."""

Take = Callable[[Place, torch.Tensor], object]
"""Receives a batch and the layers of a cut, with the states behind the last of them."""


class Prefixes:
    """Cuts run on batches, each from states that it shares with those before it.

    States lie on the CPU in the model's dtype: ``memory`` bytes, by default a share of the budget.
    Cached are the embedding and every k-th layer; the least recently used are evicted, and using
    some counts as using those before them.
    """

    def __init__(
        self, model: Layerwise, batches: Sequence[Batch], *, memory: int | None = None
    ) -> None:
        self.model, self.batches, self._memory = model, batches, memory
        self._used = 0
        self._cached: OrderedDict[Place, torch.Tensor] = OrderedDict()

    def run(self, places: Iterable[Place], take: Take) -> None:
        """Run the layers of cuts on batches; ``take`` receives places with (B, T, D) states."""
        for group in self.groups(places, lambda place: self.bytes_of([place[0]])):
            with self.model.evaluating():
                order = {layer for _, path in group for layer in path}
                self.model.in_step([self.job(group, take)], order)

    def job(self, places: Iterable[Place], take: Take) -> Iterator[int]:
        """Run several cuts on batches, one layer after the other for all of them.

        A job of :meth:`Layerwise.in_step`. States that cuts share are made once; ``take`` receives
        each place as soon as its states are there. In memory, a cut runs all its remaining layers
        in one forward pass, and its states stay on the device.
        """
        done, states = self._begin(places)
        while True:
            for place in [place for place in states if done[place] == len(place[1])]:
                take(place, states.pop(place))
            if not states:
                return
            layer = min(place[1][done[place]] for place in states)
            if self.model.is_streamed:
                yield layer
            made: dict[Place, torch.Tensor] = {}
            for place in states:
                index, path = place
                if path[done[place]] != layer:
                    continue
                stop = done[place] + 1 if self.model.is_streamed else len(path)
                behind = index, path[:stop]
                if behind not in made:
                    made[behind] = self._run(place, done[place], stop, states[place])
                states[place], done[place] = made[behind], stop

    def _run(self, place: Place, start: int, stop: int, states: torch.Tensor) -> torch.Tensor:
        """Run the layers of a path from one number to another, and keep what is not its end."""
        index, path = place
        depths = count(start + 1)

        def keep(found: torch.Tensor) -> None:
            if (depth := next(depths)) < len(path):
                self._keep((index, path[:depth]), found)

        batch, layers = self.batches[index], path[start:stop]
        if not self.model.is_streamed:
            return self.model.run(batch, states, layers, each=keep)
        found = self._settled(self.model.run(batch, states, layers))  # so copied only once
        keep(found)
        return found

    def _settled(self, states: torch.Tensor) -> torch.Tensor:
        """States between two layers: on the CPU, while those of others run."""
        return states.cpu() if self.model.is_streamed else states

    def groups(self, items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
        """Divide items, of ``size`` bytes, into those that run together; in memory one by one."""
        if not self.model.is_streamed:
            yield from ([item] for item in items)
            return
        group: list[Item] = []
        left = self._capacity
        for item in items:
            if group and size(item) > left:
                yield group
                group, left = [], self._capacity
            group.append(item)
            left -= size(item)
        if group:
            yield group

    def bytes_of(self, indices: Iterable[int]) -> int:
        """The bytes of the states of batches before and behind a layer that runs on them."""
        return 2 * sum(self._sizes[index] for index in indices)

    def _begin(self, places: Iterable[Place]) -> tuple[dict[Place, int], dict[Place, torch.Tensor]]:
        """As :meth:`_start` of each place, of which those that begin alike share the states."""
        done, states = dict[Place, int](), dict[Place, torch.Tensor]()
        begun: dict[Place, torch.Tensor] = {}
        for index, path in dict.fromkeys(places):
            known, found = self._start(index, path)
            states[index, path] = begun.setdefault((index, path[:known]), found)
            done[index, path] = known
        return done, states

    def _start(self, index: int, path: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        """How many layers of a path need not run again on a batch, and the states behind them."""
        depths = [d for d in range(len(path), -1, -1) if (index, path[:d]) in self._cached]
        for depth in depths:
            self._cached.move_to_end((index, path[:depth]))
        if depths:
            return depths[0], self._cached[index, path[: depths[0]]]
        states = self._settled(self.model.embed(self.batches[index]))
        self._keep((index, ()), states)
        return 0, states

    def _keep(self, place: Place, states: torch.Tensor) -> None:
        """Copy states to the CPU, if they are of those that are cached."""
        size = self._sizes[place[0]]
        if len(place[1]) % self._every or place in self._cached or size > self._capacity:
            return
        while self._used + size > self._capacity:
            (other, _), _ = self._cached.popitem(last=False)
            self._used -= self._sizes[other]
        self._cached[place] = torch.empty(states.shape, dtype=states.dtype).copy_(states)
        self._used += size

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of a state of each batch."""
        first = self.batches[0].split(1)[0]
        states = self.model.embed(first)
        of_token = states.numel() * states.element_size() // first.input_ids.size
        return [batch.input_ids.size * of_token for batch in self.batches]

    @cached_property
    def _capacity(self) -> int:
        """Bytes to keep; where layers are streamed, as many again are for what runs together."""
        whole = BUDGET.share(self) if self._memory is None else self._memory
        return whole // 2 if self.model.is_streamed else whole

    @cached_property
    def _every(self) -> int:
        """The least k for which every k-th state of :data:`KEPT_PATHS` over all batches fits."""
        layers, whole = len(self.model), KEPT_PATHS * sum(self._sizes)
        fitting = [k for k in range(1, layers) if math.ceil(layers / k) * whole <= self._capacity]
        return fitting[0] if fitting else layers

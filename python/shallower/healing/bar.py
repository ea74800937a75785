"""The bar of a training: its steps and the held-out losses between them, in layers run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

from ..patching.counts import STEPPING
from ..progress import Advance, part, track
from ..values.recipe import GLOBAL_BATCH, Resolved

Reach = Callable[[int, str], None]
"""Reports that so many steps are done, with a note on the last one."""


class TrainingBar:
    """Counts every step and loss once, though a training that begins again repeats some.

    A model of so many ``layers`` is trained, and measured on so many held-out ``texts``.
    """

    def __init__(self, recipe: Resolved, *, layers: int, texts: int) -> None:
        self._steps, self._every = recipe.steps, recipe.eval_every
        self._step, self._loss = STEPPING * GLOBAL_BATCH * layers, texts * layers
        self._reached, self._note = 0, "training"
        self._advance: Advance = lambda *_: None

    @contextmanager
    def shown(self, show: bool | None) -> Iterator[Reach]:
        """Open the bar, as :func:`shallower.progress.track` does."""
        total = self._until(self._steps) + self._loss
        with track("heal, layers run", total, show) as self._advance:
            yield self._reach
            self._advance(self._ahead(total))

    def _reach(self, step: int, note: str) -> None:
        self._note = f"step {step:,}, {note}" if note else self._note
        self._advance(self._ahead(self._until(step)), self._note)

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Advance by what the loss after a step takes, while the body measures it."""
        with part(self._ahead(self._until(step) + self._loss)):
            yield
        self._advance(0, self._note)

    def _until(self, step: int) -> int:
        """The layers run by so many steps, and by the losses before the last of them ends."""
        return self._step * step + self._loss * ceil(step / self._every)

    def _ahead(self, place: int) -> int:
        """How far it is from the furthest place so far to this one."""
        ahead = max(0, place - self._reached)
        self._reached += ahead
        return ahead

"""Work accounts: what a criterion costs by itself, whoever did the work before it."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(slots=True)
class Work:
    """The cost of something that was computed.

    Attributes:
        layer_forwards: decoder layers run, times the texts they were run on. A backward counts as
            two more. The embedding and the head are not counted.
        seconds: wall time.
    """

    layer_forwards: int = 0
    seconds: float = 0.0

    def add(self, other: "Work") -> None:
        """Add the work of a part."""
        self.layer_forwards += other.layer_forwards
        self.seconds += other.seconds


@dataclass(slots=True)
class _Account:
    work: Work = field(default_factory=Work)
    elsewhere: float = 0.0
    charged: set[Hashable] = field(default_factory=set)
    own: dict[Hashable, Any] = field(default_factory=dict)


class Meter:
    """Accounts of work, one in another.

    What several criteria need is made once (:meth:`shared`), and each that needs it is charged
    for it, once. So the cost of a criterion does not depend on which were measured before it,
    and nothing is done twice.
    """

    def __init__(self) -> None:
        self._accounts: list[_Account] = []
        self._made: dict[Hashable, tuple[object, Work]] = {}

    def ran(self, layers: int, texts: int) -> None:
        """Note decoder layers that ran.

        Args:
            layers: how many.
            texts: on how many texts each.
        """
        if self._accounts:
            self._accounts[-1].work.layer_forwards += layers * texts

    @contextmanager
    def account(self) -> Iterator[Work]:
        """Open an account for as long as the body runs.

        Yields:
            The work of the body, which is complete when the body has ended.
        """
        account, started = _Account(), time.perf_counter()
        self._accounts.append(account)
        try:
            yield account.work
        finally:
            self._accounts.pop()
            elapsed = time.perf_counter() - started
            account.work.seconds += elapsed - account.elsewhere
            if self._accounts:
                self._accounts[-1].elsewhere += elapsed

    def charge(self, key: Hashable, work: Work) -> None:
        """Charge the open account for work that was done by whomever, unless it was before.

        Args:
            key: what was made.
            work: its cost.
        """
        if self._accounts and key not in self._accounts[-1].charged:
            self._accounts[-1].charged.add(key)
            self._accounts[-1].work.add(work)

    def owes(self, key: Hashable) -> bool:
        """Tell whether there is an open account that has not been charged for something yet.

        Args:
            key: what was made.
        """
        return bool(self._accounts) and key not in self._accounts[-1].charged

    def own(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Give what the open account has for itself, as long as it is open.

        Args:
            key: names it.
            make: makes it, if the account has none yet.

        Returns:
            The value; without an open account a new one.
        """
        kept = self._accounts[-1].own if self._accounts else {}
        if key not in kept:
            kept[key] = make()
        value: Value = kept[key]
        return value

    def recall(self, key: Hashable, value: object, work: Work) -> None:
        """Take in what is shared and was made before, by another process even.

        Args:
            key: names it, as for :meth:`shared`.
            value: what was made.
            work: what it took.
        """
        self._made[key] = value, work

    def shared(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Give what is shared, and charge the open account for it.

        Args:
            key: names it.
            make: makes it, if it is not there yet.

        Returns:
            The value; the same object each time.
        """
        if key not in self._made:
            with self.account() as work:
                value = make()
            self._made[key] = value, work
        value, work = self._made[key]  # type: ignore[assignment]
        self.charge(key, work)
        return value

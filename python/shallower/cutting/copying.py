"""Progress of a copy in bytes, for whoever listens or looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..progress import track

Progress = Callable[[int, int], object]
"""Hears of the bytes written so far and of those in all; what it raises stops the copy."""


@contextmanager
def copying(progress: Progress | bool | None, total: int) -> Iterator[Progress]:
    """Give a function that is told the bytes written so far and those in all.

    Args:
        progress: such a function, which is given back; or whether to show a bar, by default if
            standard error is a terminal.
        total: bytes in all.
    """
    if callable(progress):
        yield progress
        return
    with track("copy, MiB", total >> 20, progress) as advance:
        shown = 0

        def report(done: int, _total: int) -> None:
            nonlocal shown
            advance((done >> 20) - shown)
            shown = done >> 20

        yield report

"""Other packages' bars and notes, off while ours are shown; the pauses of the hub's client."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, local
from typing import Any

from ..progress import say

_LOGGERS = (
    "accelerate.big_modeling",
    "bitsandbytes.backends.cpu.ops",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "transformers.generation",
)

_SWITCHES = (
    ("huggingface_hub.utils", "are_progress_bars_disabled", "{}able_progress_bars"),
    ("datasets", "are_progress_bars_disabled", "{}able_progress_bars"),
    ("transformers.utils.logging", "is_progress_bar_enabled", "{}able_progress_bar"),
)
"""Modules, what says whether their bars are enabled, and what turns them on or off."""


@contextmanager
def hushed() -> Iterator[None]:
    """Keep other packages' bars and notes off standard error in the body, in all threads.

    The hub client's pauses are reported in a line, and TimeoutError raised if one is too long.
    """
    with warnings.catch_warnings(), _THEIRS:
        warnings.filterwarnings("ignore", module=r"(lm_eval|datasets|evaluate|sklearn)\b")
        yield


MOST_WAIT = 60.0
"""Seconds that the hub may ask to wait for an answer, at most."""

_CLIENT = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
"""The loggers of the hub client's pauses."""


class _Fault(local):
    """Why the client pauses, by the last warning in a thread."""

    why = "the hub does not answer"


class _Pauses(logging.Handler):
    """Show why the hub's client pauses, and how long; TimeoutError where that is too long."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = _Fault()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning of the client: of what went wrong, or of the wait that follows it."""
        text, fault = record.getMessage(), self._of_thread
        if wait := re.search(r"(?:Waiting|Retrying in) ([\d.]+)s", text):
            seconds = float(wait[1])
            if seconds > MOST_WAIT:
                raise TimeoutError(
                    f"{fault.why}, and the next request may come in {seconds:.0f} s: try again then"
                )
            say(f"{fault.why}: asking again in {seconds:.0f} s")
        elif url := re.search(r"(https?://[^/\s]+)", text):
            status = re.search(r"HTTP Error (\d+)", text)
            fault.why = f"{url[1]} " + (
                f"answers with status {status[1]}" if status else "is silent"
            )
            if text.endswith("Trying to resume download..."):
                say(f"{fault.why}: asking again")


class _Theirs:
    """Other packages' bars and notes, off while any thread is hushed, then as they were."""

    def __init__(self) -> None:
        self._lock, self._depth = Lock(), 0
        self._turn_on: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where a variable of the user decides
            self._depth += 1
            for one in map(logging.getLogger, _LOGGERS if self._depth == 1 else ()):
                self._turn_on.append(partial(one.setLevel, one.level))
                one.setLevel(logging.CRITICAL)
            for one in map(logging.getLogger, _CLIENT if self._depth == 1 else ()):
                self._turn_on += [
                    partial(one.setLevel, one.level),
                    partial(one.removeHandler, _WAITS),
                    partial(setattr, one, "propagate", one.propagate),
                ]
                one.setLevel(logging.WARNING)
                one.addHandler(_WAITS)
                one.propagate = False
            for name, told, switch in _SWITCHES:
                module: Any = sys.modules.get(name)
                if module and getattr(module, told)() == told.endswith("enabled"):
                    getattr(module, switch.format("dis"))()
                    self._turn_on.append(getattr(module, switch.format("en")))

    def __exit__(self, *_: object) -> None:
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._depth -= 1
            while not self._depth and self._turn_on:
                self._turn_on.pop()()


_WAITS = _Pauses()
_THEIRS = _Theirs()

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
    with warnings.catch_warnings(), _theirs_off():
        warnings.filterwarnings("ignore", module=r"(lm_eval|datasets|evaluate|sklearn)\b")
        yield


MOST_WAIT = 60.0
"""Seconds that the hub may ask to wait for an answer, at most."""

_CLIENT = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
"""The loggers of the hub client's pauses."""


_OF_THREAD = local()
"""Why the client pauses, by the last warning in a thread."""


def _say_pause(record: logging.LogRecord) -> bool:
    """Show why the hub's client pauses, and how long, in place of its own warnings.

    TimeoutError where that is too long.
    """
    text = record.getMessage()
    why = getattr(_OF_THREAD, "why", "the hub does not answer")
    if wait := re.search(r"(?:Waiting|Retrying in) ([\d.]+)s", text):
        seconds = float(wait[1])
        if seconds > MOST_WAIT:
            raise TimeoutError(
                f"{why}, and the next request may come in {seconds:.0f} s: try again then"
            )
        say(f"{why}: asking again in {seconds:.0f} s")
    elif url := re.search(r"(https?://[^/\s]+)", text):
        status = re.search(r"HTTP Error (\d+)", text)
        why = f"{url[1]} " + (f"answers with status {status[1]}" if status else "is silent")
        _OF_THREAD.why = why
        if text.endswith("Trying to resume download..."):
            say(f"{why}: asking again")
    return False


_LOCK = Lock()
_TURN_ON: list[Callable[[], object]] = []
_DEPTH = [0]
"""Threads that are hushed, and what gives other packages their bars and notes back behind them."""


@contextmanager
def _theirs_off() -> Iterator[None]:
    """Keep other packages' bars and notes off while any thread is hushed, then as they were."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a variable of the user decides
        _DEPTH[0] += 1
        if _DEPTH[0] == 1:
            _set_levels()
        for name, told, switch in _SWITCHES:
            module: Any = sys.modules.get(name)
            if module and getattr(module, told)() == told.endswith("enabled"):
                getattr(module, switch.format("dis"))()
                _TURN_ON.append(getattr(module, switch.format("en")))
    try:
        yield
    finally:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _DEPTH[0] -= 1
            while not _DEPTH[0] and _TURN_ON:
                _TURN_ON.pop()()


def _set_levels() -> None:
    for logger in map(logging.getLogger, (*_LOGGERS, *_CLIENT)):
        _TURN_ON.append(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.WARNING if logger.name in _CLIENT else logging.CRITICAL)
        if logger.name in _CLIENT:
            logger.addFilter(_say_pause)
            _TURN_ON.append(partial(logger.removeFilter, _say_pause))

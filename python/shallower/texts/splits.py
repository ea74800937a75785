"""Three sets of texts: the calibration, the selection and the test set."""

import random
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

from ..errors import TextsError
from .sources import own_texts

NUM_CHOOSING = 16
"""Selection texts, by default."""

FEWEST_FITTING = 8
FEWEST_CHOOSING = 4
FEWEST_REPORTING = 2
"""Texts from which on there are three sets: two have an error, four a first look of a race."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Splits(Generic[Item]):
    """Texts by what they are for, as they are or tokenised; no text is in two of the sets."""

    fit: list[Item]  # calibration: similarity is measured and maps are solved on these
    choose: list[Item]  # selection, in a random order: the first few are a sample
    report: list[Item]  # test: each once, as they were given
    num_shared: int = 0  # calibration texts that are only in the test set
    num_repeated: int = 0  # repeated calibration texts, which are left out

    def training(self: "Splits[str]", unread: Iterable[str]) -> Iterator[str]:
        """Yield the texts that a healing may train on, those first that no patch is fitted on.

        Texts of ``unread``, which lie behind those that were divided, come without the selection
        and test texts; then the calibration texts follow, the last first, since patches take as
        many as they need from the first on.
        """
        others = {text.strip() for text in (*self.choose, *self.report)}
        yield from (text for text in unread if text.strip() not in others)
        yield from reversed(self.fit)


def three_splits(
    texts: Iterable[str],
    eval_texts: Iterable[str],
    *,
    num_choosing: int = NUM_CHOOSING,
    seed: int = 0,
) -> Splits[str]:
    """Divide texts into calibration and selection texts; the others are the test texts.

    Every k-th text chooses, evenly over all of them, a third at most; so both sets are of the
    same kinds where a file is sorted. Two texts are the same if they differ by white space at
    their ends alone. A TextsError refuses fewer than 8 texts to fit, 4 to choose or 2 to report.

    Example:
        >>> from shallower.texts.splits import three_splits
        >>> splits = three_splits([f"text {i}" for i in range(13)], ["text 0", "text 13"])
        >>> len(splits.fit), len(splits.choose), splits.num_shared
        (8, 4, 1)
    """
    texts, report = _listed(texts), _listed(eval_texts)
    if num_choosing < FEWEST_CHOOSING:
        raise TextsError(f"expected at least {FEWEST_CHOOSING} selection texts, got {num_choosing}")
    report = _different(report)
    reporting = {text.strip() for text in report}
    if len(reporting) < FEWEST_REPORTING:
        raise TextsError(
            f"too few test texts: {_count(len(reporting), 'different text')}, expected at "
            f"least {FEWEST_REPORTING}; name a file of more held-out texts (--eval-texts)"
        )
    own = [text for text in _different(texts) if text.strip() not in reporting]
    num_shared = count_shared(texts, reporting)
    num_repeated = len(texts) - num_shared - len(own)
    if len(own) < FEWEST_FITTING + FEWEST_CHOOSING:
        left_out = f" beside {num_shared} test texts" if num_shared else ""
        repeated = f" and {num_repeated} given twice" if num_repeated else ""
        raise TextsError(
            f"too few calibration and selection texts: {len(own)}{left_out}{repeated}, expected at "
            f"least {FEWEST_FITTING} and {FEWEST_CHOOSING}; name more calibration texts, "
            f"other than the test texts (--texts, --max-texts)"
        )
    size = min(num_choosing, len(own) // 3)
    chosen = [len(own) * (2 * i + 1) // (2 * size) for i in range(size)]
    choosing = set(chosen)
    fit = [text for index, text in enumerate(own) if index not in choosing]
    return Splits(fit, shuffled([own[i] for i in chosen], seed), report, num_shared, num_repeated)


def count_shared(texts: Iterable[str], report: Collection[str]) -> int:
    """Count the texts that the test set has, too; white space at their ends counts for nothing."""
    return sum(text.strip() in report for text in texts)


MOST_COMPARED = 10_000
"""Texts that are looked for among held-out ones; of the hub there may be no end."""


def refuse_shared(texts: Iterable[str], report: Iterable[str] | None) -> None:
    """Refuse, by a TextsError, texts that are for training and held out, or our own.

    Two texts are the same as for :func:`three_splits`. What can be read once is not looked at.
    """
    if report is None or isinstance(texts, Iterator):
        return
    held_out = {text.strip() for text in chain(report, own_texts())}
    num_shared = count_shared(islice(texts, MOST_COMPARED), held_out)
    if num_shared:
        raise TextsError(
            f"{_count(num_shared, 'text')} of --texts {'is' if num_shared == 1 else 'are'} also in "
            f"--eval-texts or the built-in out-of-domain texts, so that the loss would not be held "
            f"out: name other texts (--texts, --eval-texts)"
        )


def two_splits(
    items: Sequence[Item],
    *,
    key: Callable[[Item], Hashable] = lambda item: item,
    what: tuple[str, str] = ("items", "--options"),
    seed: int = 0,
) -> tuple[list[Item], list[Item]]:
    """Divide the items of a task at random into halves: selection and test set.

    An item whose ``key`` was there before is left out; ``what`` names the items and the option of
    their file in errors.
    """
    found: dict[Hashable, Item] = {}
    for item in items:
        found.setdefault(key(item), item)
    different = shuffled(found.values(), seed)
    if len(different) < 2 * FEWEST_CHOOSING:
        name, option = what
        raise TextsError(
            f"too few {name} for a selection and a test set: {len(different)} distinct, expected "
            f"at least {2 * FEWEST_CHOOSING}; name a file of more {name} ({option})"
        )
    return different[::2], different[1::2]


def is_held_out(index: int) -> bool:
    """Whether a patch holds the text of this index out: every eighth."""
    return index % 8 == 7


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """List items in a random order, which is the same on every machine."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def _different(texts: Sequence[str]) -> list[str]:
    """Texts that differ, each where it stands first."""
    return list({text.strip(): text for text in reversed(texts)}.values())[::-1]


def _listed(texts: Iterable[str]) -> list[str]:
    found = [] if isinstance(texts, str | bytes) else list(texts)
    if isinstance(texts, str | bytes) or not all(isinstance(text, str) for text in found):
        raise TextsError("texts must be an iterable of strings")
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

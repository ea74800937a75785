"""What the Tab key of a shell may put at the cursor.

The script of ``shallower completion`` asks ``shallower completion --words WORD ...`` at each Tab,
with the words behind the program's name up to the cursor. Each line of the answer is a candidate, a
tab and what it means; where the status is not 0, the shell completes files. Commands are told
without typer, options and values with it and without anything heavy.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import COMMANDS, command_function, parser

CRITERIA = (
    "angular", "cosine", "relative_l2", "cka", "linear_map", "reachable", "block_influence",
    "magnitude", "xmerge", "one_shot", "mask_regression", "taylor", "weights", "greedy",
    "exhaustive", "evolution", "deepest", "random",
)  # fmt: skip
"""The built-in criteria, whose own module takes torch; a test compares them."""

METRICS = ("angular", "cosine", "relative_l2", "norm_ratio")

TASKS = ("boolq", "gsm8k", "hellaswag", "lambada", "mmlu")
"""Tasks that people ask for first; lm-eval has thousands."""


def _devices() -> Iterable[str]:
    from ..savings.devices import DEVICES, HERE

    return [*DEVICES, HERE]


def _presets() -> Iterable[str]:
    from ..values.presets import PRESETS

    return ["auto", *PRESETS]


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "--criteria": lambda: CRITERIA,
    "--strategies": lambda: ("recommended", "similarity", "best_plan", *CRITERIA),
    "--metrics": lambda: METRICS,
    "--metric": lambda: METRICS,
    "--tasks": lambda: TASKS,
    "--device": _devices,
    "--preset": _presets,
}
"""Values of options that typer does not know as choices."""

LISTS = ("--criteria", "--strategies", "--metrics", "--tasks")
"""Those of them that take several, comma-separated."""

PLACES = (
    "ADAPTERS", "CUT", "DIR", "EXPERTS", "FILE", "FOLDER", "MODEL", "PATH", "PLAN", "PROMPTS",
    "TEXTS",
)  # fmt: skip
"""Words in the metavar of what is a file or a folder."""

Candidates = list[tuple[str, str]]
"""Words that may stand at the cursor, each with what it means."""


def answer(words: Sequence[str]) -> int:
    """Print what may stand in the place of the last of ``words``; 1 where that is a file."""
    *before, word = words or [""]
    found = _candidates(before, word)
    if found is None:
        return 1
    sys.stdout.writelines(f"{one}\t{_short(meaning)}\n" for one, meaning in found)
    return 0


def _candidates(before: Sequence[str], word: str) -> Candidates | None:
    """The candidates for ``word``; None where files are."""
    if not before:
        return _starting(word, [(name, one.summary) for name, one in COMMANDS.items()])
    name, *given = before
    if name == "help" and not given:
        return _candidates([], word)
    if name not in COMMANDS:
        return []
    options = {opt: one for one in _parameters(name) for opt in (*one.opts, *one.secondary_opts)}
    options = {opt: one for opt, one in options.items() if opt.startswith("-")}
    asked, begun, word = _option_before(given, word, options)
    if asked:
        if asked in NAMES:
            return _names(asked, begun, word)
        choices = _choices(name, options[asked].name)
        files: Candidates | None = None if _is_place(options[asked]) else []
        return _starting(word, choices, begun) if choices else files
    if word.startswith("-"):
        used = {one.partition("=")[0] for one in given}
        left = {
            opt: one.help
            for opt, one in options.items()
            if opt.startswith("--") and (one.multiple or opt not in used)
        }
        return _starting(word, [*left.items(), ("--help", "Show this message and exit.")])
    return _argument(name, given, options, word)


@cache
def _parameters(name: str) -> list[Any]:
    """The parameters of a command; its parser is made once for a Tab."""
    return list(parser(name).params)


def _option_before(
    given: Sequence[str], word: str, options: dict[str, Any]
) -> tuple[str, str, str]:
    """The option whose value ``word`` is, what of the word stands before the value, and the value.

    bash parts ``--option=value`` in three words, other shells do not.
    """
    opt, equals, value = word.partition("=")
    if equals and opt in options:
        return opt, f"{opt}=", value
    given = [*given, word] if word == "=" else given
    if given[-1:] == ["="] and given[-2:-1] and given[-2] in options:
        return given[-2], "", "" if word == "=" else word
    last = given[-1] if given else ""
    return (last, "", word) if last in options and not options[last].is_flag else ("", "", word)


def _names(opt: str, begun: str, word: str) -> Candidates:
    """The names of ``NAMES`` that begin like ``word``, or like its last part."""
    several, comma, word = word.rpartition(",") if opt in LISTS else ("", "", word)
    taken = several.split(",")
    left = [(name, "") for name in NAMES[opt]() if name not in taken]
    return _starting(word, left, f"{begun}{several}{comma}")


def _choices(name: str, parameter: str) -> Candidates:
    """The choices of a parameter, by the types of its command; none where it has no Literal."""
    hints = get_type_hints(command_function(name), include_extras=True)
    found: Candidates = []
    types = [hints[parameter]]
    for one in types:  # parts are put behind it
        if get_origin(one) is Literal:
            found += [(str(choice), "") for choice in get_args(one)]
        else:
            types += get_args(one)
    return found


def _argument(
    name: str, given: Sequence[str], options: dict[str, Any], word: str
) -> Candidates | None:
    """The values of a positional argument; files, unless it has choices or none is left."""
    arguments = [one for one in _parameters(name) if one.param_type_name == "argument"]
    values = [""] + [
        one
        for before, one in zip(["", *given], given, strict=False)
        if not one.startswith("-") and (before not in options or options[before].is_flag)
    ]
    if not arguments or (len(values) > len(arguments) and arguments[-1].nargs == 1):
        return _candidates([name, *given], "--") if word == "" else []
    choices = _choices(name, arguments[min(len(values), len(arguments)) - 1].name)
    return _starting(word, choices) if choices else None


def _is_place(option: Any) -> bool:
    """Whether the value of an option is a file or a folder, by its name in the help."""
    return any(word in PLACES for word in (option.metavar or "").strip("[].").split("|"))


def _starting(word: str, candidates: Candidates, begun: str = "") -> Candidates:
    """The candidates that begin with ``word``, each behind what is ``begun`` already."""
    return [(f"{begun}{one}", meaning) for one, meaning in candidates if one.startswith(word)]


def _short(meaning: str) -> str:
    """The first sentence of a help, in one short line."""
    first = " ".join(meaning.split()).partition(". ")[0].removesuffix(".")
    return first if len(first) <= _WIDEST else f"{first[: _WIDEST - 2].rpartition(' ')[0]} …"


_WIDEST = 72
"""Columns of what a candidate means."""

"""The command line: the same words as the Python interface.

``shallower --help`` prints the table below and imports nothing else; a command's module is
imported when it is called, and heavy packages once all of its options are checked. An error
that the user can cause ends with exit status 2 and one sentence.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

SUMMARY = """\
  Find the layers a large language model can do without, cut them out, measure
  the cost. Layers are counted from 0 and ranges are half-open."""


COMMANDS = {
    "scan": "Compare all layers of a model on texts, in one pass.",
    "gather": "Put the shards of a scan, eval, comparison or curve together.",
    "analyse": "Compare all layers by hidden states in a file, without a model.",
    "plan": "Choose the layers or experts to drop from a scan.",
    "compare": "Compare criteria by what they remove and what that costs.",
    "curve": "Measure what a model loses as more and more of its layers go.",
    "prune": "Drop layers or experts, and save a standard checkpoint.",
    "eval": "Measure loss, perplexity, tasks and speech before and after a cut.",
    "gain": "Count and forecast what a cut saves, by the config alone.",
    "patch": "Drop layers and repair the cut in minutes, adding no parameter.",
    "heal": "Heal a cut by training low-rank adapters.",
    "merge": "Fold the adapters of heal into the weights of the cut.",
    "run": "Recommend one shallower model, and make it.",
    "demo": "Run the whole way on a small model, without a download.",
    "reproduce": "Make a result again from its record, and compare all of it.",
    "report": "Write the page of a run or a comparison.",
    "cache": "Show or clear the cache of measurements.",
    "info": "Show what a bug report needs: versions, tiers and the machine.",
}
"""The commands by their names, each with the first sentence of its docstring."""

MODULES = {
    "analyse": "scan", "curve": "compare", "report": "compare", "eval": "evaluate",
    "merge": "heal", "demo": "run", "cache": "info",
}  # fmt: skip
"""The modules of commands that are not named like these."""

INSTALL, SHOW = "--install-completion", "--show-completion"
"""Typer's options of the whole program."""

COMPLETE = "_SHALLOWER_COMPLETE"
"""The variable by which the script of a shell asks for what may stand at the cursor."""


def help_text() -> str:
    """Write the help of the whole program, at most 80 columns wide."""
    commands = "\n".join(f"  {name:<10}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"Usage: shallower COMMAND ...\n\n{SUMMARY}\n\nCommands:\n{commands}\n\nOptions:\n"
        f"  {'--version':<20}  Show the version.\n"
        f"  {INSTALL:<20}  Install completion of commands for your shell.\n"
        f"  {SHOW:<20}  Print the script that completes commands.\n"
        f"  {'--help':<20}  Show this message; after a command, its options.\n"
    )


FIRST = """\
shallower demo                               the whole way, on a small model
shallower scan MODEL --texts TEXTS --out S   compare the layers of a model
shallower plan S --n 8 --out P               choose 8 that it can do without
shallower prune MODEL --plan P --out CUT     save the model without them
shallower --help                             all commands, each with its --help
"""
"""What to type first, for who types the program's name alone."""


def parser(name: str) -> Any:
    """Make the parser of one of ``COMMANDS``; its module is imported."""
    from importlib import import_module

    import typer

    from .help import GroupedCommand, example
    from .options import with_options

    # Without rich: its boxes break at 80 columns, and importing it takes as long as all else.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    names = {"help_option_names": [*HELP[:2]]}
    module = import_module(f".{MODULES.get(name, name)}", __name__)
    command = with_options(getattr(module, f"{name}_command"))
    app.command(name, cls=GroupedCommand, epilog=example(name), context_settings=names)(command)
    found: Any = typer.main.get_command(app)
    for one in found.params:
        if one.param_type_name == "argument":  # its metavar says what it is
            setattr(one, "display_type_rich", lambda **_: "")  # noqa: B010
    return found


def program() -> Any:
    """Make the parser of all commands, for typer's completion; each is imported when asked for."""
    import typer
    from typer.core import TyperGroup

    class Commands(TyperGroup):
        def list_commands(self, _: Any) -> list[str]:
            return list(COMMANDS)

        def get_command(self, _: Any, name: str) -> Any:
            return parser(name) if name in COMMANDS else None

    app = typer.Typer(cls=Commands, callback=lambda: None, rich_markup_mode=None)
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, of this process by default, and end in SystemExit, always.

    The status is 2 for a user's mistake, which is said in one sentence on standard error.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if COMPLETE in os.environ or name in (INSTALL, SHOW):
        program().main([name, *rest], prog_name="shallower")
    if name == "help":
        name, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if name == "--version":
        from .. import __version__

        print(__version__)
        raise SystemExit(0)
    if name in ("", *HELP):
        print(help_text() if name else FIRST, end="")
        raise SystemExit(0)
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        _fail(f"there is no {kind} {name}: {_meant(name)}expected one of {', '.join(COMMANDS)}")
    raise SystemExit(_call(name, rest))


def _meant(name: str) -> str:
    """The command that a misspelt one is nearest to, as a question; nothing where none is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1)
    return f"did you mean {near[0]}? " if near else ""


def _call(name: str, arguments: Sequence[str]) -> int:
    import warnings

    from typer import BadParameter

    from ..errors import ShallowerError, naming_extras
    from ..processes import begin, is_main_process
    from .output import remember_call, warn

    if not _has(arguments, "--shard"):
        _refuse_several(name)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: ours tell of the work
    begin(timed="--dry-run" in arguments)
    remember_call(name, arguments)
    warnings.showwarning = lambda message, *_args, **_options: warn(str(message))
    if not is_main_process():
        warnings.simplefilter("ignore")
    if name in HEAVY and is_main_process() and sys.stderr.isatty() and not {*HELP} & {*arguments}:
        print("loading torch and transformers …", file=sys.stderr, flush=True)  # some seconds
    command = parser(name)
    usage_error: Any = BadParameter.__base__  # what it raises, wherever typer keeps it
    try:
        words = _with_values(command, arguments)
        with naming_extras(f"shallower {name}", _extras(name, arguments)):
            called = command.main(words, prog_name=f"shallower {name}", standalone_mode=False)
            if not called and name in RECORDED and not _has(words, *HELP):
                from .reproduce import keep_record

                keep_record(name, command, words)
    except ShallowerError as error:
        page = f" (see {error.page})" if error.page else ""
        _fail(" ".join(str(error).split()) + page)
    except usage_error as error:
        said = error.format_message().replace("Value error, ", "").removesuffix(".")
        _fail(f"{_instead(said) or said} (see shallower {name} --help)")
    if called == INTERRUPTED:
        _end_interrupted(name, arguments)
    return called or 0


HELP = ("-h", "--help", "--help-all")

_OF_LAYERS = (
    "how many layers go is --n of plan, run, compare and curve, and which of them --drop or --plan "
    "of prune, eval, patch and gain"
)
_OF_DEVICES = "where the model runs is --device-map, and what a forecast is for --forecast-device"
INSTEAD = dict.fromkeys(("--n", "--layers", "--drop"), _OF_LAYERS) | {"--device": _OF_DEVICES}
"""What is meant by options that the command lacks."""

SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
"""Dtypes as people write them, too."""


def _instead(said: str) -> str | None:
    """What was meant by an option that is not there, or by a word that is none of a list."""
    from difflib import get_close_matches

    option = said.removeprefix("No such option: ").partition(" ")[0]
    if option in INSTEAD and option != said:
        return f"there is no option {option} here: {INSTEAD[option]}"
    value, is_listed, listed = said.partition(" is not one of ")
    word = value.rpartition(": ")[2].strip("'")
    known = [one.strip("' ") for one in listed.split(",")]
    near = [one for one in known if one == SHORT.get(word)] or get_close_matches(word, known, 1)
    return f"{said}; did you mean {near[0]}?" if is_listed and near else None


RECORDED = ("prune", "patch", "heal", "merge", "run")
"""The commands whose results have a record, from which they are made again."""

HEAVY = ("scan", "compare", "curve", "eval", "gain", "patch", "heal", "merge", "run", "demo")
"""The commands that load packages for seconds before they have anything to show."""


def _extras(name: str, arguments: Sequence[str]) -> str:
    """The extras that all of a call needs, where it needs a model."""
    from ..models.dtypes import QUANTISED

    values = [word.rpartition("=")[2] for word in arguments]
    wanted = {
        "gguf": name == "demo" or any(value.endswith(".gguf") for value in values),
        "quantised": any(value in QUANTISED for value in values),
        "tasks": _has(arguments, "--tasks"),
        "heal": name in ("heal", "merge") or "--heal" in arguments,
    }
    return ",".join(extra for extra, is_wanted in wanted.items() if is_wanted) or "model"


INTERRUPTED = 130
"""The status of a program that Ctrl-C ended, as shells and typer have it."""

GOING_ON = (
    "scan", "eval", "compare", "curve", "prune", "patch", "heal", "run", "demo",
    "reproduce",
)  # fmt: skip
"""The commands that go on where they were."""

BY_THE_STORE = ("eval", "compare", "curve", "run", "demo")
"""Those of them that do so by what the store has."""


def _end_interrupted(name: str, arguments: Sequence[str]) -> NoReturn:
    """End as Ctrl-C does, and tell what the same command would do."""
    begins = name not in GOING_ON or (name in BY_THE_STORE and "--no-cache" in arguments)
    does = "begins anew" if begins else "goes on from what is done"
    print(f"interrupted: the same command {does}", file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED)


def _with_values(command: Any, arguments: Sequence[str]) -> list[str]:
    """Give options that may stand alone an empty value where they do, since typer wants one."""
    flags = {name for one in command.params if getattr(one, "is_flag", False) for name in one.opts}
    alone, behind = {*ALONE} - flags, [*arguments, "--"][1:]
    return [
        f"{word}=" if word in alone and after.startswith("-") else word
        for word, after in zip(arguments, behind, strict=True)
    ]


ALONE = ("--speech", "--answers")
"""Options whose value may be left out, of the commands where they have one."""


def _has(arguments: Sequence[str], *options: str) -> bool:
    """Whether one of some options is given, with a value behind it or behind ``=``."""
    return any(one.partition("=")[0] in options for one in arguments)


SHARED = ("heal", "info")
"""The commands that several processes may be started for; others do, each a ``--shard`` of one."""

PATIENCE = 3.0
"""Seconds in which whatever started several processes ends the others once one has failed."""


def _refuse_several(name: str) -> None:
    """Refuse, under torchrun, a command that every process would carry out alone."""
    from ..errors import ProcessesError
    from ..processes import refuse_several

    work = "scans are" if name == "scan" else f"{name} is"
    try:
        if name not in SHARED:
            options = (option for one in parser(name).params for option in one.opts)
            refuse_several(work, spreads="--device-map" in options)
    except ProcessesError as error:
        _fail(str(error), once=True)


def _fail(message: str, *, once: bool = False) -> NoReturn:
    """End with a sentence: of several processes, with that of the main one, if it fails too.

    The others wait for it: torchrun ends all when one ends, even before it has printed why.
    """
    from time import sleep

    from ..processes import is_main_process

    if not is_main_process():
        sleep(PATIENCE)
    if is_main_process() or not once:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)

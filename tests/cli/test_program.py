"""The program itself: help, version, what it loads."""

import os
import re
import shlex
import sys
from importlib.metadata import version
from typing import get_args

import pytest

from shallower import cli
from shallower.settings.options import Group
from tests.commands import SHALLOWER, in_a_process, in_this_process

COMMANDS = {name: cli.parser(name) for name in cli.COMMANDS}
HEAVY = {"torch", "transformers", "matplotlib", "datasets", "numpy", "pyarrow", "ray"}
"""Packages that no help needs."""

DRAWN = {"rich", "rich.markdown", "typer.rich_utils"}


def help_of(*command, option="--help-all"):
    done = in_this_process(*command, option if command else "--help")
    assert (done.status, done.err) == (0, "")
    return done.out


def squeezed(text):
    """A text without its spaces and line breaks, which a narrow column moves."""
    return "".join(text.split())


def test_help_names_every_command():
    lines = help_of().splitlines()
    for name, command in COMMANDS.items():
        summary = command.help.split("\n\n")[0].replace("\n", " ")
        assert any(f" {name} " in line and summary in line for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_describes_every_option(name):
    """By a sentence or a noun phrase: no 'Of the weights', no 'Its peak'."""
    shown = help_of(name)
    assert not re.search(r"<(path|str|list\[)", shown)
    for parameter in COMMANDS[name].params:
        text = parameter.help
        assert text[0].isupper() or not text[0].isalpha(), (parameter.name, text)
        assert text.endswith("."), (parameter.name, text)
        assert not re.match(r"(Of|Its?|Before|As|Adapt it)\b", text), (parameter.name, text)
        own = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
        # Before 0.27 typer puts an argument that may be left out in brackets.
        begins = (f" {own}", f"  [{own}]")
        assert any(begins[0] in line or line.startswith(begins[1]) for line in shown.splitlines())
        assert squeezed(parameter.help) in squeezed(shown), parameter.name


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_one_screen(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = [*filter(None, [name])]
    short, whole = (help_of(*command, option=option) for option in ("--help", "--help-all"))
    assert len(short.splitlines()) < 40  # of a screen, with a line for the prompt
    assert max(map(len, f"{short}\n{whole}".splitlines())) <= 80
    assert "…" not in whole
    assert in_this_process(*command, "-h").out == short


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_is_basic_or_named_in_its_group(name):
    shown = help_of(name, option="--help")
    of_group = {
        parameter.opts[0]: parameter.rich_help_panel or "basic"
        for parameter in COMMANDS[name].params
    }
    assert set(of_group.values()) <= {*get_args(Group)}
    basic = [option for option, group in of_group.items() if group == "basic"]
    assert len(basic) <= 9  # eight, and that which shows all others
    behind = shown.partition("More options")[2].split()
    for option, group in of_group.items():
        if "More options" in shown and group != "basic":
            assert option in behind
            assert group in behind


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_of_its_options(name):
    _, example = help_of(name).split("Example:\n")
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("shallower", name)
    options = {
        option: parameter for parameter in COMMANDS[name].params for option in parameter.opts
    }
    given = {argument for argument in arguments if argument.startswith("--")}
    assert given <= options.keys()
    assert {
        option for option, p in options.items() if p.required and option.startswith("-")
    } <= given


def test_without_a_command_five_lines_say_what_to_type_first():
    done = in_this_process()
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 80
    commands = [line.split()[1] for line in lines]
    assert commands == ["demo", "scan", "plan", "prune", "--help"]
    for name, line in zip(commands[:-1], lines, strict=False):
        *_, arguments = line.split("   ")[0].partition(f"{name} ")
        options = {opt for one in COMMANDS[name].params for opt in one.opts}
        assert {one for one in arguments.split() if one.startswith("--")} <= options


def test_help_is_a_word_too():
    assert in_this_process("help").out == help_of()
    assert in_this_process("help", "scan").out == help_of("scan", option="--help")


def test_a_misspelt_command_is_guessed(shallower):
    assert shallower("prun", "model").error.startswith("there is no command prun: did you mean pru")
    assert "did you mean" not in shallower("quantise").error


@pytest.mark.parametrize(
    ("command", "does"),
    [
        ("run {tiny} --texts {texts} --n 1 --out out", "goes on from what is done"),
        ("run {tiny} --texts {texts} --n 1 --out out --no-cache", "begins anew"),
        ("scan {tiny} --texts {texts} --out out --no-cache", "goes on from what is done"),
        ("patch {tiny} --texts {texts} --drop 1 --out out", "goes on from what is done"),
        ("eval {tiny} --texts {texts} --no-cache", "begins anew"),
    ],
)
def test_what_ctrl_c_ends_says_what_the_same_command_does(
    shallower, tiny, jsonl, monkeypatch, command, does
):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shallower.models.loading.load_model", interrupted)
    done = shallower(*command.format(tiny=tiny, texts=jsonl).split())
    assert done.status == 130
    assert done.err.splitlines()[-1] == f"interrupted: the same command {does}"


def test_the_version_is_that_of_the_package(shallower):
    done = shallower("--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


@pytest.mark.parametrize("command", [[SHALLOWER], [sys.executable, "-m", "shallower"]])
def test_the_installed_program_and_the_module_run(command):
    done = in_a_process(*command, "--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


def loaded_by(*arguments, then=()):
    """The modules that a command imports, or several, one after the other."""
    code = (
        "import sys\nfrom shallower.cli import main\n"
        f"for sys.argv[1:] in {list(then) or [[*map(str, arguments)]]}:\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        assert not ended.code\n"
        "print()\nprint(*sys.modules)"
    )
    done = in_a_process(sys.executable, "-c", code)
    assert done.status == 0, done.err
    return set(done.out.splitlines()[-1].split())


def test_the_program_shows_no_bars_of_tqdm(shallower, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert shallower("cache").status == 0
    assert os.environ.pop("TQDM_DISABLE") == "1"


def test_help_loads_nothing_heavy():
    loaded = loaded_by("--help")
    light = {"typer", "click", "dataclasses", "inspect", "pathlib", "shallower._core"}
    assert not loaded & (HEAVY | DRAWN | light)
    plain = in_a_process(sys.executable, "-c", "import sys, typing; print(*sys.modules)").out
    assert len(loaded - set(plain.split())) <= 12, loaded - set(plain.split())


def test_help_of_no_command_loads_anything_heavy():
    """One after the other, in one process: what is loaded in the end, one of them has loaded."""
    assert not loaded_by(then=[[name, "--help"] for name in COMMANDS]) & (HEAVY | DRAWN)


def test_importing_the_package_loads_nothing():
    code = "import sys, shallower; print(*sys.modules)"
    loaded = set(in_a_process(sys.executable, "-c", code).out.split())
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("shallower.")} == set()


@pytest.mark.parametrize("arguments", [["--version"], ["plan", "{scan}", "--n", "2"]], ids=str)
def test_what_needs_no_model_loads_nothing_heavy(arguments, scans):
    loaded = loaded_by(*(argument.format(scan=scans / "tiny") for argument in arguments))
    assert not loaded & (HEAVY - {"numpy"})

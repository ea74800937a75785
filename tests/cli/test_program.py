"""The program itself: help, version, tiers."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

import shallower as sh
from shallower import cli
from shallower._core import tiers
from tests.cli.documents import plain
from tests.commands import SHALLOWER, in_a_process

COMMANDS = typer.main.get_command(cli.app).commands
HEAVY = {"torch", "transformers", "matplotlib", "datasets"}


def help_of(*command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    return plain(result.output)


def test_help_names_every_command():
    lines = help_of().splitlines()
    for name, command in COMMANDS.items():
        summary = command.help.split("\n\n")[0].replace("\n", " ")
        assert any(f" {name} " in line and summary in line for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_describes_every_option(name):
    shown = help_of(name)
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        lines = [line for line in shown.splitlines() if f" {parameter.opts[0]}" in line]
        assert any(parameter.help in line for line in lines), parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_of_its_options(name):
    (example,) = (line for line in help_of(name).splitlines() if "Example:" in line)
    program, command, *arguments = shlex.split(example.split("Example:")[1])
    assert (program, command) == ("shallower", name)
    options = {
        option: parameter for parameter in COMMANDS[name].params for option in parameter.opts
    }
    given = {argument for argument in arguments if argument.startswith("--")}
    assert given <= options.keys()
    assert {
        option for option, p in options.items() if p.required and option.startswith("-")
    } <= given


def test_without_a_command_the_help_is_shown(shallower):
    done = shallower()
    assert done.status == 2
    assert "Usage: " in done.out + done.err
    assert "Commands" in done.out + done.err


def test_the_version_is_that_of_the_package(shallower):
    done = shallower("--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


@pytest.mark.parametrize("command", [[SHALLOWER], [sys.executable, "-m", "shallower"]])
def test_the_installed_program_and_the_module_run(command):
    done = in_a_process(*command, "--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["scan", "--help"], ["plan", "{scan}", "--n", "2"]],
    ids=["help", "version", "help of a command", "plan"],
)
def test_what_needs_no_model_loads_nothing_heavy(arguments, scans):
    arguments = [argument.format(scan=scans / "tiny") for argument in arguments]
    code = (
        "import sys\nfrom shallower.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print('loaded', *({HEAVY!r} & set(sys.modules)))"
    )
    done = in_a_process(sys.executable, "-c", code, *arguments)
    assert done.status == 0
    assert done.out.splitlines()[-1] == "loaded"


# Info.
def test_info_names_the_tiers_and_the_one_in_use(shallower):
    info = shallower("info", "--json").json
    assert info["tiers"]["scalar"] is True
    assert info["tiers"][info["tier"]] is True
    assert info["packages"]["shallower"] == sh.__version__
    assert f"tier {info['tier']} of scalar" in shallower("info").out


@pytest.mark.parametrize("name", [name for name, there in tiers() if there])
def test_a_tier_can_be_forced(name):
    forced = {**os.environ, "SHALLOWER_TIER": name}
    done = subprocess.run(
        [SHALLOWER, "info", "--json"], env=forced, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["tier"] == name


def test_a_tier_that_is_not_there_is_refused():
    forced = {**os.environ, "SHALLOWER_TIER": "steam"}
    done = subprocess.run(
        [SHALLOWER, "info"], env=forced, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "steam" in done.stderr
    assert "scalar" in done.stderr
    assert "Traceback" not in done.stderr

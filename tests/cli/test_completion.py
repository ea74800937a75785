"""The Tab key: what may stand at the cursor, and that the three shells ask for it."""

import os
import shutil
from pathlib import Path

import pytest

from shallower import cli
from shallower.cli.completion import SCRIPTS
from tests.cli.test_program import HEAVY, loaded_by
from tests.commands import SHALLOWER, in_a_process, in_this_process
from tests.terminals import terminal_of


def words(*given):
    """The candidates for the last of some words; None where the shell completes files."""
    done = in_this_process("completion", "--words", *given)
    assert done.err == ""
    assert done.status == 0 or not done.out
    return None if done.status else [line.split("\t")[0] for line in done.out.splitlines()]


def test_commands_are_told_with_what_they_do():
    assert words("") == list(cli.COMMANDS)
    assert words("pr") == ["prune"]
    assert words("help", "pr") == ["prune"]
    assert words("nothing", "") == []
    done = in_this_process("completion", "--words", "pru")
    assert done.out == f"prune\t{cli.COMMANDS['prune'].summary.removesuffix('.')}\n"


def test_options_are_told_but_those_that_are_given():
    assert words("scan", "model", "--max") == ["--max-length", "--max-texts"]
    assert words("scan", "model", "--max-texts", "3", "--max") == ["--max-length"]
    assert "--texts" in words("compare", "model", "--texts", "x", "--te")  # may be given again
    assert words("info", "") == ["--json", "--help"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_of_every_command_is_told_in_a_line(name):
    done = in_this_process("completion", "--words", name, "--")
    options = {opt for one in cli.parser(name).params for opt in (*one.opts, *one.secondary_opts)}
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert {line[0] for line in lines} == {opt for opt in options if opt[:2] == "--"} | {"--help"}
    assert all(len(line) == 2 and 0 < len(line[1]) <= 72 for line in lines)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["compare", "--judge", "k"], ["kl"]),
        (["compare", "--judge=k"], ["--judge=kl"]),
        (["compare", "--judge", "=", "k"], ["kl"]),  # as bash parts the words
        (["compare", "--judge", "="], ["loss", "kl", "options", "speech"]),
        (["compare", "--criteria", "gree"], ["greedy"]),
        (["compare", "--criteria", "greedy,an"], ["greedy,angular"]),
        (["compare", "--criteria", "greedy,gre"], []),
        (["curve", "--strategies", "rec"], ["recommended"]),
        (["gain", "model", "--device", "h"], ["h100", "h200", "here"]),
        (["heal", "cut", "--preset", "llama-2-1"], ["llama-2-13b"]),
        (["scan", "model", "--dtype", "bf"], ["bfloat16"]),
        (["scan", "model", "--metrics", "angular,c"], ["angular,cosine"]),
        (["plan", "scan", "--metric", "rel"], ["relative_l2"]),
        (["eval", "model", "--tasks", "mmlu,hell"], ["mmlu,hellaswag"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["scan", "model", "--max-texts", ""], []),
        (["scan", "model", "--texts", ""], None),
        (["scan", "model", "--json", "--out", "o"], None),
        (["scan", "mod"], None),
        (["scan", "--max-texts", "3", "mod"], None),
        (["compare", "one", "tw"], None),
    ],
)
def test_values_are_told_and_files_left_to_the_shell(given, expected):
    assert words(*given) == expected


@pytest.mark.parametrize("given", [[""], ["compare", "--criteria", ""], ["gain", "--device", ""]])
def test_a_tab_loads_nothing_heavy(given):
    loaded = loaded_by("completion", "--words", *given)
    assert not loaded & (HEAVY | {"rich", "shallower._core"})
    if given == [""]:
        assert not loaded & {"typer", "click", "inspect", "dataclasses"}


def test_no_other_shell_is_known():
    assert "bash" in in_this_process("completion", "tcsh").error


# In the shells themselves.
SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOAD = {
    "bash": 'eval "$(shallower completion bash)"',
    "zsh": 'autoload -Uz compinit; compinit -D; eval "$(shallower completion zsh)"',
    "fish": "shallower completion fish | source",
}


@pytest.fixture(params=SHELLS)
def shell(request, tmp_path, monkeypatch):
    """An interactive shell that completes shallower."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    (tmp_path / "calibration.jsonl").touch()
    python = os.environ.get("PYTHONPATH", "")
    absolute = os.pathsep.join(str(Path(one).resolve()) for one in python.split(os.pathsep) if one)
    environment = {
        **os.environ,
        "PATH": f"{Path(SHALLOWER).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": absolute,
        "HOME": str(tmp_path),
        "TERM": "xterm",
        "PS1": "$ ",
    }
    with terminal_of(*SHELLS[name], columns=200, cwd=tmp_path, env=environment) as terminal:
        terminal.type(f"{LOAD[name]}; echo rea''dy\n")
        terminal.until("ready")
        yield terminal


def test_a_shell_completes_commands_options_values_and_files(shell):
    shell.type("shallower comple\t")
    shell.until("completion")
    shell.type("\x15shallower compare --crit\t")
    shell.until("--criteria")
    shell.type("greedy,ang\t")
    shell.until("greedy,angular")
    shell.type("--texts calib\t")
    shell.until(r"calibration\.jsonl")
    shell.type("--judge=sp\t")
    shell.until("--judge=speech")


def test_a_script_is_printed_as_it_is():
    for name, script in SCRIPTS.items():
        assert in_this_process("completion", name).out == script


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_reads_its_script_without_a_word(name, tmp_path):
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[name])
    done = in_a_process(name, "-n", script)
    assert (done.status, done.out, done.err) == (0, "", "")

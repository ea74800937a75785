"""The Tab key, by typer's scripts: the three shells complete commands, options and choices."""

import os
import shutil
from pathlib import Path

import pytest

from tests.cli.test_program import HEAVY, loaded_by
from tests.commands import SHALLOWER, in_a_process
from tests.conftest import mostly_slow
from tests.terminals import terminal_of


@pytest.mark.parametrize(
    "typed",
    mostly_slow(["", "compare ", "compare --judge ", "nothing "], ["compare --judge ", "nothing "]),
)
def test_a_tab_loads_nothing_heavy(typed, monkeypatch):
    monkeypatch.setenv("_SHALLOWER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"shallower {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) + 1))
    assert not loaded_by() & (HEAVY | {"shallower._core"})


# In the shells themselves.
SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOAD = {
    "bash": 'eval "$(_SHALLOWER_COMPLETE=source_bash shallower)"',
    "zsh": 'autoload -Uz compinit; compinit -D; eval "$(_SHALLOWER_COMPLETE=source_zsh shallower)"',
    "fish": "_SHALLOWER_COMPLETE=source_fish shallower | source",
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
    shell.type("shallower comp\t")
    shell.until("compare")
    shell.type("--crit\t")
    shell.until("--criteria")
    shell.type("greedy --judge sp\t")
    shell.until("speech")
    shell.type("--texts calib\t")
    shell.until(r"calibration\.jsonl")


def test_a_shell_that_runs_it_gets_it_installed(tmp_path):
    home = {"HOME": str(tmp_path)}
    done = in_a_process("bash", "-c", f"{SHALLOWER} --install-completion; true", env=home)
    assert "bash completion installed in" in done.out, done.err
    assert "_SHALLOWER_COMPLETE" in "".join(p.read_text() for p in tmp_path.rglob("*.sh"))
    shown = in_a_process("bash", "-c", f"{SHALLOWER} --show-completion; true", env=home)
    assert "_SHALLOWER_COMPLETE=complete_bash" in shown.out

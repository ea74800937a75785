"""Where the standard library of another target comes from, and what is said where it is not."""

import shutil

import pytest

from tests import cross

TARGET = "aarch64-unknown-linux-gnu"


class RanError(Exception):
    """The command would run, with these variables more than this process has."""


@pytest.fixture
def sysroot(tmp_path, monkeypatch):
    """A toolchain without anything, no package of the system, and commands that do not run."""
    answers = {"--print": f"{tmp_path}\n", "-vV": "rustc 1.2.3\nrelease: 1.2.3\n"}
    monkeypatch.setattr(cross, "output", lambda _, word, *__: answers[word])
    monkeypatch.setattr(cross, "UNPACKED", tmp_path / "unpacked")
    monkeypatch.setattr(shutil, "which", lambda _: None)

    def run(program, words, variables):
        raise RanError(
            program, words, {key: variables.get(key) for key in ("RUSTC_BOOTSTRAP", SOURCE)}
        )

    monkeypatch.setattr(cross.os, "execvpe", run)
    for name in ("RUSTC_BOOTSTRAP", SOURCE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


SOURCE = "__CARGO_TESTS_ONLY_SRC_ROOT"


def ran(*words):
    with pytest.raises(RanError) as raised:
        cross.main(TARGET, *words)
    program, command, variables = raised.value.args
    assert (program, command) == (words[0], words)
    return variables


def test_a_target_that_is_installed_is_taken(sysroot):
    (sysroot / "lib" / "rustlib" / TARGET / "lib").mkdir(parents=True)
    assert ran("cargo", "test") == {"RUSTC_BOOTSTRAP": None, SOURCE: None}


@pytest.mark.parametrize(
    "place", ["lib/rustlib/src/rust/library", "unpacked/usr/src/rustc-1.2.3/library"]
)
def test_a_source_is_built(sysroot, place):
    (sysroot / place).mkdir(parents=True)
    assert ran("cargo", "test") == {"RUSTC_BOOTSTRAP": "1", SOURCE: str(sysroot / place)}


def test_a_source_of_another_version_is_not_taken(sysroot, capsys):
    (sysroot / "unpacked/usr/src/rustc-1.2.2/library").mkdir(parents=True)
    cross.main(TARGET, "cargo", "test")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"skipped: what is built for {TARGET} needs 'rustup target add'")
    assert "no source of Rust 1.2.3" in line


def test_what_fails_is_named_in_a_line():
    with pytest.raises(SystemExit, match=r"ls: .*nowhere"):
        cross.output("ls", "/nowhere")

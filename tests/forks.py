"""Processes forked from one that has imported all that is heavy: none begins with its imports."""

import contextlib
import multiprocessing
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """A process that runs a function of a module.

    Args:
        work: the function; where it ends with SystemExit, that is the status of the process.
        args: what it is given.
        folder: where it works, and what it prints lies, in ``.out`` and ``.err``.
        name: put behind the names of these two.
        environment: variables that it has beside those of this process.
    """

    def __init__(self, work, *args, folder, name="", **environment):
        self.files = [Path(folder) / f".{stream}{name}" for stream in ("out", "err")]
        given = (work, args, folder, self.files, {**os.environ, **environment})
        with _finding_what_is_tested():
            self.process = FORKS.Process(target=_run, args=given)
            self.process.start()

    def ended(self, seconds=None):
        """The status of its end; None if it goes on after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    @property
    def out(self):
        return self.files[0].read_text()

    @property
    def err(self):
        return self.files[1].read_text()


class Forked(FORKS.Process):
    """Stands for a spawned process: it has the variables and the folder of its start."""

    def start(self):
        self._target, self._args = _as_here, (
            self._target, self._args, str(Path.cwd()), {**os.environ}
        )  # fmt: skip
        with _finding_what_is_tested():
            super().start()


class Forking:
    """Stands for multiprocessing's spawn."""

    Pipe = staticmethod(FORKS.Pipe)
    Process = Forked


def _as_here(target, args, folder, environment):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


@contextlib.contextmanager
def _finding_what_is_tested():
    """The process that is forked begins with the first fork, and imports what this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(work, args, folder, files, environment):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    work(*args)


def command(words):
    """Run a command."""
    from shallower import cli

    cli.main(list(map(str, words)))


def command_with_checkpoints(words):
    """Run a command that keeps what is done whenever it can."""
    from shallower.healing import training
    from shallower.scanning import model

    training.SECONDS_BETWEEN_CHECKPOINTS = model.SECONDS_BETWEEN_CHECKPOINTS = 0
    command(words)

"""Commands run in a process of their own, and how they ended."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

SHALLOWER = str(Path(sys.executable).with_name("shallower"))

if tuple(map(int, version("typer").split(".")[:2])) >= (0, 29):
    NO_INTEGER = "Input should be a valid integer"
    TOO_SMALL = "Input should be greater than or equal"
else:
    NO_INTEGER = "'1,2' is not a valid int"
    TOO_SMALL = "0 is not in the range x>=1"
"""What typer says of ``1,2`` where one number is expected, and of 0 where 1 is the least."""


def beside_progress(text):
    """The lines of a log that do not say what begins, how far it is, and what has ended."""
    progress = re.compile(r".*( \d+/(\d+|\?)| …|( done)?, \d+:\d\d:\d\d)(, .*)?|dtype .*: .*")
    return [line for line in text.splitlines() if not progress.fullmatch(line)]


@dataclass
class Done:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        """Standard output, all of it, as strict JSON."""
        return json.loads(self.out, parse_constant=pytest.fail)

    @property
    def said(self):
        """The lines on standard error that are not about the progress of work."""
        return beside_progress(self.err)

    @property
    def error(self):
        """The one sentence of a command that failed."""
        assert (self.status, self.out) == (2, "")
        assert "Traceback" not in self.err
        *_, last = self.err.splitlines()
        assert last.startswith("error: ")
        assert self.err.count("error: ") == 1
        return last.removeprefix("error: ")


def in_a_process(*command, **options):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",
        **options.pop("env", {}),
    }
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", 90),
        env=environment,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def in_this_process(*arguments):
    """Run a command without a process of its own."""
    from shallower import cli

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main(list(map(str, arguments)))
    return Done(ended.value.code, out.getvalue(), err.getvalue())

"""A program on a terminal of its own, and what a person sees there."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from contextlib import contextmanager

_CODES = re.compile(
    r"\x1b(\[[0-9;?=>]*[a-zA-Z]|[()][0-9A-B]|\][^\a\x1b]*(\a|\x1b\\)|[=>78])|[\a\x0f]"
)


class Terminal:
    """What is typed at a program, and what it has shown, without colours and moves."""

    def __init__(self, master):
        self._master = master
        self.raw = ""

    @property
    def shown(self):
        return _CODES.sub("", self.raw)

    def type(self, keys):
        os.write(self._master, keys.encode())

    def read(self, seconds):
        """Read what comes within some seconds; False where nothing does."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            read = os.read(self._master, 1 << 16)
        except OSError:  # the program has ended
            read = b""
        self.raw += read.decode(errors="replace")
        return bool(read)

    def until(self, pattern, seconds=20):
        """Read until a pattern is shown behind what was shown before."""
        began, deadline = len(self.shown), time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown[began:])):
            if time.monotonic() > deadline or not self.read(deadline - time.monotonic()):
                raise AssertionError(f"no {pattern!r} in {self.shown[began:]!r}")
        return found


@contextmanager
def terminal_of(*command, columns=80, **options):
    """A program on a terminal of so many columns; it is ended with the body."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        list(map(str, command)),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        **options,
    ) as program:
        os.close(slave)
        try:
            yield Terminal(master)
        finally:
            program.kill()
            os.close(master)

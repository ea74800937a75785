"""The bar is for a person at a terminal; a log gets a line now and then."""

import os
import pty
import sys
import threading
from contextlib import contextmanager

import pytest

from shallower import progress
from shallower.progress import hushed, track


class Terminal:
    """Standard error as a terminal, and what a person sees there."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.shown = ""

    @contextmanager
    def watched(self):
        master, slave = pty.openpty()
        with os.fdopen(slave, "w", encoding="utf-8") as stderr, self.monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            try:
                yield
            finally:
                stderr.write("end")
                stderr.flush()
                while not self.shown.endswith("end"):
                    self.shown += os.read(master, 100_000).decode()
                os.close(master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal(monkeypatch)


@pytest.fixture(autouse=True)
def _no_forced_colour(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_shows_what_is_done_of_how_much_and_how_long_it_takes(terminal):
    with terminal.watched(), track("measuring", 3) as advance:
        advance(1)
        advance(2)
    assert "measuring" in terminal.shown
    assert "3/3" in terminal.shown
    assert "eta" in terminal.shown


def test_a_terminal_shows_nothing_when_told_so(terminal, capfd):
    with terminal.watched(), track("measuring", 3, show=False) as advance:
        advance(3)
    assert terminal.shown == "end"
    assert capfd.readouterr() == ("", "")


def test_a_log_says_what_begins_and_what_has_ended(capfd):
    with track("measuring", 3) as advance:
        assert capfd.readouterr() == ("", "measuring 0/3\n")
        advance(3)
    assert capfd.readouterr() == ("", "measuring done, 0:00:00\n")


def test_so_does_a_terminal_that_cannot_redraw_a_bar(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal.watched(), track("measuring", 3) as advance:
        advance(3)
    assert terminal.shown.splitlines() == ["measuring 0/3", "measuring done, 0:00:00", "end"]


def test_a_log_has_two_lines_a_minute_of_long_work(capfd, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with track("measuring [x]", 400) as advance:
        for step in range(1, 9):
            now[0] += 12.5
            advance(10, f"loss {step}")
    assert capfd.readouterr() == (
        "",
        "measuring [x] 0/400\n"
        "measuring [x] 30/400, 0:00:38, loss 3\n"
        "measuring [x] 60/400, 0:01:15, eta 0:07:05, loss 6\n"
        "measuring [x] done, 0:01:40\n",
    )


def test_a_log_of_more_than_was_estimated_does_not_know_when_it_ends(capfd, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with track("measuring", 15) as advance:
        for _ in range(2):
            now[0] += 60.0
            advance(10)
    assert capfd.readouterr().err.splitlines()[-2] == "measuring 20/15, 0:02:00"


def test_a_log_of_an_unknown_total_has_no_eta(capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track("measuring") as advance:
        advance(7)
    said = capfd.readouterr().err.splitlines()
    assert said == ["measuring …", "measuring 7/?, 0:00:00", "measuring done, 0:00:00"]


def test_a_pipe_shows_the_bar_when_told_so_and_leaves_standard_output_alone(capfd):
    with track("measuring", 4, show=True) as advance:
        advance(1)
        advance(2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "measuring" in err
    assert "3/4" in err


def test_an_unknown_total_is_shown_as_such(capfd):
    with track("measuring", None, show=True) as advance:
        advance(7)
    assert "7/?" in capfd.readouterr().err


def test_a_description_is_not_read_as_markup(capfd):
    with track("loss without [12, 20) [bold]", 1, show=True) as advance:
        advance(1)
    assert "loss without [12, 20) [bold]" in capfd.readouterr().err


def fail_half_way(show):
    with track("measuring", 2, show) as advance:
        advance(1)
        raise KeyError("inner")


@pytest.mark.parametrize("show", [True, False])
def test_an_exception_passes_through(show, capfd):
    with pytest.raises(KeyError, match="inner"):
        fail_half_way(show)
    assert ("1/2" in capfd.readouterr().err) == show


def test_a_terminal_has_its_cursor_back_after_an_exception(terminal):
    with terminal.watched(), pytest.raises(KeyError):
        fail_half_way(show=None)
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")


def test_one_bar_may_follow_another(capfd):
    for name in ("first", "second"):
        with track(name, 1, show=True) as advance:
            advance(1)
    err = capfd.readouterr().err
    assert err.index("first") < err.index("second")


# Other packages' bars
def bar_of_another(steps=range(4)):
    from tqdm.auto import tqdm

    for _ in tqdm(steps, desc="Loading weights", mininterval=0, disable=False):
        pass


def test_bars_of_other_packages_become_steps_of_ours(capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track("load") as shown, hushed(shown):
        bar_of_another()
        bar_of_another(range(2))
    said = capfd.readouterr().err.splitlines()
    assert said[:2] == ["load …", "load 1/4, 0:00:00"]
    assert said[-2:] == ["load 6/6, 0:00:00, eta 0:00:00", "load done, 0:00:00"]


def test_a_terminal_shows_their_steps_too(terminal):
    with terminal.watched(), track("load") as shown, hushed(shown):
        bar_of_another()
    assert "4/4" in terminal.shown
    assert "Loading weights" not in terminal.shown


def test_a_download_is_a_note(capfd, monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track("load") as shown, hushed(shown), tqdm(total=4_000_000, desc="model: ") as theirs:
        theirs.update(1_500_000)
    assert "load 0/?, 0:00:00, model 1.50M/4.00M" in capfd.readouterr().err.splitlines()


def in_another_thread():
    thread = threading.Thread(target=bar_of_another)
    thread.start()
    thread.join()


def test_bars_are_back_afterwards_and_were_never_gone_in_other_threads(capfd):
    with hushed():
        with hushed():
            bar_of_another()
        bar_of_another()
        assert capfd.readouterr().err == ""
        in_another_thread()
        assert "4/4" in capfd.readouterr().err
    bar_of_another()
    assert "4/4" in capfd.readouterr().err


def test_bars_are_back_after_an_exception(capfd):
    with pytest.raises(KeyError), hushed():
        raise KeyError
    bar_of_another()
    assert "4/4" in capfd.readouterr().err


def test_work_within_other_work_has_a_bar_below_that_of_the_other(terminal):
    with terminal.watched(), track("outside", 2) as advance:
        with track("inside", 3) as within:
            within(3)
        with track("unseen", 3, show=False) as within:
            within(3)
        advance(2, "behind it")
    assert "inside" in terminal.shown
    assert "unseen" not in terminal.shown
    last = terminal.shown.rpartition("outside")[2]
    assert "2/2" in last
    assert "behind it" in last
    assert "inside" not in last


def test_where_work_goes_on_is_a_line_unless_it_is_to_be_silent(capfd):
    progress.say_goes_on("3 of 4 are there")
    progress.say_goes_on("nothing is said", False)
    assert capfd.readouterr().err == "goes on: 3 of 4 are there\n"

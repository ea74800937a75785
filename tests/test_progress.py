"""The bar is for a person at a terminal; a log gets a line now and then."""

import logging
import os
import pty
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise

import pytest

from shallower import progress
from shallower.progress import part, stage, track, whole
from shallower.texts.quiet import hushed
from tests.terminals import terminal_of


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


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set; what looks at it each second is the test's own hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress._Log, "_watch", lambda *_: None)
    return now


def test_a_log_has_two_lines_a_minute_of_long_work(capfd, clock):
    with track("measuring [x]", 400) as advance:
        for step in range(1, 9):
            clock[0] += 12.5
            advance(10, f"loss {step}")
    assert capfd.readouterr() == (
        "",
        "measuring [x] 0/400\n"
        "measuring [x] 20/400, 0:00:25, eta 0:07:55, loss 2\n"
        "measuring [x] 40/400, 0:00:50, eta 0:07:30, loss 4\n"
        "measuring [x] 60/400, 0:01:15, eta 0:07:05, loss 6\n"
        "measuring [x] 80/400, 0:01:40, eta 0:06:40, loss 8\n"
        "measuring [x] done, 0:01:40\n",
    )


def seconds_of_lines(capfd, clock, seconds, step=lambda _: None):
    """The seconds at which a log has a line, where the clock is looked at each second."""
    began, said = clock[0], []
    for second in range(seconds):
        clock[0] = began + second
        step(second)
        progress._LOG.tick()
        said += [second] * len(capfd.readouterr().err.splitlines())
    return said


@pytest.mark.parametrize("every", [1, 7, 29, 200])
def test_a_log_has_a_line_every_half_minute_however_long_a_step_takes(capfd, clock, every):
    with track("measuring", 100) as advance:
        said = seconds_of_lines(capfd, clock, 600, lambda at: at % every or advance(at > 0))
    assert said[0] == 0
    gaps = [b - a for a, b in pairwise(said)]
    assert min(gaps) >= 10
    assert max(gaps) <= 30
    assert said[-1] >= 570


def test_a_resumed_work_that_leaps_is_not_thought_fast(capfd, clock):
    with track("measuring", 1000) as advance:
        advance(900)  # what was done before
        for _ in range(3):
            clock[0] += 30
            advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2] == "measuring 903/1000, 0:01:30, eta 0:48:30"


def test_a_log_that_waits_for_a_long_step_keeps_its_last_speed(capfd, clock):
    with track("measuring", 10) as advance:
        for _ in range(3):
            clock[0] += 60
            advance(1)
        clock[0] += 400
        progress._LOG.tick()
    assert ", eta " in capfd.readouterr().err.splitlines()[-2]


def test_work_within_other_work_is_told_in_its_lines(capfd, clock):
    with track("outside", 3) as advance:
        for _ in range(3):
            with track("inside", 10) as within:
                clock[0] += 20
                within(4, "note")
                clock[0] += 6
                within(4)
            advance(1)
    assert capfd.readouterr().err.splitlines() == [
        "outside 0/3",
        "outside 0/3, 0:00:26, inside 8/10",
        "outside 1/3, 0:00:52, inside 8/10",
        "outside 2/3, 0:01:18, eta 0:00:52, inside 8/10",
        "outside done, 0:01:18",
    ]


def test_work_within_a_part_moves_the_one_bar_of_the_stage(capfd, clock):
    """Each part counts what it was said to, whatever the units of the work within it."""
    with track("stage", 100):
        for name, steps in (("texts", 3), ("tokens", 4000)):
            with part(50, name), track(f"{name} of it", steps) as within:
                clock[0] += 20
                within(steps / 2, "half")
                clock[0] += 10
                progress._LOG.tick()
                within(steps / 2)
    assert capfd.readouterr().err.splitlines() == [
        "stage 0/100",
        "stage 25/100, 0:00:30, texts of it, half",
        "stage 75/100, 0:01:00, eta 0:00:20, tokens of it, half",
        "stage done, 0:01:00",
    ]


def test_a_whole_counts_its_stages_and_says_what_they_took(capfd, clock):
    """Each stage has a bar of its own; of fewer stages than there could be the rest is done."""
    with whole("run", 4):
        for name, seconds in (("scan", 30), ("race of 4", 60), ("race of 8", 30)):
            with stage(name, name.split(" of ")[0]), track(f"{name}, texts", 8) as within:
                within(4)
                clock[0] += seconds
                progress._LOG.tick()
    with stage("alone"), part(3) as advance:
        advance(1)  # around it nothing moves
    assert capfd.readouterr().err.splitlines() == [
        "run 0/4",
        "run 0/4, 0:00:30, scan, scan, texts 4/8",
        "run 1/4, 0:01:30, race of 4, race of 4, texts 4/8",
        "run 2/4, 0:02:00, eta 0:03:00, race of 8, race of 8, texts 4/8",
        "run done, 0:02:00",
        "0:01:30  75% race",
        "0:00:30  25% scan",
    ]


@pytest.mark.parametrize(
    "within",
    [
        lambda: None,
        lambda: part(20).__enter__()(30),
        lambda: track("of no total").__enter__()(30),
        lambda: track("of less", 10).__enter__()(30),
    ],
    ids=["nothing", "part", "no-total", "more"],
)
def test_a_part_takes_its_steps_and_no_more(monkeypatch, within):
    moved = []
    monkeypatch.setattr(progress._Lines, "__call__", lambda _, steps, *__: moved.append(steps))
    with track("stage", 100):
        with part(20):
            within()
        assert sum(moved) == pytest.approx(20)
        with pytest.raises(KeyError), part(30):
            raise KeyError
    assert sum(moved) == pytest.approx(50)
    assert min(moved) >= 0


def test_a_part_of_no_work_or_of_silent_work_moves_nothing(capfd):
    with part(3) as advance, track("alone", 2) as within:
        advance(1)
        within(2)
    with track("outside", 5), track("silent", 3, show=False), part(3), track("unseen", 2) as within:
        within(2)
    said = capfd.readouterr().err
    assert "alone 0/2" in said
    assert "unseen" not in said


def test_the_end_of_long_work_within_other_work_is_told(capfd, clock):
    with track("outside"):
        with track("short", 3):
            clock[0] += 5
        with track("long", 3):
            clock[0] += 15
    assert capfd.readouterr().err.splitlines() == [
        "outside …",
        "long done, 0:00:15",
        "outside done, 0:00:20",
    ]


def test_a_log_is_told_of_while_nothing_is_called(capfd, monkeypatch):
    """By the thread that looks at the clock, which ends with the work."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track("saving"):
        watching = progress._LOG._ended
        said = ""
        while "saving, " not in said:
            threading.Event().wait(0.05)
            said += capfd.readouterr().err
    assert watching.is_set()
    assert capfd.readouterr().err.endswith("saving done, 0:00:01\n")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_row_fits_its_terminal_and_has_count_and_eta(columns):
    name, count = "loss without [12, 20) [21, 22)", "42/4000"
    for note in ("", "loss 3.5", "loss 3.4567 nats, and much more that is too long for any row"):
        shown = progress.row(
            columns - 1, name, count, elapsed="0:00:30", eta="0:05:44", note=note, share=0.25
        )
        assert len(shown) <= columns - 1
        assert "42/4000" in shown
        assert "eta 0:05:44" in shown
        assert shown.startswith("loss without")
        assert ("0:00:30" in shown) == (columns > 60)
        assert columns == 80 or ("━" in shown) == (columns == 200)
        assert ("loss 3." in shown) == (note != "" and columns >= 80)


@pytest.mark.parametrize("columns", [40, 80])
def test_bars_of_a_program_do_not_wrap_in_its_terminal(columns):
    code = (
        "import time\n"
        "from shallower.progress import track\n"
        "with track('loss without [12, 20) [21, 22)', 4000) as outside:\n"
        "    outside(1)\n"
        "    with track('verify n = 8, layers run', 123456) as inside:\n"
        "        inside(1000, 'a note that is long enough for nothing to fit beside it')\n"
        "        time.sleep(0.6)\n"  # more than one drawing
        "    outside(2, 'another such note that fits no row of a narrow terminal')\n"
        "print('end of it')\n"
    )
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    with terminal_of(sys.executable, "-c", code, columns=columns, env=environment) as terminal:
        terminal.until("end of it")
    rows = [row for line in terminal.shown.splitlines() for row in line.split("\r")]
    assert max(map(len, rows)) < columns
    assert any("3/4000 eta" in row or "3/4000 0:00:0" in row for row in rows)
    assert any("1000/123456 eta" in row or "1000/123456 0:00:0" in row for row in rows)
    # A row that wrapped would not be found when it is drawn anew one row above.
    assert all(row.startswith(("loss without", "verify", "end of it")) for row in rows if row)


def test_a_log_of_more_than_was_estimated_does_not_know_when_it_ends(capfd, clock):
    with track("measuring", 15) as advance:
        for _ in range(2):
            clock[0] += 60.0
            advance(10)
    assert capfd.readouterr().err.splitlines()[-2] == "measuring 20/15, 0:02:00"


def test_a_log_of_an_unknown_total_has_no_eta(capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track("measuring") as advance:
        advance(7)
    said = capfd.readouterr().err.splitlines()
    assert said == ["measuring …", "measuring 7/?, 0:00:00", "measuring done, 0:00:00"]


def test_work_of_an_unknown_number_of_steps_shows_its_time_alone(terminal):
    with terminal.watched(), track("load the model"):
        pass
    assert "/?" not in terminal.shown
    assert "eta" not in terminal.shown
    assert progress.row(39, "load", "", elapsed="0:00:03", eta="-:--:--") == "load 0:00:03"


def test_a_pipe_shows_the_bar_when_told_so_whose_description_is_no_markup(capfd):
    with track("loss without [12, 20) [bold]", 4, show=True) as advance:
        advance(1)
        advance(2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loss without [12, 20) [bold]" in err
    assert "3/4" in err


def fail_half_way(show):
    with track("measuring", 2, show) as advance:
        advance(1)
        raise KeyError("inner")


def test_a_terminal_has_its_cursor_back_after_an_exception(terminal):
    with terminal.watched(), pytest.raises(KeyError):
        fail_half_way(show=None)
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")


# Other packages' bars
def bars_of_others(steps=range(4)):
    """Bars of the packages that models, texts and tasks come by."""
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    for kind in (huggingface_hub.utils.tqdm, datasets.utils.tqdm, logging.tqdm):
        for _ in kind(steps, desc="Loading weights", mininterval=0):
            pass


def in_another_thread():
    thread = threading.Thread(target=bars_of_others)
    thread.start()
    thread.join()


@pytest.mark.parametrize("kept_off", [False, True])
def test_bars_of_other_packages_are_off_and_then_as_they_were(capfd, kept_off):
    import datasets

    bars_of_others()
    assert capfd.readouterr().err.count("\n") == 3
    if kept_off:
        datasets.disable_progress_bars()
    with hushed():
        with hushed():
            bars_of_others()
        bars_of_others()
        in_another_thread()
    assert capfd.readouterr().err == ""
    bars_of_others()
    assert capfd.readouterr().err.count("\n") == 3 - kept_off
    datasets.enable_progress_bars()


def test_notes_of_other_packages_come_back_when_the_last_thread_is_through():
    logger, level = logging.getLogger("huggingface_hub"), logging.getLogger("huggingface_hub").level
    first, second = hushed(), hushed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.CRITICAL
    second.__exit__(None, None, None)
    assert logger.level == level


def test_bars_are_back_after_an_exception(capfd):
    with pytest.raises(KeyError), hushed():
        raise KeyError
    bars_of_others()
    assert capfd.readouterr().err.count("\n") == 3


def test_a_bar_without_a_switch_is_a_line_above_ours(terminal):
    from tqdm.auto import tqdm

    with terminal.watched(), track("load", 2) as advance, hushed():
        for _ in tqdm(range(4), desc="of another", mininterval=0, disable=False):
            pass
        advance(2)
    last = terminal.shown.rpartition("load")[2]
    assert "2/2" in last
    assert "of another" not in last


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
    assert capfd.readouterr().err == "resuming: 3 of 4 are there\n"

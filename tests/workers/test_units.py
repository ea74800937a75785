"""Units of work shared among workers: whatever happens to these, the same comes out."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shallower.errors import ProcessesError, TextsError
from shallower.scanning.scan_file import read_text, scan_bytes, scan_text
from shallower.scanning.shards import Shards, joined
from shallower.settings.stages import ScanSettings
from shallower.values.shard import Shard
from shallower.workers import units
from shallower.workers.local_workers import LocalWorkers, Seat
from shallower.workers.units import Engine, Event, Ledger, drive
from tests.conftest import ROOT
from tests.documents import documents
from tests.workers.counting import done_in, job_of


class Fate(Engine):
    """Workers to whom everything happens that can: in any order, doubled, late, or never.

    Those of a place that is sick only fail, or die, or hang, or never open the work. One place is
    well: there units fail seldom, if it is ``flaky``, and never otherwise.
    """

    def __init__(self, seed, results, *, flaky=True):
        self.now = 0.0
        super().__init__(None)
        self._random, self._results, self._flaky = random.Random(seed), results, flaky
        self._sick = self._random.choices([None, "fails", "dies", "hangs", "opens"], k=3)
        self._room = {"well": 1, **dict.fromkeys(range(self._random.randint(0, 3)), 1)}
        self._busy, self._late, self._new = {}, [], []

    def clock(self):
        return self.now

    def room(self):
        return self._room

    def start(self, place, number):
        if place == "well" or self._sick[place] != "opens":
            self._new += [Event(f"worker {number}", "ready", {})]
        return f"worker {number}"

    def kill(self, worker):
        self._busy.pop(worker, None)
        self._new = [event for event in self._new if event.worker != worker]

    def give(self, worker, unit):
        self._busy[worker] = unit

    def events(self):
        self.now += 5.0
        found, self._new = self._new, []
        for worker, unit in self._random.sample([*self._busy.items()], len(self._busy)):
            place = self.places[worker]
            found += self._of(worker, unit, None if place == "well" else self._sick[place])
        if self._late and self._random.random() < 0.5:
            worker, unit = self._late.pop()
            found += [Event(f"{worker}, late", "done", (unit, self._results[unit]))]
        return found

    def _of(self, worker, unit, sickness):
        """What comes of a unit now."""
        fate = self._random.random()
        if fate < 0.3 or sickness == "hangs":  # nothing yet
            return []
        del self._busy[worker]
        fate += 0.0 if self._flaky or sickness else 1.0
        if fate < 0.4 or sickness == "dies":  # what it had found may still arrive
            self._late += [(worker, unit)] if fate < 0.35 and not sickness else []
            return [Event(worker, "lost", "gone")]
        if fate < 0.45 or sickness == "fails":
            return [Event(worker, "failed", (unit, "an error"))]
        done = Event(worker, "done", (unit, self._results[unit]))
        return [done] * self._random.randint(1, 2)


@pytest.fixture(scope="module")
def shards():
    """The shards of a scan, by their names, and the scan's bytes."""
    from tests.conftest import tiny_llama, word_tokenizer

    settings = ScanSettings(batch_size=1)
    of = Shards(tiny_llama(), word_tokenizer(), documents(40), settings)
    every = [Shard(index, 10) for index in range(10)]
    return {str(shard): scan_text(of.scan(shard, progress=False)).encode() for shard in every}


def run(seed, results, done=(), *, flaky=True):
    """The results that were accepted, in the order they came, and the ledger."""
    engine, accepted = Fate(seed, results, flaky=flaky), {}
    ledger = Ledger(results, done, clock=engine.clock)

    def accept(unit, content):
        assert unit not in accepted
        accepted[unit] = content

    drive(engine, ledger, accept, ready=lambda _worker, _hello: None)
    return accepted, ledger


def test_the_same_bytes_come_of_any_history(shards):
    expected, incomplete = None, 0
    for seed in range(200):
        accepted, ledger = run(seed, shards)
        assert {*accepted} | {*ledger.given_up} == {*shards}
        assert not {*accepted} & {*ledger.given_up}
        if ledger.given_up:
            incomplete += 1
            continue
        parts = [read_text(accepted[unit].decode()) for unit in shards]
        found = scan_bytes(joined(parts).contents)
        expected = expected or found
        assert found == expected
    assert incomplete < 20


def test_whoever_is_sick_one_that_is_well_does_all():
    for count in (1, 2, 12):
        results = {str(unit): str(unit).encode() for unit in range(count)}
        for seed in range(100):
            accepted, ledger = run(seed, results, flaky=False)
            assert accepted == results
            assert ledger.given_up == {}


def test_what_is_done_is_not_done_again(shards):
    done = [*shards][:4]
    accepted, ledger = run(1, shards, done)
    assert {*accepted} | {*ledger.given_up} == {*shards} - {*done}


def test_another_result_of_a_unit_names_both_workers():
    ledger = Ledger(["0"])
    assert ledger.take("worker 0 on a") == "0"
    assert ledger.finish("worker 0 on a", "0", b"one")
    assert not ledger.finish("worker 1 on b", "0", b"one")
    with pytest.raises(ProcessesError, match="worker 0 on a and worker 1 on b found different"):
        ledger.finish("worker 1 on b", "0", b"another")


def test_a_unit_that_three_workers_fail_is_given_up_and_comes_last():
    ledger = Ledger([*"1230"])
    for worker in "abc":
        ledger.finish(worker, ledger.take(worker), b"")
    for worker, error in (("a", "one"), ("b", "two"), ("c", "three")):
        assert not ledger.is_settled
        assert ledger.take(worker) == "0"
        ledger.fail(worker, error)
        assert ledger.take(worker) is None
    assert ledger.is_settled
    assert ledger.given_up == {"0": ["one (on a)", "two (on b)", "three (on c)"]}


def test_what_fails_where_nothing_was_done_is_not_given_up():
    ledger = Ledger(["0", "1"])
    assert ledger.take("well") == "0"
    for worker in ("a", "b", "c"):
        assert ledger.take(worker, "sick") == "1"
        ledger.fail(worker, "an error")
        assert ledger.stuck([worker]) is None
    assert ledger.finish("well", "0", b"")
    assert ledger.take("well") == "1"


def test_what_is_late_is_done_by_another_too_and_the_late_result_is_held_against_it():
    now = [0.0]
    ledger = Ledger(["0", "1"], clock=lambda: now[0])
    assert [ledger.take(worker) for worker in "ab"] == ["0", "1"]
    now[0] = 20.0
    assert ledger.finish("b", "1", b"")
    now[0] = 60.0
    assert ledger.take("b") is None
    now[0] = 61.0
    assert ledger.take("b") == "0"
    assert not ledger.is_settled
    assert ledger.finish("b", "0", b"one")
    assert ledger.is_settled
    assert not ledger.finish("a", "0", b"one")
    with pytest.raises(ProcessesError, match="b and a found different results of 0"):
        ledger.finish("a", "0", b"another")


# Processes of this machine.
def squares(folder, count=6, workers=2, **described):
    """The results that processes find, by unit, and the ledger."""
    found, ledger = {}, Ledger(map(str, range(count)))
    engine = LocalWorkers(job_of(folder, **described), [Seat(1)] * workers)
    drive(engine, ledger, found.__setitem__, ready=lambda _worker, _hello: None)
    return found, ledger


def test_processes_share_the_units(tmp_path):
    found, _ = squares(tmp_path, at=2)
    assert found == {str(unit): str(unit**2).encode() for unit in range(6)}
    done = done_in(tmp_path)
    assert sorted(unit for unit, _ in done) == [*"012345"]
    assert len({process for _, process in done}) == 2


def test_a_process_that_is_killed_is_replaced(tmp_path):
    found, _ = squares(tmp_path, kills_once="2")
    assert found == {str(unit): str(unit**2).encode() for unit in range(6)}
    done = [unit for unit, _ in done_in(tmp_path)]
    assert sorted(done) == [*"0122345"]


_DRIVER = """
import sys
from pathlib import Path
from shallower.workers.local_workers import LocalWorkers, Seat
from shallower.workers.units import Ledger, drive
from tests.workers.counting import job_of
if __name__ == "__main__":
    engine = LocalWorkers(job_of(Path(sys.argv[1]), seconds=600), [Seat(1)] * 2)
    drive(engine, Ledger(["0", "1"]), lambda *_: None, ready=lambda *_: None)
"""


def test_workers_end_with_the_one_that_drives(tmp_path):
    (tmp_path / "driver.py").write_text(_DRIVER)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py", tmp_path], env={**os.environ, "PYTHONPATH": paths}
    )
    found = []
    while len(found) < 2:
        assert driver.poll() is None
        time.sleep(0.1)
        found = done_in(tmp_path) if (tmp_path / "done").exists() else []
    driver.kill()
    driver.wait()
    left, until = [int(process) for _, process in found], time.monotonic() + 60
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = [process for process in left if _is_running(process)]
    assert not left


def _is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_fails_wherever_it_is_done_is_given_up(tmp_path):
    found, ledger = squares(tmp_path, poison="2")
    assert [*sorted(found)] == [*"01345"]
    assert [*ledger.given_up] == ["2"]
    assert all("ValueError: poison (on worker" in error for error in ledger.given_up["2"])


@pytest.mark.parametrize(
    ("sick", "said"),
    [
        ("raises", "worker 0 takes no more part: 3 in a row failed, the last by OSError: no space"),
        ("stops", "worker 0 has been at "),
        ("dies", "worker 0 was lost: the process was ended by SIGKILL"),
        ("refuses", "worker 0 takes no part: there are none"),
    ],
)
def test_one_that_is_sick_is_named_and_others_do_all(tmp_path, monkeypatch, capfd, sick, said):
    monkeypatch.setattr(units, "LATE_SECONDS", 1.0)
    found, ledger = squares(tmp_path, 20, sick=sick)
    assert found == {str(unit): str(unit**2).encode() for unit in range(20)}
    assert ledger.given_up == {}
    assert re.sub(r"worker \d", "worker 0", said) in re.sub(
        r"worker \d", "worker 0", capfd.readouterr().err
    )


def test_a_refusal_is_an_error_of_its_kind(tmp_path):
    with pytest.raises(TextsError, match=r"^there are none$"):
        squares(tmp_path, refuses="there are none")


def test_processes_that_die_as_they_start_are_an_error(tmp_path):
    with pytest.raises(ProcessesError, match=r"no worker came to work: .* SIGKILL; start fewer"):
        squares(tmp_path, dies_opening=True)

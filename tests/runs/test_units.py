"""Units of work shared among workers: whatever happens to these, the same comes out."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shallower.errors import ProcessesError, TextsError
from shallower.runs.local_workers import LocalWorkers
from shallower.runs.units import Engine, Event, Ledger, drive
from shallower.scanning.scan_file import scan_bytes
from shallower.scanning.shards import Shards, gather
from shallower.values.shard import Shard
from shallower.values.tokens import Tokens
from tests.documents import documents
from tests.runs.counting import done_in, job_of


class Fate(Engine):
    """Workers to whom everything happens that can: in any order, doubled, late, or never."""

    def __init__(self, seed, results):
        self._random, self._results = random.Random(seed), results
        self._busy, self._late, self._started = {}, [], 0

    def __enter__(self):
        self._new = [self._start() for _ in range(self._random.randint(1, 4))]
        return self

    def __exit__(self, *_):
        self._busy = {}

    def _start(self):
        self._started += 1
        return Event(f"worker {self._started}", "ready", {})

    def give(self, worker, unit):
        self._busy[worker] = unit

    def events(self):
        found, self._new = self._new, []
        for worker, unit in self._random.sample([*self._busy.items()], len(self._busy)):
            fate = self._random.random()
            if fate < 0.3:  # nothing yet
                continue
            del self._busy[worker]
            if fate < 0.4:  # dies, and what it had found may still arrive
                found += [Event(worker, "lost", "gone")]
                self._late += [(worker, unit)] if self._random.random() < 0.5 else []
                self._new += [self._start()]
            elif fate < 0.45:
                found += [Event(worker, "failed", (unit, "an error"))]
            else:
                done = Event(worker, "done", (unit, self._results[unit]))
                found += [done] * self._random.randint(1, 2)
        if self._late and self._random.random() < 0.5:
            worker, unit = self._late.pop()
            found += [Event(f"{worker}, late", "done", (unit, self._results[unit]))]
        if self._random.random() < 0.1:
            found += [self._start()]
        return found


@pytest.fixture(scope="module")
def shards():
    """The shards of a scan, by their names, and the scan's bytes."""
    from tests.conftest import tiny_llama, word_tokenizer

    of = Shards(tiny_llama(), word_tokenizer(), documents(40), Tokens(256, 1))
    every = [Shard(index, 10) for index in range(10)]
    return {str(shard): of.scan(shard, progress=False).to_bytes() for shard in every}


def run(seed, results, done=()):
    """The results that were accepted, in the order they came, and the ledger."""
    ledger, accepted = Ledger(results, done), {}

    def accept(unit, content):
        assert unit not in accepted
        accepted[unit] = content

    drive(Fate(seed, results), ledger, accept, ready=lambda _worker, _hello: None)
    return accepted, ledger


def test_the_same_bytes_come_of_any_history(shards, tmp_path):
    expected, incomplete = None, 0
    for seed in range(200):
        accepted, ledger = run(seed, shards)
        assert {*accepted} | {*ledger.given_up} == {*shards}
        assert not {*accepted} & {*ledger.given_up}
        if ledger.given_up:
            incomplete += 1
            continue
        folder = tmp_path / str(seed)
        folder.mkdir()
        for unit, content in accepted.items():
            (folder / Shard.parse(unit).file).write_bytes(content)
        found = scan_bytes(gather([folder]).contents)
        expected = expected or found
        assert found == expected
    assert incomplete < 40


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


def test_a_unit_that_fails_three_times_is_given_up_and_comes_last():
    ledger = Ledger(["0", "1"])
    for error in ("a", "b", "c"):
        while ledger.take("worker") != "0":
            ledger.finish("worker", "1", b"")
        ledger.fail("worker", error)
    assert ledger.is_settled
    assert ledger.given_up == {"0": ["a", "b", "c"]}


# Processes of this machine.
def squares(folder, count=6, workers=2, **described):
    """The results that processes find, by unit, and the ledger."""
    found, ledger = {}, Ledger(map(str, range(count)))
    engine = LocalWorkers(job_of(folder, **described), workers)
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
from shallower.runs.local_workers import LocalWorkers
from shallower.runs.units import Ledger, drive
from tests.runs.counting import job_of
if __name__ == "__main__":
    engine = LocalWorkers(job_of(Path(sys.argv[1]), seconds=600), 2)
    drive(engine, Ledger(["0", "1"]), lambda *_: None, ready=lambda *_: None)
"""


def test_workers_end_with_the_one_that_drives(tmp_path):
    (tmp_path / "driver.py").write_text(_DRIVER)
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py", tmp_path])
    found = []
    while len(found) < 2:
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


def test_a_refusal_is_an_error_of_its_kind(tmp_path):
    with pytest.raises(TextsError, match=r"^there are none$"):
        squares(tmp_path, refuses="there are none")


def test_processes_that_die_as_they_start_are_an_error(tmp_path):
    with pytest.raises(ProcessesError, match=r"no worker came to work: .* SIGKILL; start fewer"):
        squares(tmp_path, dies_opening=True)

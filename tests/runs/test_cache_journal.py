"""Journals of the cache: records whole after any death, from several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shallower.errors import CacheError
from shallower.runs.cache import Cache

INPUTS = {"model": "m"}


@pytest.fixture
def journal(tmp_path):
    return Cache(tmp_path / "cache").journal("trials", INPUTS)


def test_records_are_read_as_they_were_appended(journal, tmp_path):
    assert journal.read() == []
    records = [{"n": n, "text": "ä\n\u2028", "nats": [0.1 * n, None]} for n in range(5)]
    for record in records:
        journal.append(record)
    assert journal.read() == records
    assert Cache(tmp_path / "cache").journal("trials", INPUTS).read() == records
    assert Cache(tmp_path / "cache").journal("trials", {"model": "other"}).read() == []


def test_a_last_line_without_an_end_is_ignored_and_then_cut_off(journal):
    for n in range(3):
        journal.append({"n": n})
    content = journal.path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(last, len(content)):
        journal.path.write_bytes(content[:length])
        assert journal.read() == [{"n": 0}, {"n": 1}]
        journal.append({"n": 7})
        assert journal.read() == [{"n": 0}, {"n": 1}, {"n": 7}]


def test_a_first_line_without_an_end_is_cut_off(journal):
    journal.append({"n": 0})
    journal.path.write_bytes(b"x" * 200_000)
    assert journal.read() == []
    journal.append({"n": 1})
    assert journal.read() == [{"n": 1}]


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_is_named_with_the_way_out(journal, line):
    for n in range(3):
        journal.append({"n": n})
    lines = journal.path.read_bytes().splitlines(keepends=True)
    good = lines[line]
    for bad in (good.replace(b'"n"', b'"m"'), b"\n", good[1:], b"[]\n"):
        lines[line] = bad
        journal.path.write_bytes(b"".join(lines))
        with pytest.raises(CacheError) as raised:
            journal.read()
        message = str(raised.value)
        assert str(journal.path) in message
        assert f"line {line + 1}" in message
        assert "shallower cache --clear" in message
        assert "--no-cache" in message


def test_a_full_disk_leaves_no_half_record(journal, monkeypatch):
    journal.append({"n": 0})
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.warns(UserWarning, match="no more is kept"):
        journal.append({"n": 1})
    monkeypatch.undo()
    assert journal.read() == [{"n": 0}]
    assert journal.path.read_bytes().endswith(b"\n")


WRITER = """
import sys
from pathlib import Path
from shallower.runs.cache import Cache
journal = Cache(Path(sys.argv[1])).journal("trials", {"model": "m"})
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    journal.append({"by": sys.argv[2], "n": number, "long": "x" * 30_000})
"""


def start(tmp_path, name, count):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), name, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_two_processes_append_to_the_same_file(journal, tmp_path):
    started = [start(tmp_path, name, 200) for name in ("one", "two")]
    for process in started:
        assert process.wait() == 0
        process.stdout.close()
    records = journal.read()
    for name in ("one", "two"):
        assert [r["n"] for r in records if r["by"] == name] == list(range(200))


def test_a_kill_while_another_process_appends_loses_at_most_one_record(journal, tmp_path):
    before = 0
    for round_ in range(4):
        killed, other = start(tmp_path, f"killed{round_}", 10**9), start(tmp_path, "other", 50)
        time.sleep(0.05 + 0.013 * round_)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stdout.close()
        assert other.wait() == 0
        other.stdout.close()
        journal.append({"by": "us"})
        records = journal.read()
        mine = [r["n"] for r in records if r["by"] == f"killed{round_}"]
        assert mine == list(range(len(mine)))
        assert len(records) >= before + 51
        before = len(records)
    lines = journal.path.read_bytes().splitlines()
    assert all(json.loads(line.partition(b" ")[2]) for line in lines)

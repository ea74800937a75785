"""Commands that several processes cannot share."""

import time

import pytest

import shallower as sh
from shallower import cli
from shallower.cli.output import say_dry_run

ALONE = [name for name in cli.COMMANDS if name not in cli.SHARED]


@pytest.fixture
def second(monkeypatch):
    """Of this process, the environment of the second of two."""

    def of(rank):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(cli, "PATIENCE", 0.01)

    return of


def takes_device_map(name):
    return any("--device-map" in option.opts for option in cli.parser(name).params)


@pytest.mark.parametrize("name", ALONE)
def test_a_command_under_torchrun_says_that_it_is_not_shared(name, second, shallower):
    second(0)
    done = shallower(name, "x")
    subject = "scans are" if name == "scan" else f"{name} is"
    one = "; it uses every GPU (--device-map auto)" if takes_device_map(name) else ""
    assert done.error == f"{subject} not shared among processes yet: start one process{one}"
    second(1)
    done = shallower(name, "x")
    assert (done.status, done.out, done.err) == (2, "", "")


@pytest.mark.parametrize("command", ["scan", "eval"])
def test_processes_under_torchrun_make_a_shard_each(command, second, shallower, tiny, jsonl):
    for rank in (0, 1):
        second(rank)
        done = shallower(command, tiny, "--texts", jsonl, "--out", "out", "--shard", "auto")
        assert done.status == 0, done.err
        assert f"shard {rank}/2: " in done.out


def test_of_several_processes_that_fail_the_others_wait_for_the_main_one(second, shallower):
    """What only they know they say, unless the main one ends first, and they with it."""
    second(1)
    began = time.monotonic()
    done = shallower("heal", "nowhere", "--texts", "nowhere.jsonl", "--out", "x")
    assert "nowhere.jsonl" in done.error
    assert time.monotonic() - began >= 0.01


def test_scans_and_runs_in_python_refuse_as_well(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sh.ProcessesError, match="scans are not shared among processes yet"):
        sh.scan(None, None, [])
    with pytest.raises(sh.ProcessesError, match="runs are not shared among processes yet"):
        sh.run(None, None, [], eval_texts=[], out=tmp_path / "out")


def test_a_dry_run_of_several_processes_is_told_once(second, capsys):
    for rank in (0, 1):
        second(rank)
        say_dry_run({"heal": "cut", "write": ["out"]}, as_json=False)
    assert capsys.readouterr().out == "heal: cut\nwould write out\n"

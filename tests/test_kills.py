"""Whatever is killed at any moment and begun again ends in the same results, to the bit."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.conftest import tiny_llama, write_jsonl
from tests.healing.cuts import documents

HARNESS = """
import json, os, select, signal, sys, time
import matplotlib.figure, peft, torch, transformers.models.llama.modeling_llama
from shallower import cli
from shallower.healing import heal, training
from shallower.runs import compare, curve, run
from shallower.scanning import model
torch.set_num_threads(1)
training.SECONDS_BETWEEN_CHECKPOINTS = model.SECONDS_BETWEEN_CHECKPOINTS = 0
for line in sys.stdin:
    words, folder, seconds = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ["SHALLOWER_CACHE"] = os.path.join(folder, "cache")
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            cli.main(words)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, time.monotonic() - began]), flush=True)
"""
"""Forks a process for each command, so that none begins with seconds of imports."""

ON_TEXTS = "tiny --texts texts.jsonl --eval-texts held_out.jsonl --max-length 16 --out out"
HEAL = (
    "heal cut --texts texts.jsonl --eval-texts held_out.jsonl --max-length 16 --dtype float32 "
    "--batch-size 8 --steps 6 --rank 4 --learning-rate 0.01 --eval-every 1 --out "
)
COMMANDS = {
    "scan": "scan tiny --texts texts.jsonl --max-length 16 --batch-size 1 --out out/scan "
    "--keep-states out/states.safetensors",
    "run": f"run {ON_TEXTS} --n 2 --top 2",
    "run --heal": f"run {ON_TEXTS} --n 2 --top 2 --heal --heal-steps 4",
    "curve": f"curve {ON_TEXTS} --n 1,2 --strategies similarity,deepest",
    "compare": f"compare {ON_TEXTS} --n 1,2 --criteria angular,greedy,one_shot",
    "heal": HEAL + "out",
    "heal --objective kd": HEAL + "out --objective kd --original tiny",
    "merge": "merge adapters --out out",
    "prune": "prune tiny --drop 2:4 --max-shard-size 4000 --out out",
}
"""Commands that go on where they were."""

RARE = ("run --heal", "heal --objective kd")

MOMENTS = [
    pytest.param(name, seed, marks=pytest.mark.slow if seed or name in RARE else ())
    for name in COMMANDS
    for seed in range(5)
]
"""A command, and the seed of two moments: ten moments each, two of them in the quick tests."""

UNLIKE = {"seconds", "tokens_per_second"}
"""What two runs of the same command do not agree on in their JSON."""


@dataclass
class Machine:
    """Runs commands, each in a process that may be killed."""

    process: subprocess.Popen

    def run(self, words, folder, seconds=None):
        """How the command ended, and after how many seconds."""
        self.process.stdin.write(json.dumps([words.split(), str(folder), seconds]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def started():
    """A machine, until the end of the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", HARNESS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        yield Machine(process)
        process.stdin.close()


@pytest.fixture(scope="module")
def machine():
    with started() as machine:
        yield machine


@pytest.fixture(scope="module")
def place(tmp_path_factory, words, machine):
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("given")
    tiny_llama().save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    write_jsonl(folder / "texts.jsonl", documents(200, 0))
    write_jsonl(folder / "held_out.jsonl", documents(12, 1))
    for command in ("prune tiny --drop 2:4 --out cut", HEAL + "adapters"):
        status, _ = machine.run(command, folder)
        assert status == 0, (folder / "said").read_text()
    (folder / "said").unlink()
    return folder


def begun(place, folder):
    """A folder of its own with what the commands are given."""
    folder.mkdir()
    for name in ("tiny", "cut", "adapters", "texts.jsonl", "held_out.jsonl"):
        (folder / name).symlink_to(place / name)
    return folder


@pytest.fixture(scope="module")
def whole(place, machine):
    """What a command leaves that nobody kills, and how long it takes, by the command."""
    known = {}

    def run(name):
        if name not in known:
            folder = begun(place, place / f"whole {name}")
            status, seconds = machine.run(COMMANDS[name], folder)
            assert status == 0, (folder / "said").read_text()
            known[name] = folder, seconds
        return known[name]

    return run


def results(out):
    """All that is below a folder, without times, and without pages and figures of the rest."""
    return {
        str(path.relative_to(out)): _content(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _content(path):
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix in (".html", ".png", ".md", ".csv"):
        return "written from the rest"
    return path.read_bytes()


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(inside) for name, inside in value.items() if name not in UNLIKE}
    return [_plain(inside) for inside in value] if isinstance(value, list) else value


def kill(machine, name, folder, chance, seconds):
    """Kill a command at a random moment; one that ended before is begun anew."""
    while True:
        moment = chance.uniform(0.02, 0.95) * seconds
        status, _ = machine.run(COMMANDS[name], folder, moment)
        if status == -9:
            return
        assert status == 0, (folder / "said").read_text()
        for made in ("out", "cache"):
            shutil.rmtree(folder / made, ignore_errors=True)


@pytest.mark.parametrize(("name", "seed"), MOMENTS)
def test_what_is_killed_at_two_random_moments_ends_in_the_same_results(
    place, machine, whole, tmp_path, name, seed
):
    expected, seconds = whole(name)
    folder = begun(place, tmp_path / "work")
    chance = random.Random(f"{name} {seed}")
    for _ in range(2):
        kill(machine, name, folder, chance, seconds)
    status, _ = machine.run(COMMANDS[name], folder)
    assert status == 0, (folder / "said").read_text()
    assert results(folder / "out") == results(expected / "out")


@pytest.mark.parametrize("names", [("curve", "curve"), ("run", "compare")])
def test_two_commands_on_one_store_at_once_lose_nothing(place, whole, tmp_path, names):
    folders = [begun(place, tmp_path / f"{at}") for at in range(len(names))]
    (tmp_path / "cache").mkdir()
    for folder in folders:
        (folder / "cache").symlink_to(tmp_path / "cache")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        machines = [stack.enter_context(started()) for _ in names]
        commands = [COMMANDS[name] for name in names]
        ends = list(pool.map(Machine.run, machines, commands, folders))
    for name, folder, (status, _) in zip(names, folders, ends, strict=True):
        said = (folder / "said").read_text()
        assert status == 0, said
        assert "remember" not in said  # the store was there for both
        assert results(folder / "out") == results(whole(name)[0] / "out")

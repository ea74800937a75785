"""Several processes that heal together: as one does, killed or not."""

import json
import os
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch.distributed import TCPStore

import shallower as sh
from tests.commands import Done, beside_progress, in_a_process, in_this_process
from tests.conftest import write_jsonl
from tests.forks import Fork, command
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS
from tests.healing.test_answers import ANSWERS


@dataclass
class Two:
    """Two processes that find one another as under torchrun, which holds a store for them."""

    store: TCPStore
    forks: list[Fork]

    @classmethod
    def start(cls, folder, work, *args):
        """Let both do some work."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        given = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": "2",
            "CUDA_VISIBLE_DEVICES": "",
        }
        folder.mkdir(exist_ok=True)
        return cls(store, [
            Fork(work, *args, folder=folder, name=rank, RANK=rank, LOCAL_RANK=rank, **given)
            for rank in ("0", "1")
        ])  # fmt: skip

    def end(self):
        """How they ended, in order; what they print is one text, as on a terminal."""
        statuses = [fork.ended(120) for fork in self.forks]
        self.kill()
        out, err = ("".join(getattr(fork, of) for fork in self.forks) for of in ("out", "err"))
        return Done(statuses, out, err)

    def kill(self):
        for fork in self.forks:
            fork.kill()


@pytest.fixture(scope="module")
def healing(both, tmp_path_factory):
    """The arguments of a healing with merge, but for its place and its dropout."""
    whole, cut = both
    folder = tmp_path_factory.mktemp("texts")
    texts, held_out = folder / "t.jsonl", folder / "e.jsonl"
    return (
        "heal", cut, "--texts", write_jsonl(texts, TEXTS),
        "--eval-texts", write_jsonl(held_out, HELD_OUT), "--original", whole, "--merge",
        "--dtype", "float32", "--rank", 4, "--max-length", 16, "--steps", 4, "--eval-every", 2,
        "--learning-rate", 0.01,
    )  # fmt: skip


def healing_twice(*both):
    """Heal and heal again, in the same process."""
    for words in both:
        with pytest.raises(SystemExit) as ended:
            command(words)
        assert not ended.value.code


@pytest.fixture(scope="module")
def together(healing, tmp_path_factory):
    """What two processes left that nobody killed, without dropout and with it."""
    folder = tmp_path_factory.mktemp("together")
    plain, dropout = (
        [*healing, "--dropout", share, "--out", folder / name]
        for name, share in (("plain", 0), ("dropout", 0.2))
    )
    done = Two.start(tmp_path_factory.mktemp("said"), healing_twice, plain, dropout).end()
    assert done.status == [0, 0], done.err
    assert done.out.count("wrote") == 2
    assert done.said == []
    return folder


def record(path):
    return json.loads((path / "healing.json").read_text())


def nats(path):
    found = record(path)
    losses = [found["original"], *found["held_out"]]
    return [loss["nats"] for loss in losses]


def test_two_processes_heal_as_one_does(together, healing, tmp_path):
    one, two = tmp_path / "one", together / "plain"
    alone = in_this_process(*healing, "--dropout", 0, "--out", one)
    assert alone.status == 0, alone.err
    single, shared = (load_file(path / "model.safetensors") for path in (one, two))
    assert single.keys() == shared.keys()
    for name, value in single.items():
        assert np.abs(value - shared[name]).max() < 2e-4 * max(1, np.abs(value).max())
    # The uncut model and the cut are the same ones, and their texts were shared.
    assert nats(two)[:2] == pytest.approx(nats(one)[:2], abs=1e-6)
    assert nats(two)[2:] == pytest.approx(nats(one)[2:], abs=1e-4)
    assert record(two)["merge"]["difference"] < 1e-5
    assert not list(together.glob(".*"))


@pytest.mark.slow
def test_two_processes_that_were_killed_end_with_the_same_bits(together, healing, tmp_path):
    out, said = tmp_path / "healed" / "out", tmp_path / "said"
    out.parent.mkdir()
    words = (*healing, "--dropout", 0.2, "--out", out)
    started = Two.start(tmp_path / "killed", command, words)
    began = time.monotonic()
    while not list(out.parent.glob(".out.partial/folder/training/*/complete")):
        assert started.forks[0].ended(0.005) is None, started.forks[0].err
        assert time.monotonic() - began < 300
    started.kill()
    assert not out.exists()
    done = Two.start(said, command, words).end()
    assert done.status == [0, 0], done.err
    (resuming,) = done.said
    assert resuming.endswith(" of 4 steps were taken")
    assert done.out.count("wrote") == 1
    for name in ("model.safetensors", "config.json", "README.md", "shallower_plan.json"):
        whole = together / "dropout" / name
        assert (out / name).read_bytes() == whole.read_bytes(), name
    one, other = record(out), record(together / "dropout")
    for each in (one, other):
        del each["tokens_per_second"]
    assert one == other
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def heal_on_answers(cut, out):
    """Heal on texts and answers, few of whose tokens are predicted."""
    recipe = replace(QUICK, share=0.5, dropout=0.0, steps=3, batch_size=4)
    sh.heal(cut, TEXTS, out, recipe=recipe, answers=ANSWERS)


@pytest.mark.slow
def test_two_processes_heal_on_answers_as_one_does(cut, tmp_path):
    """A step is one mean over the tokens that are predicted, whoever has which of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    heal_on_answers(cut, one)
    done = Two.start(tmp_path / "said", heal_on_answers, cut, two).end()
    assert done.status == [0, 0], done.err
    single, shared = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    for name, value in single.items():
        assert np.abs(value - shared[name]).max() < 2e-4 * max(1, np.abs(value).max())
    losses = [[step["loss"] for step in record(path)["steps"]] for path in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_processes_that_cannot_find_one_another_say_so(healing, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    done = in_this_process(*healing, "--out", tmp_path / "out")
    assert "one of 2 processes, as WORLD_SIZE says, and cannot find the others" in done.err
    assert (done.status, "Start them by torchrun" in done.err) == (2, True)


def fail_in_the_second(words):
    """A healing whose second process fails where adapters are put in."""
    from shallower import cli
    from shallower.healing import heal, ranks

    def fail(*_args, **_options):
        raise sh.ModelError("only the second process fails")

    cli.PATIENCE = ranks.SECONDS_TO_BE_ENDED = 0.01
    if os.environ["RANK"] == "1":
        heal.add_adapters = fail
    command(words)


def test_the_process_that_fails_says_why_and_the_other_one_that_it_does(healing, tmp_path):
    words = (*healing, "--out", tmp_path / "out")
    two = Two.start(tmp_path / "said", fail_in_the_second, words)
    assert two.end().status == [2, 2]
    said = [beside_progress(fork.err) for fork in two.forks]
    assert said == [
        ["error: another of the processes that train together ended: its error says why"],
        ["error: only the second process fails"],
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_heal_under_torchrun(together, healing, tmp_path):
    """With the same bits as those that the other tests start."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    words = (*healing, "--dropout", 0.2, "--out", tmp_path / "out")
    done = in_a_process(
        sys.executable, *launch, "-m", "shallower", *words, timeout=300,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (done.status, done.said, done.out.count("wrote")) == (0, [], 1)
    for name in ("model.safetensors", "config.json", "README.md", "shallower_plan.json"):
        whole = together / "dropout" / name
        assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes(), name

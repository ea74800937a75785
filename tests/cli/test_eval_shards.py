"""The commands `eval --shard`, `eval --workers` and `gather` of evaluations."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shallower.sharing.shards import MadeShard
from shallower.store.store import open_store
from tests.commands import in_this_process
from tests.conftest import write_jsonl
from tests.documents import documents

pytestmark = pytest.mark.filterwarnings("default:.*samples rejected")

BOTH = ["--perplexity", "long.txt", "--context", "16"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with 40 texts in a file, of which two cannot be predicted, and a long text."""
    folder = tmp_path_factory.mktemp("asked")
    texts = documents(40)
    texts[3], texts[20] = "", "w1"
    (folder / "long.txt").write_text(" ".join(documents(16, seed=2)))
    write_jsonl(folder / "many.jsonl", texts)
    return folder


def command_of(tiny, many):
    return ["eval", tiny, "--texts", many, "--max-length", 16, "--batch-size", 3, "--drop", "1:3"]


def done_in(folder, *command):
    """A command that ends well, in a folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        done = in_this_process(*command)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def whole(asked, tiny):
    """What one process finds of both, as JSON."""
    command = command_of(tiny, asked / "many.jsonl")
    return done_in(asked, *command, *BOTH, "--no-cache", "--json").json


@pytest.fixture(scope="module")
def told(tmp_path_factory, asked, tiny, kept):
    """What five shards of both say, measured by hand in any order; the last one comes last."""
    folder = tmp_path_factory.mktemp("five")
    command = [*command_of(tiny, asked / "many.jsonl"), *BOTH, "--out", folder, "--json"]
    indices = random.Random(1).sample(range(5), 5)
    return [done_in(asked, *command, "--shard", f"{index}/5").json for index in indices]


@pytest.fixture(scope="module")
def five(told):
    """The folder that they are in."""
    return Path(told[0]["written"][0]).parent


@pytest.fixture
def many(folder, asked):
    """The same in the folder of the test."""
    shutil.copytree(asked, folder, dirs_exist_ok=True)
    return folder / "many.jsonl"


@pytest.fixture
def command(tiny, many):
    """Losses of a model and of a cut, in batches of 3; some windows of them are not full."""
    return command_of(tiny, many)


@pytest.fixture
def shards(shallower, command):
    """Measure shards by hand, in any order; the JSON of the last."""

    def measure(count, *more):
        for index in random.Random(1).sample(range(count), count):
            shard = ["--out", "shards", "--shard", f"{index}/{count}", "--json"]
            done = shallower(*command, *shard, *more)
            assert done.status == 0, done.err
        return done.json

    return measure


# By hand.
def test_shards_are_gathered_to_what_one_process_finds(
    shallower, folder, command, told, five, whole, monkeypatch
):
    last = told[-1]
    assert last["loss"]["num_batches"] == 13
    assert last["written"] == [f"{five}/eval.{last['shard'][0]}-of-5.json"]
    jobs = {MadeShard.load(path).job for path in five.iterdir()}
    assert len(jobs) == 1
    assert None not in jobs
    parts = random.Random(2).sample([*five.iterdir()], 5)
    gathered = shallower("gather", *parts, "--out", "gathered", "--json")
    assert gathered.json == whole
    assert (folder / "gathered" / "eval.json").read_text() == gathered.out
    again = shallower("gather", five, "--out", "again")
    assert shallower("gather", five, "--out", "again").out == again.out
    monkeypatch.setattr("shallower.models.source.ModelSource.load", lambda *_, **__: 1 / 0)
    known = shallower(*command, *BOTH)
    assert "cached, measured" in known.err
    assert again.out == f"{known.out}wrote again/eval.json\n"


def test_shards_of_a_streamed_model_have_the_same_bits(shallower, shards, whole):
    shards(2, "--stream", *BOTH)
    assert shallower("gather", "shards", "--out", "gathered", "--json").json == whole


@pytest.mark.parametrize(
    "change",
    [
        {"path": "twin"},
        {"trust_remote_code": True},
        pytest.param({"dtype": 1}, marks=pytest.mark.slow),
    ],
)
def test_gather_remembers_for_the_model_alone_that_lies_here_as_shards_say(
    shallower, folder, models, command, five, change
):
    """The shards name a model that was not measured, or one whose code would be run."""
    shutil.copytree(five, folder / "shards")
    if "path" in change:
        change = {"path": str(models / "twin")}
    for path in (folder / "shards").iterdir():
        shard = MadeShard.load(path)
        source = {**shard.described["source"], **change}
        other = replace(shard, described={**shard.described, "source": source})
        path.write_bytes(other.to_bytes())
    done = shallower("gather", "shards", "--out", "gathered")
    assert done.status == 0
    assert "eval will not find this in the cache" in done.err
    assert {kind for kind, *_ in open_store().usage()} <= {"files", "trials"}
    twin = shallower("eval", models / "twin", *command[2:], *BOTH, "--json")
    assert twin.json != json.loads((folder / "gathered" / "eval.json").read_text())
    assert "cached, measured" not in twin.err


def test_a_shard_that_is_damaged_says_so_and_one_of_other_work_too(shallower, folder, command):
    """Before anything is loaded."""
    command = [*command, "--out", "out"]
    place = folder / "out" / "eval.0-of-64.json"
    assert shallower(*command, "--shard", "0/64", "--no-cache").status == 0
    assert "is already there" in shallower(*command, "--shard", "0/64").err
    for content, said in (
        (place.read_bytes()[:-9], "is damaged"),
        (place.read_bytes().replace(b'"num_items": 38', b'"num_items": 39'), "checksum"),
        (replace(MadeShard.load(place), job="x").to_bytes(), "exists already, and is no shard"),
    ):
        place.write_bytes(content)
        message = shallower(*command, "--shard", "0/64").error
        assert "out/eval.0-of-64.json" in message
        assert said in message
        assert "or replace it (overwrite=True, --overwrite)" in message
        assert place.read_bytes() == content


# By workers.
def test_workers_measure_what_one_process_finds(shallower, folder, command, whole, monkeypatch):
    done = shallower(*command, *BOTH, "--workers", "2", "--out", "out", "--json")
    assert done.json == whole
    assert [path.name for path in (folder / "out").iterdir()] == ["eval.json"]
    monkeypatch.setattr("shallower.models.source.ModelSource.load", lambda *_, **__: 1 / 0)
    again = shallower(*command, *BOTH, "--workers", "2", "--json")
    assert again.json == whole
    assert "cached, measured" in again.err


# Into a folder.
def test_what_is_printed_is_written_and_not_over_something_else(shallower, folder, tiny, jsonl):
    command = ["eval", tiny, "--texts", jsonl, "--out", "out"]
    done = shallower(*command)
    assert done.out.endswith("wrote out/eval.json\n")
    written = (folder / "out" / "eval.json").read_text()
    assert shallower(*command, "--json").out == written
    assert "out/eval.json exists already" in shallower(*command, "--drop", "1").error
    assert (folder / "out" / "eval.json").read_text() == written
    dry = shallower(*command, "--drop", "1", "--dry-run", "--json", "--overwrite").json
    assert dry["write"] == ["out/eval.json"]
    assert "exists already" in shallower(*command, "--drop", "1", "--dry-run").error
    cut = shallower(*command, "--drop", "1", "--overwrite", "--json")
    assert (folder / "out" / "eval.json").read_text() == cut.out != written
    inside = shallower("eval", tiny, "--texts", jsonl, "--out", tiny / "out")
    assert "it lies in" in inside.error

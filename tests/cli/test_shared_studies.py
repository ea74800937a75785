"""The commands `compare` and `curve` with `--shard` and `--workers`, and `gather` of them."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from shallower.store.store import Store, open_store
from shallower.values.provenance import hash_of
from tests.commands import SHALLOWER, in_a_process
from tests.conftest import write_jsonl
from tests.documents import documents


@pytest.fixture
def asked(tiny, texts):
    files = ["--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl"]
    return [tiny, *files, "--n", "1,2", "--max-length", "16"]


FEW = ["--max-texts", "12"]


def compared(asked, *criteria):
    names = ",".join(criteria or ["angular", "greedy", "deepest"])
    return ["compare", *asked, *FEW, "--criteria", names]


def without_time(found):
    """A comparison without what a clock says."""
    rows = [{**row, "seconds": 0, "choice_seconds": 0} for row in found["rows"]]
    return {**found, "rows": rows, "page": "", "out": ""}


def elsewhere(monkeypatch, folder, name):
    """Another machine of this kind, with a cache of its own."""
    monkeypatch.setenv("SHALLOWER_CACHE", str(folder / f"cache-{name}"))


@pytest.mark.usefixtures("undrawn")
def test_shards_of_a_comparison_are_gathered_to_the_whole(shallower, folder, asked, monkeypatch):
    whole = shallower(*compared(asked), "--out", "whole", "--json").json
    for index in range(3):
        elsewhere(monkeypatch, folder, index)
        command = [*compared(asked), "--out", "shards", "--shard", "auto"]
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", "3")
        done = shallower(*command, "--json").json
        assert done["written"] == [f"shards/compare.{index}-of-3.json"]
        assert (done["shard"], done["num_parts"]) == (f"{index}/3", 4)
        assert "shard" in shallower(*command).out
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [
        f"compare.{index}-of-3.json" for index in range(3)
    ]
    elsewhere(monkeypatch, folder, "gathering")
    done = shallower("gather", "shards", "--out", "out", "--json")
    assert without_time(done.json) == without_time(whole)
    kept = {kind: count for kind, count, *_ in open_store().usage()}
    said = shallower(*compared(asked), "--out", "out")  # is in its folder, and in the cache
    assert "cached, measured" in said.err
    assert {kind: count for kind, count, *_ in open_store().usage()} == kept
    of = [json.loads((folder / name / "comparison.json").read_text()) for name in ("out", "whole")]
    assert of[0]["job"] == of[1]["job"]
    assert of[0]["command"].startswith("shallower compare tiny --texts texts.jsonl ")


@pytest.mark.usefixtures("undrawn")
def test_shards_of_a_file_of_options_are_gathered_to_the_whole(
    shallower, folder, texts, models, monkeypatch
):
    """Two models on two calibration texts, of a curve: an array of jobs has one command."""
    write_jsonl(folder / "more.jsonl", documents(24, seed=5))
    places = {
        "models": [models / "tiny", models / "deeper"],
        "texts": [texts / "texts.jsonl", "more.jsonl"],
        "eval-texts": [texts / "held_out.jsonl"],
    }
    lines = [f"{key}: [{', '.join(map(str, value))}]\n" for key, value in places.items()]
    few = "n: [1, 2]\nmax-length: 16\ncriteria: [angular, deepest]\nstates: [cut]\n"
    (folder / "study.yaml").write_text("".join(lines) + few)
    command = ["curve", "--config", "study.yaml", "--json"]
    whole = shallower(*command, "--out", "whole").json
    for index in range(2):
        elsewhere(monkeypatch, folder, index)
        done = shallower(*command, "--out", "shards", "--shard", f"{index}/2")
        assert done.json["num_parts"] == 12, done.err
    elsewhere(monkeypatch, folder, "gathering")
    monkeypatch.setattr("shallower.judgement.judges.judge.summed_losses", lambda *_: 1 / 0)
    done = shallower("gather", "shards", "--out", "out", "--json")
    assert without_time(done.json) == without_time(whole)
    scans = [sorted((folder / name / "scans").iterdir()) for name in ("out", "whole")]
    assert len(scans[0]) == 4
    for gathered, at_once in zip(*scans, strict=True):
        assert gathered.name == at_once.name
        assert gathered.read_bytes() == at_once.read_bytes()


def test_gather_refuses_what_is_missing_changed_or_of_other_work(shallower, folder, asked):
    for shard, criteria in (("0/2", "deepest"), ("1/2", "angular")):
        command = [*compared(asked, criteria), "--out", f"{criteria}s", "--shard", shard]
        assert shallower(*command).status == 0
    assert shallower("gather", "deepests", "--out", "out").error == "1 shard of 2 is missing: 1/2"
    done = shallower("gather", "deepests", "angulars", "--out", "out")
    assert "are shards of different comparisons" in done.error
    (file,) = (folder / "deepests").iterdir()
    content = file.read_text()
    for before, after in (
        ("measurements", "measurement"),
        ("[", "("),
        ('"index": 0', '"index": 1'),
    ):
        file.write_text(content.replace(before, after, 1))
        said = shallower("gather", "deepests", "--out", "out").error
        assert "deepests/compare.0-of-2.json is" in said
    file.write_text(content)
    crafted(file, lambda content: content.update(kind="tasks"))
    assert "deepests/compare.0-of-2.json is" in shallower("gather", file, "--out", "out").error
    assert not (folder / "out").exists()


def test_gather_trusts_no_code_by_the_word_of_a_file(shallower, folder, asked, monkeypatch):
    command = [*compared(asked, "deepest"), "--trust-remote-code"]
    elsewhere(monkeypatch, folder, "there")
    assert shallower(*command, "--out", "shards", "--shard", "0/1").status == 0
    elsewhere(monkeypatch, folder, "here")
    gather = ["gather", "shards", "--out", "out"]
    assert "gather runs no code" in shallower(*gather).error
    assert open_store().usage() == []
    assert shallower(*gather, "--trust-remote-code").status == 0
    assert "cached, measured" in shallower(*command, "--out", "out").err
    (file,) = (folder / "shards").iterdir()

    def names_code_of_tasks(content):
        content["described"]["models"][0]["trust_remote_code"] = False
        content["described"]["settings"]["tasks_dir"] = "tasks"

    crafted(file, names_code_of_tasks)
    assert "gather runs no code" in shallower(*gather[:-1], "other").error


def crafted(file, change):
    """A shard whose content was changed, with a checksum that fits."""
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_text(json.dumps({**content, "sha256": hash_of(content)}))


@pytest.mark.usefixtures("undrawn")
def test_gather_takes_what_the_comparison_asks_for_and_nothing_else(
    shallower, folder, asked, monkeypatch
):
    """Entries of another work, of files and of another kind under a key that is asked for."""
    elsewhere(monkeypatch, folder, "there")
    command = [*compared(asked, "deepest"), "--out", "shards", "--shard", "0/1"]
    assert shallower(*command).status == 0
    stranger = Store(folder / "stranger")
    stranger.put("loss", {"of": "another eval"}, {"loss": 5.407})
    foreign = stranger.give({})["measurements"]
    stranger.put("files", {"file": ["model.safetensors"]}, {"sha256": "0"})
    hashes = Store(folder / "stranger")._rows("SELECT * FROM measurements")
    foreign += [[one.decode() if isinstance(one, bytes) else one for one in row] for row in hashes]
    (file,) = (folder / "shards").iterdir()
    crafted(file, lambda content: content["entries"]["measurements"].extend(foreign))
    elsewhere(monkeypatch, folder, "here")
    assert shallower("gather", "shards", "--out", "out").status == 0
    assert open_store().get("loss", {"of": "another eval"}) is None
    assert open_store().get("files", {"file": ["model.safetensors"]}) is None
    assert "cached, measured" in shallower(*compared(asked, "deepest"), "--out", "out").err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content.update(entries={}),
            "the shards have no measurement of whole model",
        ),
        (
            lambda content: content["described"]["identities"][0]["model"].update(sha256="0"),
            "here is not the model of the driver",
        ),
        (
            lambda content: content["described"]["identities"][0].update(dtype="float16"),
            "here is not the model of the driver",
        ),
        (
            lambda content: content["described"].pop("places"),
            "the shards do not describe their compare: places",
        ),
    ],
)
def test_gather_believes_no_shard_that_says_less_or_other_than_is_here(
    shallower, folder, asked, change, said, monkeypatch
):
    """Without a measurement, or with keys of another model, or of no study."""
    elsewhere(monkeypatch, folder, "there")
    command = [*compared(asked, "deepest"), "--out", "shards", "--shard", "0/1"]
    assert shallower(*command).status == 0
    (file,) = (folder / "shards").iterdir()
    crafted(file, change)
    elsewhere(monkeypatch, folder, "here")
    assert said in shallower("gather", "shards", "--out", "out").error
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "curve"])
def test_a_killed_driver_goes_on_with_the_parts_that_are_missing(folder, asked, command):
    """It is killed as soon as a part is done; what one process finds comes of it."""
    options = ["--criteria", "angular,greedy,exhaustive"]
    if command == "curve":
        options = ["--criteria", "recommended,deepest", "--patch-tokens", "256"]
    words = [command, *asked, *options, "--json"]
    alone = {"SHALLOWER_CACHE": str(folder / "alone")}
    whole = in_a_process(SHALLOWER, *words, "--out", folder / "whole", env=alone)
    assert whole.status == 0, whole.err
    words += ["--out", folder / "out", "--workers", "1"]
    started = subprocess.Popen([SHALLOWER, *map(str, words)], env={**os.environ})
    while parts() < 1:
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    ended = in_a_process(SHALLOWER, *words)
    assert ended.status == 0, ended.err
    assert re.search(r"resuming: [1-3] of [34] parts are done", ended.err), ended.err
    assert without_time(ended.json) == without_time(whole.json)


def parts():
    """The parts that the cache has."""
    return sum(count for kind, count, *_ in open_store().usage() if kind == "study")

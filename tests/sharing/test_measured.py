"""Shards of an evaluation as files, and put together."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from shallower import ScanError
from shallower.sharing.measured import MeasuredShard, Tally, evaluation_of
from shallower.values.hashing import hash_of
from shallower.values.identity import ModelIdentity
from shallower.values.plan import Plan
from shallower.values.shard import Shard, kind_of, read_shards
from tests.values.damage import mistyped

MODEL = ModelIdentity("tiny", "llama", 6, "float32", "ab" * 32)
VERSIONS = {"shallower": "0.1.0", "torch": "2.0", "transformers": "5.0"}
SETTINGS = {
    "loss": {"num_rejected": 1, "vocab_size": 100},
    "perplexity": {"context": 4, "bos": 0, "num_rest": 2},
}
ITEMS = ((0, 4, 6), (1, 3), (2, 5))
"""Seven texts in three shards: sorted by length they do not lie side by side."""


def part(kind, items):
    """Losses of texts: a third of its index, and of the cut twice as much."""
    nats = np.array(items, np.float64) / 3
    return Tally(
        num_batches=4,
        batch_size=2,
        num_items=7,
        fingerprint="cd" * 32,
        settings=SETTINGS[kind],
        items=items,
        counts=(3,) * len(items),
        num_bytes=(11,) * len(items) if kind == "loss" else None,
        nats={"base": nats, "cut": 2 * nats},
    )


def shard(index):
    parts = {kind: part(kind, ITEMS[index]) for kind in SETTINGS}
    return MeasuredShard(
        Shard(index, 3),
        "job",
        VERSIONS,
        machine={"cpu": "here"},
        described={"source": {}},
        model=MODEL,
        weights="12" * 32,
        plan=Plan.of(6, [1, 2]),
        parts=parts,
    )


def gather_evaluation(parts):
    return evaluation_of(read_shards(parts, MeasuredShard.load, "eval"))


def write(folder, *shards):
    folder.mkdir(exist_ok=True)
    for one in shards:
        (folder / one.shard.file_of("eval")).write_bytes(one.to_bytes())
    return folder


@pytest.fixture
def parts(tmp_path):
    return write(tmp_path / "parts", *map(shard, range(3)))


def test_shards_in_any_order_are_the_losses_of_all_texts_in_theirs(parts):
    files = [*parts.iterdir(), parts / "eval.1-of-3.json"]  # one of them twice
    random.Random(3).shuffle(files)
    found = gather_evaluation(files)
    loss, cut = (found.values["loss"][side] for side in ("base", "cut"))
    assert loss.by_text.sums.tolist() == [index / 3 for index in range(7)]
    assert cut.by_text.sums.tolist() == [2 * (index / 3) for index in range(7)]
    assert (loss.num_tokens, loss.num_texts, loss.num_rejected, loss.vocab_size) == (21, 7, 1, 100)
    assert loss.bytes_by_text.tolist() == [11] * 7
    assert loss.nats == sum(range(7)) / 3 / 21
    window = found.values["perplexity"]["base"]
    assert (window.context, window.bos, window.num_rest) == (4, False, 2)
    assert window.by_window.sums.tolist() == loss.by_text.sums.tolist()
    assert (found.of.job, found.machine) == ("job", {"cpu": "here"})
    assert found.of.plan.dropped == (1, 2)


def test_what_is_of_several_machines_is_found_by_none(parts):
    write(parts, replace(shard(1), machine={"cpu": "there"}))
    assert gather_evaluation([parts]).machine is None


def test_missing_shards_are_named(parts):
    with pytest.raises(ScanError, match=r"^2 shards of 3 are missing: 0/3, 2/3$"):
        gather_evaluation([parts / "eval.1-of-3.json"])


def test_a_shard_that_is_there_twice_and_differs_is_refused(parts, tmp_path):
    write(tmp_path / "more", replace(shard(1), job="another"))
    with pytest.raises(ScanError, match=r"are both shard 1/3, and differ"):
        gather_evaluation([parts, tmp_path / "more"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"job": "another"}, r"of different evals: their inputs differ \(job and another\)"),
        ({"versions": {"shallower": "0.0.9"}}, "their versions differ"),
        ({"model": replace(MODEL, fingerprint="ef" * 32)}, "their model differs"),
        ({"job": None}, "their inputs differ"),
        ({"weights": "ef" * 32}, r"their weights differ \(121212121212 and efefefefefef\)"),
        ({"weights": None}, "their weights differ"),
        ({"plan": Plan.of(6, [3])}, "their cut differs"),
        ({"shard": Shard(1, 4)}, r"their number of shards differs \(3 and 4\)"),
        ({"parts": {"loss": part("loss", ITEMS[1])}}, "their measures differ"),
    ],
)
def test_shards_of_other_work_are_refused_by_what_differs(parts, changed, said):
    (parts / "eval.1-of-3.json").unlink()
    write(parts, replace(shard(1), **changed))
    with pytest.raises(ScanError, match=said):
        gather_evaluation([parts])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fingerprint": "ef" * 32}, "their texts differ"),
        ({"batch_size": 4}, "their measures differ"),
        ({"num_batches": 5}, "their measures differ"),
        ({"settings": {"num_rejected": 0, "vocab_size": 100}}, "their measures differ"),
        ({"items": (0, 3)}, r"6 losses of 7|have 7 losses of 7, or one twice"),
    ],
)
def test_shards_of_other_texts_are_refused(parts, changed, said):
    other = replace(part("loss", ITEMS[1]), **changed)
    write(parts, replace(shard(1), parts={**shard(1).parts, "loss": other}))
    with pytest.raises(ScanError, match=said):
        gather_evaluation([parts])


# Damaged files.
def damage(parts, change):
    """A shard whose content is changed, with a checksum that fits."""
    data = json.loads((parts / "eval.0-of-3.json").read_bytes())
    del data["sha256"]
    change(data)
    (parts / "eval.0-of-3.json").write_text(json.dumps({**data, "sha256": hash_of(data)}))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("shard", {"index": 3, "count": 3}),
        ("shard", {"index": 0, "count": 10**12}),
        ("plan", {"num_layers": 10**12}),
        ("parts", {}),
        ("parts", {"tasks": {}}),
        ("more", 1),
        ("parts.loss.items", [0, 4, 4]),
        ("parts.loss.items", [0, 4]),
        ("parts.loss.counts", [3, 3, 0]),
        ("parts.loss.num_bytes", [1]),
        ("parts.loss.num_batches", 0),
        ("parts.loss.nats", {"base": [0, 1, 2]}),
        ("parts.loss.nats", {"base": [0, 1, 2], "cut": [0, 1, float("nan")]}),
        ("parts.loss.settings", {"num_rejected": 0}),
        ("parts.loss.settings", {"num_rejected": 0, "vocab_size": 1}),
    ],
)
def test_a_damaged_shard_is_named(parts, place, value):
    def change(data):
        *way, name = place.split(".")
        for step in way:
            data = data[step]
        data[name] = value

    damage(parts, change)
    with pytest.raises(
        ScanError,
        match=r"eval\.0-of-3\.json is damaged, or no shard of format shallower\.eval\.shard\.2: ",
    ):
        gather_evaluation([parts])


def test_a_value_of_another_type_is_refused_wherever_it_stands(parts):
    data = json.loads((parts / "eval.0-of-3.json").read_bytes())
    data.update(machine={}, described={})  # which are taken as they are
    del data["sha256"]
    for one in mistyped(data):
        (parts / "eval.0-of-3.json").write_text(json.dumps({**one, "sha256": hash_of(one)}))
        with pytest.raises(ScanError):
            gather_evaluation([parts])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b"{", "is damaged"),
        (b'{"loss": 1}', "it has no 'format'"),
        (
            b'{"format": "shallower.eval.shard.1"}',
            "got format .shallower.eval.shard.1.: make it anew",
        ),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_what_is_no_shard_is_named(tmp_path, content, said):
    (tmp_path / "one.json").write_bytes(content)
    with pytest.raises(ScanError, match=rf"one\.json .*{said}"):
        gather_evaluation([tmp_path / "one.json"])


def test_a_changed_value_does_not_fit_the_checksum(parts):
    place = parts / "eval.0-of-3.json"
    place.write_bytes(place.read_bytes().replace(b'"num_items": 7', b'"num_items": 8'))
    with pytest.raises(ScanError, match="checksum does not fit"):
        gather_evaluation([parts])


def test_the_kind_of_shards_is_told_by_their_names(parts, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "scan.0-of-1.safetensors").touch()
    assert kind_of([parts]) == kind_of([parts / "eval.0-of-3.json"]) == "eval"
    assert kind_of([tmp_path / "scans"]) == "scan"
    assert kind_of([parts / "renamed.json"]) == "eval"
    assert kind_of([tmp_path / "compare.1-of-2.json"]) == "compare"
    with pytest.raises(ScanError, match=r"of several kinds \(compare, eval, scan\): gather them"):
        kind_of([parts / "eval.0-of-3.json", tmp_path / "scans", tmp_path / "compare.0-of-1.json"])
    with pytest.raises(ScanError, match=r"scan\.I-of-N\.safetensors or eval\.I-of-N\.json or"):
        gather_evaluation([tmp_path])

"""Shards as files, refused where they are not of one work, and those of an evaluation together."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

import shallower as sh
from shallower import ScanError
from shallower.sharing.eval_work import MeasuredPart, Tally, evaluation_of, machine_of
from shallower.sharing.shards import MadeShard, read_shards, values_of
from shallower.values.identity import ModelIdentity
from shallower.values.provenance import hash_of
from shallower.values.schema import plain_fields
from shallower.values.shard import Shard
from tests.values.damage import mistyped

MODEL = ModelIdentity("tiny", "llama", 6, "float32", "ab" * 32)
VERSIONS = {"shallower": "0.1.0", "torch": "2.0", "transformers": "5.0"}
SETTINGS = {
    "loss": {"num_rejected": 1, "vocab_size": 100},
    "perplexity": {"context": 4, "bos": 0, "num_rest": 2},
}
ITEMS = ((0, 4, 6), (1, 3), (2, 5))
"""Seven texts in three shards: sorted by length they do not lie side by side."""


COMMON = {"model": "tiny", "weights": "121212121212", "texts": {"loss": "7, cdcd"}}


def part(kind, items):
    """Losses of texts: a third of its index, and of the cut twice as much."""
    nats = np.array(items, np.float64) / 3
    return Tally(
        num_items=7,
        settings=SETTINGS[kind],
        items=items,
        counts=(3,) * len(items),
        num_bytes=(11,) * len(items) if kind == "loss" else None,
        nats={"base": nats, "cut": 2 * nats},
    )


def measured(index, machine="here", **parts):
    tallies = {kind: part(kind, ITEMS[index]) for kind in SETTINGS}
    return plain_fields(MeasuredPart({"cpu": machine}, MODEL, {**tallies, **parts}))


def shard(index, **more):
    return MadeShard(
        "eval",
        Shard(index, 3),
        "job",
        versions=VERSIONS,
        common=COMMON,
        described={},
        values={f"{index}/3": measured(index, **more)},
        entries={},
        failed={},
    )


def gather_evaluation(parts):
    return evaluation_of(values_of(read_shards(parts), MeasuredPart))


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
    loss, cut = (found["loss"][side].value for side in ("base", "cut"))
    assert loss.by_text.sums.tolist() == [index / 3 for index in range(7)]
    assert cut.by_text.sums.tolist() == [2 * (index / 3) for index in range(7)]
    assert (loss.num_tokens, loss.num_texts, loss.num_rejected, loss.vocab_size) == (21, 7, 1, 100)
    assert loss.bytes_by_text.tolist() == [11] * 7
    assert loss.nats == sum(range(7)) / 3 / 21
    window = found["perplexity"]["base"].value
    assert (window.context, window.bos, window.num_rest) == (4, False, 2)
    assert window.by_window.sums.tolist() == loss.by_text.sums.tolist()
    assert found["loss"]["cut"].model == MODEL


def test_what_is_of_several_machines_is_found_by_none(parts):
    def machine():
        return machine_of(values_of(read_shards([parts]), MeasuredPart))

    assert machine() == {"cpu": "here"}
    write(parts, shard(1, machine="there"))
    assert machine() is None


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
        ({"kind": "scan"}, r"of several kinds \(eval, scan\): gather them one after the other"),
        ({"shard": Shard(1, 4)}, r"their number of shards differs \(3 and 4\)"),
        ({"versions": {"shallower": "0.0.9"}}, "their versions differ"),
        (
            {"common": {**COMMON, "weights": "efef"}},
            r"their weights differ \(121212121212 and efef",
        ),
        ({"common": {}}, "their model differs"),
    ],
)
def test_shards_of_other_work_are_refused_by_what_differs(parts, changed, said):
    (parts / "eval.1-of-3.json").unlink()
    write(parts, replace(shard(1), **changed))
    with pytest.raises(ScanError, match=said):
        gather_evaluation([parts])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "shard 1/3 is damaged"),
        ({"1/3": measured(1) | {"tallies": {}}}, "shard 1/3 is damaged: .*no measure"),
        ({"1/3": measured(0)}, r"have 8 losses of 7, or one twice"),
        ({"1/3": measured(1, loss=part("loss", (1, 2)))}, "or one twice"),
        ({"1/3": measured(1, loss=part("loss", (1,)))}, "6 losses of 7"),
    ],
)
def test_shards_that_lack_texts_are_refused(parts, values, said):
    write(parts, replace(shard(1), values=values))
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
        ("kind", "tasks"),
        ("versions", {"shallower": 1}),
        ("more", 1),
        ("values.0/3.tallies", {"tasks": {}}),
        ("values.0/3.tallies.loss.items", [0, 4, 4]),
        ("values.0/3.tallies.loss.counts", [3, 3, 0]),
        ("values.0/3.tallies.loss.num_bytes", [1]),
        ("values.0/3.tallies.loss.num_items", 0),
        ("values.0/3.tallies.loss.nats", {"base": [0, 1, 2], "cut": [0, 1, float("nan")]}),
        ("values.0/3.tallies.loss.settings", {"num_rejected": 0, "vocab_size": 1}),
    ],
)
def test_a_damaged_shard_is_named(parts, place, value):
    def change(data):
        *way, name = place.split(".")
        for step in way:
            data = data[step]
        data[name] = value

    damage(parts, change)
    with pytest.raises(ScanError, match=r"(eval\.0-of-3\.json|shard 0/3) is damaged"):
        gather_evaluation([parts])


def test_a_value_of_another_type_is_refused_wherever_it_stands(parts):
    data = json.loads((parts / "eval.0-of-3.json").read_bytes())
    data.update(common={}, described={}, entries={})  # which are taken as they are
    data["values"]["0/3"]["machine"] = {}
    del data["sha256"]
    for one in mistyped(data):
        (parts / "eval.0-of-3.json").write_text(json.dumps({**one, "sha256": hash_of(one)}))
        with pytest.raises(ScanError):
            gather_evaluation([parts])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is damaged"),
        (b'{"loss": 1}', "it has no 'format'"),
        (
            b'{"format": "shallower.eval.shard.2"}',
            "got format .shallower.eval.shard.2.: make it anew",
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


def test_what_is_no_folder_of_shards_is_refused(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match=r"there are no shards in .*scan\.I-of-N\.json or eval\."):
        gather_evaluation([tmp_path / "empty"])
    with pytest.raises(ScanError, match="there are no shards to gather"):
        gather_evaluation([])
    with pytest.raises(
        ScanError, match="shards of the kind eval, not of a scan: use shallower gather"
    ):
        sh.gather([parts])

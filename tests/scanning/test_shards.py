"""Shards of a scan, put together to the bytes of the whole."""

import itertools
import json
import random
from dataclasses import replace

import pytest

import shallower as sh
from shallower import ScanError, StatesError
from shallower.scanning.scan_file import scan_bytes
from shallower.scanning.shards import ScannedShard, Shards, gather
from shallower.values.shard import Shard
from shallower.values.tokens import Tokens
from tests.conftest import edited, mostly_slow
from tests.documents import TEXTS, documents

BATCH = 2


def shards_of(llama, words, texts, **options):
    positions = sh.Positions.parse(options.pop("positions", "last"))
    return Shards(llama, words, texts, Tokens(256, BATCH), positions=positions, **options)


def written(folder, shards, count):
    """Every shard in its file."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        shard = Shard(index, count)
        (folder / shard.file_of("scan")).write_bytes(shards.scan(shard, progress=False).to_bytes())
    return folder


def whole_bytes(llama, words, texts, path, **options):
    sh.scan(llama, words, texts, batch_size=BATCH, **options).save(path)
    return path.read_bytes()


# Which batches are whose.
@pytest.mark.parametrize("total", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_shards_are_equal_parts_in_order(total, count):
    parts = [Shard(index, count).of(total) for index in range(count)]
    assert [place for part in parts for place in part] == [*range(total)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, Shard(1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "63", "SLURM_ARRAY_TASK_COUNT": "64"}, Shard(63, 64)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_ARRAY_TASK_ID": "3"}, Shard(0, 1)),
    ],
)
def test_auto_is_the_place_in_a_job(environment, expected):
    assert Shard.parse("auto", environment) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9/8", "counted from 0, so that the last of 8 is 7/8"),
        ("8/8", "counted from 0, so that the last of 8 is 7/8"),
        ("0/0", "expected 1 to 100,000 shards"),
        ("-1/8", "expected I/N, as 3/64, or auto"),
        ("3", "expected I/N, as 3/64, or auto"),
        ("auto", "neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID"),
    ],
)
def test_a_shard_that_is_not_there_is_refused(text, said):
    with pytest.raises(ScanError, match=said):
        Shard.parse(text, {"SLURM_ARRAY_TASK_ID": "3"})


# The same bytes.
@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize(
    ("count", "positions"),
    mostly_slow(
        itertools.product([1, 3, 8, 64], ["last", "random:2", "all"]),
        [(3, "random:2"), (64, "last")],
    ),
)
def test_shards_are_gathered_to_the_bytes_of_the_whole(llama, words, tmp_path, count, positions):
    texts = documents(75)
    texts[0] = texts[40] = texts[74] = ""
    options = {"positions": positions, "keep_samples": True}
    whole = whole_bytes(llama, words, texts, tmp_path / "whole", **options)
    folder = written(tmp_path / "parts", shards_of(llama, words, texts, **options), count)
    files = [*folder.iterdir()]
    random.Random(count).shuffle(files)
    done = gather([*files, files[0]])  # one of them twice
    assert scan_bytes(done.contents) == whole


def test_batches_are_shared_out_and_not_texts(llama, words):
    """A text that was in another batch would have other padding, and so other last bits."""
    texts = documents(70)
    shards = shards_of(llama, words, texts)
    assert shards.num_batches == 35
    found = shards.scan(Shard(1, 5), progress=False).contents
    assert found.sums.count == 7 * BATCH
    assert [one.num_texts for one in found.texts] == [70]


def test_an_interrupted_shard_goes_on_to_the_same_bytes(llama, words, tmp_path, monkeypatch):
    shards = shards_of(llama, words, documents(120), keep_samples=True)
    expected = shards.scan(Shard(1, 2), progress=False).to_bytes()
    place = tmp_path / "partial"
    with monkeypatch.context() as patch:
        patch.setattr("shallower.scanning.shards.SECONDS_BETWEEN_CHECKPOINTS", -1)
        shards.scan(Shard(1, 2), checkpoint=place, progress=False)
        kept = []
        patch.setattr(
            "shallower.scanning.shards.write_file",
            lambda path, content: kept.append(content) or path.write_bytes(content),
        )
        place.unlink()
        shards.scan(Shard(1, 2), checkpoint=place, progress=False)
    assert len(kept) == 2
    place.write_bytes(kept[0])
    before = ScannedShard.load(place).of
    assert not before.is_complete
    assert before.num_done == 16
    assert shards.scan(Shard(1, 2), checkpoint=place, progress=False).to_bytes() == expected
    with pytest.raises(ScanError, match=r"cannot go on from .*other work"):
        shards.scan(Shard(0, 2), checkpoint=place, progress=False)
    other = shards_of(edited(llama), words, documents(120), keep_samples=True)
    with pytest.raises(ScanError, match=r"cannot go on from .* with other weights"):
        other.scan(Shard(1, 2), checkpoint=place, progress=False)


# What is refused.
@pytest.fixture
def parts(llama, words, tmp_path):
    return written(tmp_path / "parts", shards_of(llama, words, TEXTS), 3)


def changed(parts, tmp_path, **fields):
    """The parts with something of the second one changed."""
    one = ScannedShard.load(parts / Shard(1, 3).file_of("scan"))
    (tmp_path / "other.safetensors").write_bytes(
        replace(one, of=replace(one.of, **fields)).to_bytes()
    )
    return [
        parts / Shard(0, 3).file_of("scan"),
        tmp_path / "other.safetensors",
        parts / Shard(2, 3).file_of("scan"),
    ]


def test_a_missing_shard_is_named(parts):
    with pytest.raises(ScanError, match=r"^2 shards of 3 are missing: 0/3, 2/3$"):
        gather([parts / Shard(1, 3).file_of("scan")])


def test_an_incomplete_shard_is_a_missing_one(parts, tmp_path):
    with pytest.raises(ScanError, match=r"^1 shard of 3 is missing: 1/3$"):
        gather(changed(parts, tmp_path, num_done=0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"versions": {"shallower": "0.0.1"}}, "their versions differ"),
        ({"batch_size": 4}, "their batch size differs"),
        ({"num_batches": 13}, "their number of batches differs"),
    ],
)
def test_shards_that_were_made_differently_are_refused(parts, tmp_path, fields, said):
    with pytest.raises(ScanError, match=said):
        gather(changed(parts, tmp_path, **fields))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"texts": [*TEXTS[:-1], "another text"]}, "their texts differ"),
        ({"metrics": ["angular"]}, "their settings differ"),
        ({"positions": "all"}, "their settings differ"),
        ({"keep_samples": True}, "their settings differ"),
    ],
)
def test_shards_of_other_scans_are_refused(llama, words, parts, tmp_path, options, said):
    texts = options.pop("texts", TEXTS)
    other = shards_of(llama, words, texts, **options).scan(Shard(1, 3), progress=False)
    (tmp_path / Shard(1, 3).file_of("scan")).write_bytes(other.to_bytes())
    with pytest.raises(ScanError, match=said):
        gather([parts / Shard(0, 3).file_of("scan"), tmp_path, parts / Shard(2, 3).file_of("scan")])


def test_shards_of_other_weights_are_refused(llama, words, parts, tmp_path):
    """Which neither shapes nor norms tell apart."""
    other = shards_of(edited(llama), words, TEXTS).scan(Shard(1, 3), progress=False)
    (tmp_path / Shard(1, 3).file_of("scan")).write_bytes(other.to_bytes())
    with pytest.raises(ScanError, match=r"their weights differ \(\w{12} and \w{12}\)"):
        gather([parts / Shard(0, 3).file_of("scan"), tmp_path, parts / Shard(2, 3).file_of("scan")])


def test_two_files_of_one_shard_that_differ_are_both_named(parts, tmp_path):
    with pytest.raises(ScanError, match=r"1-of-3.*other.*are both shard 1/3, and differ"):
        gather([parts, *changed(parts, tmp_path, job="another")])


def test_a_scan_is_no_shard_and_a_shard_no_scan(llama, words, parts, tmp_path):
    sh.scan(llama, words, TEXTS).save(tmp_path / "whole.safetensors")
    with pytest.raises(ScanError, match="is a whole scan: expected shards"):
        gather([tmp_path / "whole.safetensors"])
    with pytest.raises(ScanError, match="is a shard of a scan: put all of them together"):
        sh.Scan.load(parts / Shard(0, 3).file_of("scan"))


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ScanError, match="there are no shards in"):
        gather([tmp_path])
    with pytest.raises(ScanError, match="there are no shards to gather"):
        gather([])


def test_texts_of_which_none_can_be_compared_are_refused(llama, words, tmp_path):
    parts = written(tmp_path / "parts", shards_of(llama, words, ["", ""]), 2)
    with pytest.raises(StatesError, match="there is nothing to compare: 2 of 2"):
        gather([parts])


def test_a_damaged_shard_is_refused(parts, tmp_path):
    content = (parts / Shard(0, 3).file_of("scan")).read_bytes()
    place = tmp_path / "damaged.safetensors"
    place.write_bytes(content.replace(b'\\"num_done\\": ', b'\\"num_done\\": 9'))
    with pytest.raises(ScanError, match=r"damaged\.safetensors is (damaged|truncated)"):
        gather([place])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert [*header["__metadata__"]] == ["shallower.shard.2"]

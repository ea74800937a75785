"""Parts of a scan, put together to the bytes of the whole."""

import itertools
import json

import pytest

import shallower as sh
from shallower import ScanError, StatesError
from shallower.scanning.scan_file import scan_bytes
from shallower.scanning.shards import Shards, joined
from shallower.settings.stages import ScanSettings
from shallower.values.shard import Shard
from tests.conftest import edited, mostly_slow
from tests.documents import documents

BATCH = 2


def shards_of(llama, words, texts, **options):
    positions = sh.Positions.parse(options.pop("positions", "last"))
    settings = ScanSettings(batch_size=BATCH, positions=positions, **options)
    return Shards(llama, words, texts, settings)


def parts_of(shards, count):
    return [shards.scan(Shard(index, count), progress=False) for index in range(count)]


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
def test_parts_are_joined_to_the_bytes_of_the_whole(llama, words, count, positions):
    texts = documents(75)
    texts[0] = texts[40] = texts[74] = ""
    options = {"positions": positions, "keep_samples": True}
    whole = sh.scan(llama, words, texts, batch_size=BATCH, **options)
    done = joined(parts_of(shards_of(llama, words, texts, **options), count))
    assert scan_bytes(done.contents) == scan_bytes(whole.contents)


def test_batches_are_shared_out_and_not_texts(llama, words):
    """A text that was in another batch would have other padding, and so other last bits."""
    texts = documents(70)
    shards = shards_of(llama, words, texts)
    assert shards.num_batches == 35
    found = shards.scan(Shard(1, 5), progress=False)
    assert found.sums.count == 7 * BATCH
    assert [one.num_texts for one in found.texts] == [70]


def test_an_interrupted_shard_goes_on_to_the_same_bytes(llama, words, tmp_path, monkeypatch):
    shards = shards_of(llama, words, documents(120), keep_samples=True)
    expected = scan_bytes(shards.scan(Shard(1, 2), progress=False))
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
    assert json.loads(kept[0])["done"] == 16
    done = shards.scan(Shard(1, 2), checkpoint=place, progress=False)
    assert scan_bytes(done) == expected
    with pytest.raises(ScanError, match=r"cannot go on from .*other work"):
        shards.scan(Shard(0, 2), checkpoint=place, progress=False)
    other = shards_of(edited(llama), words, documents(120), keep_samples=True)
    with pytest.raises(ScanError, match=r"cannot go on from .* with other weights"):
        other.scan(Shard(1, 2), checkpoint=place, progress=False)
    for content in (
        b"",
        b"[]",
        b'{"shard": "1/2"}',
        kept[0].replace(b'"done": 16', b'"done": "a"'),
    ):
        place.write_bytes(content)
        with pytest.raises(ScanError, match=r"cannot go on from .*delete it to start anew"):
            shards.scan(Shard(1, 2), checkpoint=place, progress=False)


def test_texts_of_which_none_can_be_compared_are_refused(llama, words):
    with pytest.raises(StatesError, match="there is nothing to compare: 2 of 2"):
        joined(parts_of(shards_of(llama, words, ["", ""]), 2))

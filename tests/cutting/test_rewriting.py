"""Checkpoints copied with some tensors changed."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import shallower as sh
from shallower.cutting import rewriting
from shallower.cutting.rewriting import StoredCheckpoint, compare, rewrite
from tests.conftest import tiny_llama
from tests.folders import full_disk
from tests.merging.merges import tensors

NAME = "model.layers.1.mlp.up_proj.weight"
SIZE = 4 * 48 * 32


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(params=["one file", "shards"])
def checkpoint(request, tmp_path):
    size = "5GB" if request.param == "one file" else "40KB"
    tiny_llama(4).save_pretrained(tmp_path / "base", max_shard_size=size)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "healing.json").write_text("{}")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1 or size == "5GB"
    return tmp_path / "base"


def negated(read):
    """A change in blocks of uneven sizes: the sign of every value."""
    for count in (12, 4000, 1000):
        values = np.frombuffer(read(count), np.float32)
        yield np.negative(values)
    yield np.negative(np.frombuffer(read(SIZE - 5012), np.float32))


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
def test_only_the_named_tensors_change(checkpoint, out, kernel, monkeypatch):
    monkeypatch.setattr(rewriting, "BLOCK_BYTES", 1000)
    if not kernel:
        monkeypatch.setattr(rewriting, "_kernel_copy", lambda *_args: 0)
    stored = StoredCheckpoint.open(checkpoint)
    _, start, stop = stored.tensors[NAME].piece
    assert stop - start == SIZE
    told = []
    rewrite(stored, out, {NAME: negated}, report=told.append)
    assert sum(told) == stored.num_bytes
    before, after = tensors(checkpoint), tensors(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], -value if name == NAME else value)
    names = {file.name for file in checkpoint.iterdir()} - {"healing.json"}
    assert {file.name for file in out.iterdir()} == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (checkpoint / name).read_bytes()

    def is_negated(was, now):
        assert np.array_equal(
            np.frombuffer(was(SIZE), np.float32), -np.frombuffer(now(SIZE), np.float32)
        )

    told.clear()
    compare(stored, out, {NAME: is_negated}, report=told.append)
    assert sum(told) == stored.num_bytes
    with pytest.raises(sh.ModelError, match="differs, where nothing was to change"):
        compare(stored, out, {})


def test_a_byte_that_changed_is_found(checkpoint, out):
    stored = StoredCheckpoint.open(checkpoint)
    rewrite(stored, out, {})
    file = sorted(out.glob("*.safetensors"))[-1]
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    with pytest.raises(sh.ModelError, match="was not written as it should be: a byte"):
        compare(stored, out, {})
    with file.open("ab") as opened:
        opened.write(b"more")
    with pytest.raises(sh.ModelError, match="it has another size"):
        compare(stored, out, {})


def test_links_of_the_hubs_cache_are_read_and_never_written_through(checkpoint, out, tmp_path):
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    rewrite(StoredCheckpoint.open(snapshot), out, {NAME: negated})
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    assert not any(file.is_symlink() for file in out.iterdir())
    planted = tmp_path / "planted"
    planted.mkdir()
    weights = next(checkpoint.glob("*.safetensors"))
    (planted / weights.name).symlink_to(blobs / weights.name)
    (planted / "config.json").symlink_to(blobs / "config.json")
    rewrite(StoredCheckpoint.open(checkpoint), planted, {NAME: negated})
    assert (blobs / weights.name).read_bytes() == before[weights.name]
    assert not any(file.is_symlink() for file in planted.iterdir())


def test_what_an_interrupted_call_left_is_written_anew(checkpoint, out):
    stored = StoredCheckpoint.open(checkpoint)

    def stops(read):
        yield read(12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(stored, out, {NAME: stops})
    assert list(out.glob("*.safetensors"))
    rewrite(stored, out, {NAME: negated})
    before, after = tensors(checkpoint), tensors(out)
    assert all(torch.equal(after[k], -v if k == NAME else v) for k, v in before.items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path, start: os.truncate(path, start + 8), "ended early"),
        (lambda path, _: os.utime(path, ns=(1, 1)), "changed while it was copied"),
    ],
)
def test_a_file_that_changes_meanwhile_is_an_error(checkpoint, out, spoil, words):
    stored = StoredCheckpoint.open(checkpoint)
    path, start, _ = stored.tensors[NAME].piece

    def change(read):
        spoil(path, start)
        yield bytes(read(SIZE))

    with pytest.raises(sh.ModelError, match=words):
        rewrite(stored, out, {NAME: change})


def test_too_few_values_are_an_error(checkpoint, out):
    with pytest.raises(sh.ModelError, match="are not as many"):
        rewrite(StoredCheckpoint.open(checkpoint), out, {NAME: lambda read: [read(8)]})


def test_a_disk_without_room_is_named(checkpoint, out, monkeypatch):
    stored = StoredCheckpoint.open(checkpoint)
    with full_disk(20_000), pytest.raises(sh.OutputError, match=r"cannot write .*\.safetensors"):
        rewrite(stored, out, {})
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(rewriting.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(sh.OutputError, match=r"MB are needed, 0.0 MB are free"):
        rewrite(stored, out, {})


def test_other_names_of_a_file_of_weights_are_left_out(checkpoint, out):
    """As the hub's cache has them for files of the same bytes."""
    stored = StoredCheckpoint.open(checkpoint)
    file = stored.tensors[NAME].piece.path.name
    (checkpoint / "z.safetensors").symlink_to(file)
    again = StoredCheckpoint.open(checkpoint)
    assert (again.files, again.tensors) == (stored.files, stored.tensors)
    rewrite(again, out, {NAME: negated})
    assert not (out / "z.safetensors").exists()
    assert torch.equal(load_file(out / file)[NAME], -load_file(checkpoint / file)[NAME])

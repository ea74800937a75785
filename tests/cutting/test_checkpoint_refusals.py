"""Damaged checkpoints, places that are taken, and full disks."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import shallower as sh
from shallower import ModelError, OutputError, ShallowerError
from shallower.processes import partial_folder
from tests.cutting.checkpoints import (
    DROPPED,
    assert_refused,
    cut_on_disk,
    edit_json,
    read_json,
)
from tests.folders import full_disk, tree
from tests.values.damage import damaged


# Damaged and hostile checkpoints.
def drop_tensor(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys() if n != name}  # noqa: SIM118
        save_file(tensors, path, {"format": "pt"})
    index = read_json(folder / "model.safetensors.index.json")
    del index["weight_map"][name]
    edit_json(folder / "model.safetensors.index.json", **index)


HARM = {
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "other weights": (
        lambda f: edit_json(f / "config.json", transformers_weights="x.safetensors"),
        "transformers_weights",
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=7),
        "lacks .*layers.6",
    ),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=5), "also has .*5"),
    "absurdly many layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=10**12),
        "counts 1000000000000 layers",
    ),
    "lacks a tensor": (
        lambda f: drop_tensor(f, "model.layers.2.mlp.up_proj.weight"),
        "layer 2 lacks the tensor mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_or_hostile_checkpoint_is_refused(copied, tmp_path, harm):
    do, words = HARM[harm]
    do(copied)
    (tmp_path / "out").mkdir()
    assert_refused(ModelError, words, copied, tmp_path / "out" / "cut")


@settings(max_examples=settings.default.max_examples // 2)
@given(st.data())
def test_a_checkpoint_damaged_anyhow_is_refused_or_cut(source, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("damaged")
    folder = shutil.copytree(source, place / "source")
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    path.write_text(json.dumps(data.draw(damaged(read_json(path)))))
    try:
        cut_on_disk(folder, DROPPED, place / "cut")
    except ShallowerError:
        assert not (place / "cut").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(ModelError, "none", tmp_path / "none", tmp_path / "cut")


# Whole or not at all.


@pytest.mark.parametrize("size", [0, "5 bananas", True, "99999999TB"])
def test_sizes_that_are_none_are_refused(source, tmp_path, size):
    assert_refused(OutputError, "size", source, tmp_path / "cut", max_shard_size=size)


def test_a_full_disk_is_told_and_the_work_goes_on(source, tmp_path):
    out = tmp_path / "cut"
    with full_disk(12_000), pytest.raises(OutputError, match="do the same again to go on"):
        sh.prune(source, DROPPED, out, max_shard_size=10_000)
    assert not out.exists()
    assert partial_folder(out).is_dir()
    sh.prune(source, DROPPED, out, max_shard_size=10_000)
    sh.prune(source, DROPPED, tmp_path / "whole", max_shard_size=10_000)
    assert tree(out) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]

"""The cut in other tools' words: mergekit's config, llama.cpp's list of layers."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.cutting.exports import EXPORT_FILES
from shallower.cutting.source import UncutModel
from shallower.values.layers import blocks_of
from tests.conftest import tiny_llama
from tests.cutting.card_tools import assert_same_weights, kept_by, stand_for, texts_of

DROPPED = [1, 3, 4]


@given(st.integers(2, 40), st.sets(st.integers(0, 39), min_size=1))
def test_other_tools_are_told_the_same_layers(num_layers, drawn):
    dropped = {layer % num_layers for layer in drawn} - {num_layers - 1} or {0}
    plan = sh.Plan(num_layers, blocks_of(sorted(dropped)))
    texts = texts_of(plan, dtype="bfloat16")
    listed = texts["prune_layers.txt"]
    assert [int(word) for word in listed.strip().split(",")] == sorted(dropped)
    assert f"--prune-layers {listed.strip()} source.gguf" in texts["README.md"]
    config = yaml.safe_load(texts["mergekit.yaml"])
    assert kept_by(config) == list(plan.survivors)
    sources = [source for part in config.pop("slices") for source in part["sources"]]
    assert {source["model"] for source in sources} == {"a/tiny"}
    assert config == {"merge_method": "passthrough", "dtype": "bfloat16"}


def test_mergekit_is_told_a_hub_id_or_a_placeholder():
    plan = sh.Plan(6, (sh.Block(0, 1), sh.Block(3, 5)))
    for source, place in (
        (UncutModel("a/tiny", hub="a/tiny"), "a/tiny"),
        (UncutModel("tiny"), "SOURCE"),
        (UncutModel("tiny.gguf", gguf="tiny.gguf"), "SOURCE"),
        (UncutModel("tiny.gguf", hub="a/tiny-GGUF", gguf="tiny.gguf"), "SOURCE"),
    ):
        text = texts_of(plan, source)["mergekit.yaml"]
        models = {part["sources"][0]["model"] for part in yaml.safe_load(text)["slices"]}
        assert models == {place}
        assert text.startswith("# SOURCE stands for") == (place == "SOURCE")
        assert ("mergekit reads no GGUF file" in text) == (source.gguf is not None)


def test_mergekit_makes_the_same_cut(tmp_path, words):
    """Where mergekit is installed, which the tests do not ask for."""
    pytest.importorskip("mergekit.scripts.run_yaml")
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "tiny")
    words.save_pretrained(tmp_path / "tiny")
    sh.prune(tmp_path / "tiny", DROPPED, tmp_path / "cut")
    place = stand_for(tmp_path / "place", tmp_path / "tiny")
    code = "from mergekit.scripts.run_yaml import main; main()"
    # Its card asks the hub whether SOURCE is a repository.
    words = ["--no-write-model-card", tmp_path / "cut" / "mergekit.yaml", "merged"]
    subprocess.run([sys.executable, "-c", code, *words], cwd=place, check=True)
    assert_same_weights(place / "merged", tmp_path / "cut")


def test_what_is_quantised_has_no_dtype_in_mergekit():
    plan = sh.Plan(6, (sh.Block(1, 2),))
    assert "dtype" not in yaml.safe_load(texts_of(plan, dtype="nf4")["mergekit.yaml"])


def test_a_plan_of_other_layers_is_not_saved_beside_a_model(llama, tmp_path):
    plan = sh.Plan(6, (sh.Block(1, 3),))
    with pytest.raises(sh.PlanError, match="leaves 4 layers, and the model has 6"):
        sh.save_model(llama, None, tmp_path / "cut", plan=plan)
    assert list(tmp_path.iterdir()) == []
    sh.save_model(llama, None, tmp_path / "whole")
    assert not set(EXPORT_FILES) & {path.name for path in (tmp_path / "whole").iterdir()}

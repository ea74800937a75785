"""How a card and other tools name the uncut model: by its hub id or own name, never by a path."""

import re
import shlex
import subprocess
import sys

import gguf
import pytest
import yaml
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.cutting.exports import EXPORT_FILES
from shallower.cutting.source import FILE_TYPES, UncutModel, find_source, hub_id
from shallower.values.layers import blocks_of
from tests.conftest import tiny_llama
from tests.cutting.card_tools import (
    LICENSED,
    assert_same_weights,
    blocks_of_code,
    front,
    hub,
    kept_by,
    stand_for,
    texts_of,
)
from tests.cutting.gguf_files import write

__all__ = ["hub"]


def test_a_hub_id_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hub_id("org/name-1.5B_x") == "org/name-1.5B_x"
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("/srv/hub/models--org--name/snapshots/0123") == "org/name"
    assert hub_id("models--gpt2/snapshots/0123") == "gpt2"
    for source in ("org/here", "./name", "/org/name", "a/b/c", "tiny.gguf", "", "a b"):
        assert hub_id(source) is None


def test_a_folder_that_is_gone_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert find_source("models/tiny") == UncutModel("tiny")
    assert find_source("models/tiny", from_hub=True).hub == "models/tiny"
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "whole" / "LICENSE").write_text("Do as you like.")
    (tmp_path / "whole" / "README.md").write_text(LICENSED)
    snapshot = hub(tmp_path / "whole", "models/tiny")
    for named in ("models/tiny", snapshot):
        found = find_source(named)
        assert (found.name, found.hub, found.place) == ("models/tiny",) * 3
        assert found.inherited["license"] == "other"
        assert found.licenses == {"LICENSE": snapshot / "LICENSE"}


def test_a_folder_goes_by_its_own_name(tmp_path, monkeypatch):
    place = tmp_path / "tiny"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place)
    for named in (".", "./", str(place), place, "../tiny", "../link", "../tiny/."):
        found = find_source(named)
        assert (found.name, found.hub, found.place, found.gguf) == ("tiny", None, "SOURCE", None)


def test_a_gguf_file_goes_by_its_own_name(tmp_path, monkeypatch, hub):
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    write(tmp_path / "files" / "tiny.gguf")
    snapshot = hub(tmp_path / "files", "a/tiny-GGUF")
    for named, more in (
        ("tiny.gguf", {}),
        ("./tiny.gguf", {}),
        (tmp_path / "files" / "tiny.gguf", {}),
        (tmp_path / "files", {"gguf_file": "tiny.gguf"}),
    ):
        found = find_source(named, **more)
        assert (found.name, found.gguf, found.place) == ("tiny.gguf", "tiny.gguf", "SOURCE")
    for named, more in (
        ("a/tiny-GGUF", {"gguf_file": "tiny.gguf"}),
        (snapshot / "tiny.gguf", {}),
        (snapshot, {"gguf_file": "tiny.gguf"}),
    ):
        found = find_source(named, **more)
        assert (found.name, found.gguf, found.place) == ("tiny.gguf", "tiny.gguf", "a/tiny-GGUF")


def test_what_is_a_license_is_carried_and_nothing_else(tmp_path):
    for name in ("LICENSE", "license.md", "LICENCE-MIT", "NOTICE", "COPYING.txt", "USE_POLICY.md"):
        (tmp_path / name).write_text(name)
    for name in ("licensed.py", "notices", "README.md", "license_plates.txt.exe.d"):
        (tmp_path / name).mkdir()
    (tmp_path / "LICENSE.huge").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "LICENSE.secret").symlink_to("/etc/hostname")
    (tmp_path / "LICENSE.link").symlink_to("LICENSE")
    found = find_source(tmp_path).licenses
    expected = {"LICENSE", "license.md", "LICENCE-MIT", "NOTICE", "COPYING.txt", "USE_POLICY.md"}
    assert set(found) == expected | {"LICENSE.link"}


def test_a_gguf_file_tells_its_license_languages_and_quantisation(tmp_path):
    text = GGUFValueType.STRING
    array = GGUFValueType.ARRAY
    source = write(
        tmp_path / "tiny.gguf",
        extra=[
            ("general.license", "apache-2.0", text, None),
            ("general.license.name", "own", text, None),
            ("general.license.link", "https://a/b", text, None),
            ("general.languages", ["en", "fr"], array, text),
            ("general.tags", ["text", "shallower"], array, text),
            ("general.base_model.0.repo_url", "https://huggingface.co/its/base", text, None),
            ("general.file_type", 15, GGUFValueType.UINT32, None),
        ],
    )
    sh.prune(source, [1], tmp_path / "cut.gguf")
    card = (tmp_path / "cut.README.md").read_text()
    assert front(card) == {
        "base_model": "its/base",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "license_name": "own",
        "license_link": "https://a/b",
        "language": ["en", "fr"],
        "tags": ["text", "shallower", "layer-pruning"],
    }
    assert "cut out of `tiny.gguf` (Q4_K_M)." in card
    (tmp_path / "tiny.README.md").write_text("---\nlicense: mit\n---\n")
    sh.prune(source, [1], tmp_path / "cut.gguf", overwrite=True)
    assert front((tmp_path / "cut.README.md").read_text())["license"] == "mit"


@pytest.mark.parametrize(
    ("key", "value", "kind", "sub"),
    [
        ("general.license", 7, GGUFValueType.UINT32, None),
        ("general.license", "x" * 5000, GGUFValueType.STRING, None),
        ("general.languages", [1, 2], GGUFValueType.ARRAY, GGUFValueType.UINT32),
        ("general.languages", ["en"] * 1025, GGUFValueType.ARRAY, GGUFValueType.STRING),
        ("general.file_type", 99, GGUFValueType.UINT32, None),
        ("general.file_type", "Q8_0", GGUFValueType.STRING, None),
        ("general.base_model.0.repo_url", "https://a.b/c/d", GGUFValueType.STRING, None),
    ],
)
def test_what_a_gguf_file_tells_amiss_is_left_out(tmp_path, key, value, kind, sub):
    source = write(tmp_path / "tiny.gguf", extra=[(key, value, kind, sub)])
    sh.prune(source, [1], tmp_path / "cut.gguf")
    card = (tmp_path / "cut.README.md").read_text()
    assert "cut out of `tiny.gguf`." in card
    assert set(front(card)) == {"library_name", "pipeline_tag", "tags"}


def test_every_quantisation_of_gguf_has_its_name():
    """A newer gguf with a new file type fails here, so that somebody adds it."""
    theirs = {
        kind.value: kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in gguf.LlamaFileType
        if kind is not gguf.LlamaFileType.GUESSED
    }
    ours = {number: name for number, name in enumerate(FILE_TYPES) if name}
    assert ours == theirs


@pytest.mark.parametrize(
    "name", ["a b", "it's", "a|b", "ä 三", "--drop", "a: b", "- a", "#a", "a\nb", "$(touch x)"]
)
def test_odd_names_break_nothing(name):
    plan = sh.Plan(6, (sh.Block(0, 1), sh.Block(3, 5)), versions={name: name})
    source = UncutModel(name, gguf=name)
    texts = texts_of(plan, source, gguf=name + ".gguf")
    card = texts["README.md"]
    command, _serve, others = blocks_of_code(card, "sh")
    words = ["shallower", "prune", "SOURCE", "--drop", "0,3:5", "--gguf-file", name]
    assert shlex.split(command) == [*words, "--out", name + ".gguf"]
    assert shlex.split(others)[1] == name + ".mergekit.yaml"
    config = yaml.safe_load(texts["mergekit.yaml"])
    assert config["slices"][0]["sources"][0]["model"] == "SOURCE"
    assert front(card)["library_name"] == "gguf"
    inline = " ".join(name.split()).replace("|", "\\|")
    assert f"# {inline} without layers [0, 1) [3, 5)\n" in card
    (row,) = re.findall(r"^\| made with \| (.*) \|$", card, re.MULTILINE)
    assert row.replace("\\|", "|") == " ".join(f"{name} {name}".split())
    hub = UncutModel(name, hub=name)
    assert shlex.split(blocks_of_code(texts_of(plan, hub)["README.md"], "sh")[0])[2] == name
    config = yaml.safe_load(texts_of(plan, hub)["mergekit.yaml"])
    assert config["slices"][0]["sources"][0]["model"] == name


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

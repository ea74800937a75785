"""How a card names the uncut model: by its hub id or its own name, never by a path."""

import re
import shlex

import gguf
import pytest
import yaml
from gguf import GGUFValueType

import shallower as sh
from shallower.cutting.source import FILE_TYPES, UncutModel, find_source, hub_id
from tests.cutting.card_tools import LICENSED, blocks_of_code, front, hub, texts_of
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

"""The zoo: its recipes are short, its page has their records, and records are made again."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.cli.results import sealed
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benches"))
zoo = import_module("zoo")
RECIPES = [zoo.Recipe.load(path) for path in sorted(zoo.ZOO.glob("*.yaml"))]
EMBEDDED = [one for one in RECIPES if one.model == zoo.EMBEDDED]
OF_A_CARD = [one for one in RECIPES if one.gpu]


def test_the_page_has_the_rows_of_all_recipes():
    page = zoo.PAGE.read_text()
    assert zoo.page(RECIPES, page) == page
    assert len(EMBEDDED) == 2
    assert len(OF_A_CARD) == 3
    for one in OF_A_CARD:
        assert one.published
        assert one.config


def test_recipes_are_of_ten_lines():
    for path in zoo.ZOO.glob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 12, path.name


def test_records_are_of_their_recipes():
    for one in RECIPES:
        results = {
            Path(zoo.option(one.words(command, zoo.ZOO), "--out")).stem for command in one.commands
        }
        assert {path.stem for path in one.records.glob("*.json")} <= results
    for one in EMBEDDED:
        record = json.loads((one.records / "cut.json").read_text())
        assert set(record["read"]) == {"model"}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The zoo with records of its own, in a cache of its own and without texts."""
    for path in zoo.ZOO.rglob("*.*"):
        if path.is_file():
            copy = tmp_path / "zoo" / path.relative_to(zoo.ZOO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    monkeypatch.delenv("SHALLOWER_DATA", raising=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EMBEDDED, ids=lambda one: one.name)
def test_a_cut_is_made_again_to_the_byte(kept, capfd, recipe):
    assert zoo.make(recipe, kept / "work")
    told = capfd.readouterr().out
    assert "prune, again" in told
    assert "the same: " in told
    assert "waits for texts: name their folder by SHALLOWER_DATA" in told
    # A record is kept once it is made, and one of other bytes is told of.
    path = recipe.records / "cut.json"
    record = json.loads(path.read_text())
    path.unlink()
    assert zoo.make(recipe, kept / "work")
    capfd.readouterr()
    assert json.loads(path.read_text())["files"]["cut.gguf"] == record["files"]["cut.gguf"]
    record["files"]["cut.gguf"] = "0" * 64
    path.write_text(sealed(record))
    assert not zoo.make(recipe, kept / "work")
    assert "cut.gguf has other bytes" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OF_A_CARD, ids=lambda one: one.name)
def test_what_waits_for_a_card_is_planned_within_its_memory(kept, capfd, monkeypatch, recipe):
    texts = kept / "data" / "text"
    texts.mkdir(parents=True)
    for name in ("c4", "c4_eval"):
        rows = [json.dumps({"text": f"text {i} of {name}"}) + "\n" for i in range(64)]
        (texts / f"{name}.jsonl").write_text("".join(rows))
    (texts / "wikitext2_test.txt").write_text("Some words. " * 99)
    monkeypatch.setenv("SHALLOWER_DATA", str(kept / "data"))
    assert zoo.plan(recipe, kept / "work")
    told = capfd.readouterr().out
    assert "of 80.0 GB" in told
    assert "does not fit" not in told
    assert zoo.make(recipe, kept / "work")
    assert f"waits for a GPU of {recipe.gpu}" in capfd.readouterr().out

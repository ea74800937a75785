"""Every command of the cards of patches, adapters and merged models, carried out."""

import re

import pytest

import shallower as sh
from tests import examples
from tests.cutting.card_tools import (
    assert_same_weights,
    blocks_of_code,
    check_other_tools,
    cut_by,
    front,
    stand_for,
    tell_no_paths,
    ways,
)

SURVIVORS = [0, 1, 4, 5]


def run_blocks(card, folder, monkeypatch):
    """Run what a card says of loading."""
    monkeypatch.chdir(folder)
    loaded = {}
    exec(blocks_of_code(card, "python")[-1], loaded)
    return loaded["model"]


def test_a_card_of_adapters(cut, healed, tmp_path, monkeypatch, shallower):
    out, _ = healed
    card = (out / "README.md").read_text()
    assert front(card)["base_model_relation" if "base_model" in front(card) else "library_name"]
    assert "# Healing of cut\n" in card
    assert str(cut) not in card
    model = run_blocks(card, out, monkeypatch)
    assert model.get_base_model().config.num_hidden_layers == len(SURVIVORS)
    (line,) = re.findall(r"`(shallower merge [^`]*)`", card)
    assert line == "shallower merge . --out healed"
    cut_by(line.replace("healed", str(tmp_path / "healed")), shallower)
    assert (tmp_path / "healed" / "model.safetensors").is_file()


def test_a_card_of_a_merged_model(both, healed, tmp_path, monkeypatch, shallower):
    whole, cut = both
    out, _ = healed
    merged = tmp_path / "merged"
    sh.merge(out, merged)
    card = (merged / "README.md").read_text()
    assert front(card) == front((cut / "README.md").read_text())
    assert "**This model is healed**" in card
    assert "## Making the cut again\n" in card
    tell_no_paths(merged, whole, cut)
    assert (merged / "LICENSE").read_text() == (out / "LICENSE").read_text() == "Do as you like."
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, whole))
        make()
        assert_same_weights("cut", cut)
    check_other_tools(card, merged, SURVIVORS)
    assert run_blocks(card, merged, monkeypatch).config.num_hidden_layers == len(SURVIVORS)


@pytest.fixture(scope="module")
def patched(tmp_path_factory, words):
    """A model that has learned something, its scan, and the folder of its patched cut."""
    folder = tmp_path_factory.mktemp("patched")
    examples.learned_llama(words, 8).save_pretrained(folder / "whole")
    words.save_pretrained(folder / "whole")
    model, tokenizer = sh.load_model(folder / "whole", dtype="float32")
    scan = sh.scan(model, tokenizer, examples.sentences(32, seed=1))
    plan = scan.plan(2)
    done = sh.patch(model, tokenizer, plan, texts=examples.sentences(200, seed=1))
    sh.save_patched(model, tokenizer, folder / "cut", done=done)
    return folder, plan


def test_a_card_of_a_patch(patched, tmp_path, monkeypatch, shallower):
    folder, plan = patched
    card = (folder / "cut" / "README.md").read_text()
    assert "**This model is healed**" in card
    tell_no_paths(folder / "cut", folder)
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, folder / "whole"))
        make()
        assert (tmp_path / name / "cut" / "model.safetensors").is_file()
    check_other_tools(card, folder / "cut", plan.survivors)
    assert run_blocks(card, folder / "cut", monkeypatch).config.num_hidden_layers == 6


def test_a_patch_keeps_score_metric_texts_and_strategy(patched):
    folder, plan = patched
    (block,) = plan.blocks
    saved = sh.Plan.load(folder / "cut" / "shallower_plan.json")
    assert (saved, saved.blocks[0].score) == (plan, block.score)
    card = (folder / "cut" / "README.md").read_text()
    assert f"| removed | {block}, angular distance {block.score:.4f} ± {block.stderr:.4f} |" in card
    assert "| why | similarity: " in card
    assert "| calibration | 32 texts of at most 256 tokens |" in card

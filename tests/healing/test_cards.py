"""Every command of the cards of patches, adapters and merged models, carried out."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import shallower as sh
from tests import examples
from tests.conftest import write_jsonl
from tests.cutting.card_tools import (
    assert_same_weights,
    blocks_of_code,
    check_other_tools,
    cut_by,
    front,
    history,
    one_line,
    stand_for,
    tell_no_paths,
    ways,
)
from tests.healing.cuts import BLOCK, HELD_OUT, QUICK, TEXTS

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
    shutil.copytree(out, tmp_path / "adapters")
    monkeypatch.chdir(tmp_path / "adapters")
    cut_by(line, shallower)
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
    *cut_steps, healing = history(card)
    assert cut_steps == history((cut / "README.md").read_text())
    assert healing.startswith("low-rank adapters were trained and merged into its weights; loss of")
    tell_no_paths(merged, whole, cut)
    assert (merged / "LICENSE").read_text() == (out / "LICENSE").read_text() == "Do as you like."
    for name, make in ways(card, shallower).items():
        monkeypatch.chdir(stand_for(tmp_path / name, whole))
        make()
        assert_same_weights("cut", cut)
    check_other_tools(card, merged, SURVIVORS)
    assert run_blocks(card, merged, monkeypatch).config.num_hidden_layers == len(SURVIVORS)


def test_a_healing_is_made_again_by_its_card_to_the_last_digit(
    both, tmp_path, monkeypatch, shallower
):
    whole, cut = both[0], tmp_path / "pruned" / "cut"
    sh.prune(whole, [BLOCK], cut)
    texts, held_out = (
        write_jsonl(tmp_path / f"{name}.jsonl", some)
        for name, some in (("some", TEXTS), ("others", HELD_OUT))
    )
    done = shallower(
        "heal", cut, "--texts", texts, "--eval-texts", held_out, "--original", whole, "--merge",
        "--out", tmp_path / "first", "--steps", "2", "--rank", "4", "--learning-rate", "1e-2",
        "--max-length", "16", "--dtype", "float32", "--eval-every", "1", "--no-attention",
    )  # fmt: skip
    assert done.status == 0, done.err
    card = (tmp_path / "first" / "README.md").read_text()
    assert "| held-out loss | not measured; `shallower eval` measures it |" in card
    assert re.search(r"\| loss of the selection set \| [\d.]+ ± [\d.]+ before ", card)
    monkeypatch.chdir(stand_for(tmp_path / "again", whole))
    for block in blocks_of_code(card, "sh")[:2]:
        cut_by(block, shallower, TEXTS=texts, EVAL_TEXTS=held_out)
    assert Path("healed", "README.md").read_text() == card
    assert_same_weights("healed", tmp_path / "first")


def test_a_merged_model_has_the_loss_that_eval_finds(cut, tmp_path, shallower):
    """Trained in bfloat16, stored in float32: the loss is that of what is stored."""
    recipe = replace(QUICK, dtype="bfloat16")
    done = sh.heal(
        cut, TEXTS, tmp_path / "healed", recipe=recipe, eval_texts=HELD_OUT, merge=True
    )  # fmt: skip
    texts = write_jsonl(tmp_path / "others.jsonl", HELD_OUT)
    found = shallower(
        "eval", tmp_path / "healed", "--texts", texts, "--max-length", "16", "--dtype", "float32",
        "--json",
    )  # fmt: skip
    assert found.json["base"]["nats"] == pytest.approx(done.merge.loss.nats, abs=1e-7)
    assert done.merge.loss.nats != pytest.approx(done.after.nats, abs=1e-7)


@pytest.fixture(scope="module")
def patched(tmp_path_factory, words):
    """A model that has learned something, its scan, and the folder of its patched cut."""
    folder = tmp_path_factory.mktemp("patched")
    examples.learned_llama(words, 5).save_pretrained(folder / "whole")
    words.save_pretrained(folder / "whole")
    model, tokenizer = sh.load_model(folder / "whole", dtype="float32")
    scan = sh.scan(model, tokenizer, examples.sentences(32, seed=1))
    plan = scan.plan(2)
    done = sh.patch(model, tokenizer, plan, texts=examples.sentences(80, seed=1))
    sh.save_patched(model, tokenizer, folder / "cut", done=done)
    return folder, plan


def test_a_card_of_a_patch(patched, tmp_path, monkeypatch, shallower):
    folder, plan = patched
    card = (folder / "cut" / "README.md").read_text()
    assert "**This model is healed**" in card
    tell_no_paths(folder / "cut", folder)
    again = shlex.split(one_line(blocks_of_code(card, "sh")[0]))
    assert again[:3] == ["shallower", "patch", "SOURCE"]
    assert "--eval-texts" not in again  # nothing was measured
    check_other_tools(card, folder / "cut", plan.survivors)
    assert run_blocks(card, folder / "cut", monkeypatch).config.num_hidden_layers == 3


def test_a_patch_is_made_again_by_its_card_to_the_last_digit(
    patched, tmp_path, monkeypatch, shallower
):
    """The card is the same, losses and all, and so are the weights."""
    folder, plan = patched
    texts = write_jsonl(tmp_path / "some.jsonl", examples.sentences(96, seed=3))
    others = [text for text in examples.sentences(40, seed=4) if text not in texts.read_text()]
    held_out = write_jsonl(tmp_path / "others.jsonl", others)
    drop = ",".join(map(str, plan.dropped))
    done = shallower(
        "patch", folder / "whole", "--drop", drop, "--texts", texts, "--eval-texts", held_out,
        "--out", tmp_path / "first", "--max-length", "12", "--num-tokens", "900",
        "--dtype", "float32",
    )  # fmt: skip
    assert done.status == 0, done.err
    card = (tmp_path / "first" / "README.md").read_text()
    assert re.search(r"\| held-out loss \| [\d.]+ ± [\d.]+ → [\d.]+ ± ", card)
    monkeypatch.chdir(stand_for(tmp_path / "again", folder / "whole"))
    cut_by(blocks_of_code(card, "sh")[0], shallower, TEXTS=texts, EVAL_TEXTS=held_out)
    named = Path("cut", "README.md").read_text().replace("| source | SOURCE", "| source | whole")
    assert named == card
    assert_same_weights("cut", tmp_path / "first")

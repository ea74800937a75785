"""Healing that starts from a patch."""

import json

import pytest
import torch

import shallower as sh
from shallower.healing.losses import summed_loss
from shallower.texts.sequences import collate, read_samples
from tests.conftest import tiny_llama, write_jsonl
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, documents, save_cut


# From a patch
@pytest.fixture(scope="module")
def patchable(words, tmp_path_factory):
    """A tiny model that was trained a little, so that a patch has something to gain."""
    model = tiny_llama(6, seed=3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    samples = read_samples(words, TEXTS, 16, True, 10**6)
    for step in range(60):
        rows = [samples.rows[i % len(samples)] for i in range(8 * step, 8 * step + 8)]
        batch = {name: torch.from_numpy(values) for name, values in collate(rows)}
        loss = summed_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / 120
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return save_cut(tmp_path_factory.mktemp("patchable"), model, words)


def test_healing_starts_from_the_patch(patchable, tmp_path):
    whole, cut = patchable
    texts = documents(600, 5)
    plain = sh.heal(cut, texts, tmp_path / "plain", QUICK, HELD_OUT)
    options = {"original": whole, "from_patch": True}
    record = sh.heal(cut, texts, tmp_path / "adapters", QUICK, HELD_OUT, **options)
    assert record.before.nats < plain.before.nats
    assert record.cut.nats == pytest.approx(plain.before.nats, abs=1e-6)
    came_back = record.cut.nats - record.after.nats
    assert record.recovered == came_back / (record.cut.nats - record.original.nats)
    patched = tmp_path / "adapters" / "patched"
    model, tokenizer = sh.load_model(patched, dtype="float32")
    loss = sh.evaluate_loss(model, tokenizer, HELD_OUT, max_length=16)
    assert record.before.nats == pytest.approx(loss.nats, abs=1e-5)
    kept = json.loads((tmp_path / "adapters" / "shallower_patch.json").read_text())
    assert kept["format"] == "shallower.patch"
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(patched)
    merged = sh.heal(cut, texts, tmp_path / "merged", QUICK, HELD_OUT, merge=True, **options)
    assert merged.merge.loss.nats == pytest.approx(record.after.nats, abs=1e-4)
    later = sh.merge(tmp_path / "adapters", tmp_path / "later")
    assert later.merge.difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapters", "later", "merged", "plain",
    ]  # fmt: skip
    with pytest.raises(sh.RecipeError, match="is patched already"):
        sh.heal(patched, texts, tmp_path / "again", QUICK, **options)


@pytest.mark.parametrize("why_not", [None, "the patch does not help", "7 texts are too few"])
def test_a_run_patches_and_heals(patchable, shallower, tmp_path, why_not, monkeypatch):
    from shallower.healing import patched

    def refuse(*_args, **_options):
        raise sh.PatchError(why_not)

    texts = documents(600, 5)
    if why_not and why_not.startswith("7"):
        texts = [" ".join(texts[start::7]) for start in range(7)]
    elif why_not:
        monkeypatch.setattr(patched, "patch", refuse)
    for name, passages in (("texts", texts), ("held_out", HELD_OUT)):
        write_jsonl(tmp_path / f"{name}.jsonl", passages)
    done = shallower(
        "run", patchable[0], "--texts", tmp_path / "texts.jsonl", "--eval-texts",
        tmp_path / "held_out.jsonl", "--out", tmp_path / "out", "--n", "1,2", "--dtype", "float32",
        "--heal", "--heal-steps", "6", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    helps = why_not is None
    assert ("healed from the cut, without a patch" in done.err) is not helps
    assert helps or f"without a patch: {why_not}" in done.err
    report = done.json
    healing = report["healing"]
    assert (healing["cut"] is not None) is helps
    assert healing["recipe"]["steps"] == 6
    cut, before = report["cuts"][-2]["loss"]["nats"], healing["held_out"][0]["nats"]
    assert before < cut - 0.02 if helps else before == pytest.approx(cut, abs=1e-4)
    assert healing["held_out"][-1]["nats"] < before
    assert healing["merge"]["difference"] < 1e-5
    assert (tmp_path / "out" / "healed" / "shallower_patch.json").is_file() is helps
    model, _ = sh.load_model(tmp_path / "out" / "healed", dtype="float32")
    assert model.config.num_hidden_layers == 4


def test_a_run_that_cannot_heal_does_nothing(patchable, shallower, tmp_path):
    for name, texts in (("texts", documents(2, 5)), ("held_out", HELD_OUT)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    done = shallower(
        "run", patchable[0], "--texts", tmp_path / "texts.jsonl", "--eval-texts",
        tmp_path / "held_out.jsonl", "--out", tmp_path / "out", "--n", "1", "--heal",
    )  # fmt: skip
    assert "2 texts make 0 sequences" in done.error
    assert "one step takes 16: give more texts" in done.error
    assert not (tmp_path / "out").exists()


def test_a_patch_is_made_once(patchable, tmp_path, monkeypatch):
    from shallower.healing import heal, patched

    whole, cut = patchable
    texts = documents(600, 5)
    options = {"original": whole, "from_patch": True}
    monkeypatch.setattr(heal, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sh.heal(cut, texts, tmp_path / "out", QUICK, HELD_OUT, **options)
    monkeypatch.undo()
    monkeypatch.setattr(patched, "patch", lambda *_args, **_options: pytest.fail("patched again"))
    sh.heal(cut, texts, tmp_path / "out", QUICK, HELD_OUT, **options)
    with pytest.raises(pytest.fail.Exception):
        sh.heal(cut, texts[1:], tmp_path / "other", QUICK, HELD_OUT, **options)


def test_a_patch_needs_the_uncut_model_and_texts_twice(cut, both, tmp_path):
    with pytest.raises(sh.RecipeError, match="a patch needs the uncut model"):
        sh.heal(cut, TEXTS, tmp_path / "out", QUICK, from_patch=True)
    with pytest.raises(sh.TextsError, match="read twice"):
        sh.heal(cut, iter(TEXTS), tmp_path / "out", QUICK, original=both[0], from_patch=True)
    assert list(tmp_path.iterdir()) == []

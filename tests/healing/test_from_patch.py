"""Healing that starts from a patch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import shallower as sh
from shallower.healing import heal as healing
from shallower.healing import job as jobs
from shallower.patching import descent
from shallower.results.healing import Healing
from tests.conftest import mostly_slow
from tests.healing.cuts import HELD_OUT, MANY, QUICK, TEXTS, documents


@pytest.fixture(autouse=True, scope="module")
def few_steps():
    """A patch is solved, and its descent is short."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(descent, "STEPS", 4)
        yield


# From a patch
@pytest.mark.slow
def test_healing_starts_from_the_patch(patchable, tmp_path):
    whole, cut = patchable
    texts = documents(MANY, 5)
    plain = sh.heal(cut, texts, tmp_path / "plain", recipe=QUICK, eval_texts=HELD_OUT)
    options = {"original": whole, "from_patch": True}
    record = sh.heal(
        cut, texts, tmp_path / "adapters", recipe=QUICK, eval_texts=HELD_OUT, **options
    )
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
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in patched.iterdir())
    assert "# Healing of patched\n" in (tmp_path / "adapters" / "README.md").read_text()
    merged = sh.heal(
        cut, texts, tmp_path / "merged", recipe=QUICK, eval_texts=HELD_OUT, merge=True, **options
    )
    assert merged.merge.loss.nats == pytest.approx(record.after.nats, abs=1e-4)
    later = sh.merge(tmp_path / "adapters", tmp_path / "later")
    assert later.merge.difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapters", "later", "merged", "plain",
    ]  # fmt: skip
    with pytest.raises(sh.RecipeError, match="is patched already"):
        sh.heal(patched, texts, tmp_path / "again", recipe=QUICK, **options)


def test_a_patch_is_made_once(patchable, tmp_path, monkeypatch):
    whole, cut = patchable
    texts = documents(MANY, 5)
    options = {"original": whole, "from_patch": True, "recipe": replace(QUICK, steps=2)}
    monkeypatch.setattr(healing, "train", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sh.heal(cut, texts, tmp_path / "out", **options)
    monkeypatch.undo()
    again = lambda *_args, **_options: pytest.fail("patched again")  # noqa: E731
    monkeypatch.setattr(jobs, "with_patch", again)
    sh.heal(cut, texts, tmp_path / "out", **options)
    with pytest.raises(pytest.fail.Exception):
        sh.heal(cut, texts[1:], tmp_path / "other", **options)


@pytest.fixture
def counted(monkeypatch):
    """What heal loads and measures, in order."""
    done = []
    load, evaluate = jobs.ModelSource.load, healing.measure_loss

    def load_counted(source, _progress=None):
        done.append(f"load {Path(source.path).name.split('.')[-1]}")
        return load(source)

    def evaluate_counted(*args, description, **options):
        done.append(description)
        return evaluate(*args, description=description, **options)

    monkeypatch.setattr(jobs.ModelSource, "load", load_counted)
    monkeypatch.setattr(healing, "measure_loss", evaluate_counted)
    return done


@pytest.mark.slow
def test_a_healing_from_a_patch_loads_and_measures_once(patchable, tmp_path, counted, monkeypatch):
    """The uncut model for the patch and both losses; and nothing again after a kill."""
    whole, cut = patchable
    given = cut, documents(MANY, 5), tmp_path / "out"
    options = {"recipe": QUICK, "eval_texts": HELD_OUT, "original": whole, "from_patch": True}
    monkeypatch.setattr(healing, "write_adapters", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sh.heal(*given, **options)
    held_out = ["loss, held out"] * 4
    assert counted == ["load whole", "loss, unpatched", "loss, uncut", "load patched", *held_out]
    counted.clear()
    monkeypatch.setattr(healing, "write_adapters", jobs.write_adapters)
    record = sh.heal(*given, **options)
    assert counted == ["load patched"]
    again = sh.heal(*given[:2], tmp_path / "again", **options)
    assert (again.cut, again.original, again.held_out) == (
        record.cut, record.original, record.held_out,
    )  # fmt: skip
    assert not (tmp_path / "out" / "losses.json").exists()


def test_losses_on_other_tokens_are_refused(cut, tmp_path):
    model, tokenizer = sh.load_model(cut, dtype="float32")
    loss = sh.evaluate_loss(model, tokenizer, HELD_OUT, max_length=8)
    with pytest.raises(
        sh.TextsError, match=r"on \d+ tokens, and .* measure them with max_length=16"
    ):
        sh.heal(
            cut, TEXTS, tmp_path / "out", recipe=QUICK, eval_texts=HELD_OUT, losses=(None, loss)
        )
    with pytest.raises(sh.RecipeError, match="losses without eval_texts"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=QUICK, losses=(None, loss))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("merge", mostly_slow([False, True], quick=[True]))
def test_the_patch_is_kept_where_training_makes_it_worse(patchable, tmp_path, merge):
    whole, cut = patchable
    recipe = replace(QUICK, learning_rate=10.0, warmup_steps=0, steps=2)
    with pytest.warns(UserWarning, match=r"no step .* was better than the patch: .* patched cut"):
        record = sh.heal(
            cut, documents(MANY, 5), tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT,
            original=whole, from_patch=True, merge=merge,
        )  # fmt: skip
    assert (record.best_step, record.merge) == (0, None)
    assert record.before == record.after
    assert record.recovered > 0
    assert Healing.load(tmp_path / "out").to_json() == record.to_json()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "shallower_patch.json", "shallower_plan.json"} < names
    assert not names & {"job", "patched", "adapter_config.json", "losses.json"}
    assert "solved anew by least squares" in (tmp_path / "out" / "README.md").read_text()
    model, tokenizer = sh.load_model(tmp_path / "out", dtype="float32")
    loss = sh.evaluate_loss(model, tokenizer, HELD_OUT, max_length=16)
    assert loss.nats == pytest.approx(record.before.nats, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(sh.ModelError, match="nothing to merge"):
        sh.merge(tmp_path / "out", tmp_path / "merged")


def test_a_patched_cut_is_copied_with_its_folders_and_without_its_job(tmp_path):
    (tmp_path / "patched" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "patched" / "job").write_text("this one")
    (tmp_path / "patched" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (tmp_path / "out").mkdir()
    jobs.copy_patched(tmp_path / "patched", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["additional_chat_templates"]
    template = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    assert template.read_text() == "{{ tools }}"


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "nf4"], quick=["bfloat16"]))
def test_the_unpatched_cut_is_measured_as_if_it_were_loaded(patchable, tmp_path, dtype, words):
    """Without its layers, the uncut model in the dtype of the training is the cut."""
    whole, _ = patchable
    model, _ = sh.load_model(whole, dtype="bfloat16")
    sh.save_model(model, words, tmp_path / "whole")
    sh.save_model(model, words, tmp_path / "cut", plan=sh.drop_layers(model, [range(2, 4)]))
    texts = documents(MANY, 5)
    recipe = replace(QUICK, dtype=dtype, steps=1)
    options = {"recipe": recipe, "eval_texts": HELD_OUT}
    plain = sh.heal(tmp_path / "cut", texts, tmp_path / "plain", **options)
    options |= {"original": tmp_path / "whole", "from_patch": True}
    record = sh.heal(tmp_path / "cut", texts, tmp_path / "patched", **options)
    assert record.cut == plain.before

"""The stages joined."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower import Scan, TextsError
from shallower.models.source import ModelSource
from shallower.runs.run import continue_text
from shallower.values.files import PARTIAL_FILE
from tests.documents import (
    HELD_OUT,
    TEXTS,
    Unread,
    assert_same,
    broken_after,
    documents,
    once,
    state_of,
)
from tests.healing.cuts import QUICK
from tests.healing.cuts import documents as progressions


# The whole way.
def test_a_run_leaves_what_the_stages_give(llama, words, tmp_path):
    before = state_of(llama)
    done = sh.run(
        llama, words, once(TEXTS), eval_texts=once(HELD_OUT), out=tmp_path / "out", sizes=[2, 1]
    )
    assert_same(before, state_of(llama))

    scanned = sh.scan(llama, words, TEXTS)
    assert (done.scan.mean() == scanned.mean()).all()
    assert done.plan == scanned.plan(2)
    assert done.comparison == sh.compare_cuts(llama, words, scanned, texts=HELD_OUT, sizes=[2, 1])
    assert done.difference <= 1e-5
    assert done.out == tmp_path / "out"

    assert {path.name for path in done.out.iterdir()} == {
        "scan.safetensors",
        "shallower_plan.json",
        "results.json",
        "checkpoint",
    }
    assert (Scan.load(done.out / "scan.safetensors").mean() == scanned.mean()).all()
    assert sh.Plan.load(done.out / "shallower_plan.json") == done.plan
    assert sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json") == done.plan
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results == done.to_json()
    assert results["num_samples"] == len(TEXTS)
    assert len(results["cuts"]) == 4

    reloaded = AutoModelForCausalLM.from_pretrained(done.out / "checkpoint", dtype=torch.float32)
    assert len(reloaded.model.layers) == 4
    kept = [llama.model.layers[index] for index in done.plan.survivors]
    for layer, original in zip(reloaded.model.layers, kept, strict=True):
        for name, weight in original.state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)


def test_a_run_continues_the_prompt_with_and_without_the_layers(llama, words, tmp_path):
    done = sh.run(
        llama,
        words,
        TEXTS,
        eval_texts=HELD_OUT,
        out=tmp_path / "out",
        sizes=[3],
        prompt="w5 w7 w11",
    )
    assert done.before == continue_text(llama, words, "w5 w7 w11")
    with sh.without_layers(llama, done.plan.blocks):
        assert done.after == continue_text(llama, words, "w5 w7 w11")
    assert done.before.startswith("w5 w7 w11 ")


def test_an_interrupted_run_goes_on_where_its_scan_was(llama, words, tmp_path, monkeypatch):
    texts = documents(200)
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(OSError, match="the disk went away"):
        sh.run(
            llama,
            words,
            broken_after(texts, 150),
            eval_texts=HELD_OUT,
            out=tmp_path / "out",
            sizes=[1],
        )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PARTIAL_FILE}

    forwards = []
    handle = llama.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sh.scan(llama, words, texts, checkpoint=tmp_path / "out" / PARTIAL_FILE)
    handle.remove()
    assert len(forwards) == (200 - 128) // 8

    done = sh.run(llama, words, texts, eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[1])
    assert done.scan.num_samples == 200
    assert not (tmp_path / "out" / PARTIAL_FILE).exists()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_run_without_texts_leaves_nothing(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.run(llama, words, texts, eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("eval_texts", [[], ["w1", ""]])
def test_a_run_without_held_out_texts_is_refused_before_the_scan(
    llama, words, tmp_path, eval_texts
):
    with pytest.raises(TextsError):
        sh.run(llama, words, Unread(), eval_texts=eval_texts, out=tmp_path / "out", sizes=[1])
    assert not (tmp_path / "out").exists()


def test_a_second_run_needs_overwrite_before_any_work(llama, words, tmp_path):
    sh.run(llama, words, TEXTS, eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[1])
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(llama, words, Unread(), eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[2])
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    done = sh.run(
        llama, words, TEXTS, eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[2], overwrite=True
    )
    assert json.loads((done.out / "results.json").read_text()) == done.to_json()
    assert len(sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json").dropped) == 2


def read_results(done_or_folder):
    return json.loads((done_or_folder / "results.json").read_text(), parse_constant=pytest.fail)


def test_the_results_are_written_before_the_cut_is_verified(llama, words, tmp_path, monkeypatch):
    """A verification that fails, or is killed, costs no result."""
    seen = []

    def other_model(*_args, **_options):
        seen.append(read_results(tmp_path / "out"))
        raise sh.ModelError("the checkpoint is another model")

    options = {"texts": TEXTS, "eval_texts": HELD_OUT, "sizes": [2]}
    with monkeypatch.context() as patched:
        patched.setattr("shallower.cutting.saving.verify_checkpoint", other_model)
        with pytest.raises(sh.ModelError, match=r"another model; all else is in .*results\.json"):
            sh.run(llama, words, out=tmp_path / "out", **options)
    whole = sh.run(llama, words, out=tmp_path / "whole", **options)
    (results,) = seen
    assert read_results(tmp_path / "out") == results
    assert results["max_logits_difference"] is None
    assert {**results, "max_logits_difference": whole.difference} == read_results(whole.out)
    assert whole.difference == whole.to_json()["max_logits_difference"] <= 1e-5
    assert not (tmp_path / "out" / PARTIAL_FILE).exists()
    assert (tmp_path / "out" / "checkpoint" / "config.json").is_file()


def test_the_results_are_told_before_the_healing(learned, words, tmp_path, monkeypatch):
    from shallower.runs.healing_stage import HealingStage

    told = []

    def killed(_stage):
        assert [done.healing for done in told] == [None]
        assert read_results(tmp_path / "out") == told[0].to_json()
        raise KeyboardInterrupt

    monkeypatch.setattr(HealingStage, "heal", killed)
    with pytest.raises(KeyboardInterrupt):
        sh.run(
            learned, words, progressions(600, 5), eval_texts=progressions(12, 1),
            out=tmp_path / "out", sizes=[2], max_length=16, heal=QUICK, report=told.append,
        )  # fmt: skip
    assert told[0].difference <= 1e-5


# Continuing a text.
def test_a_continuation_is_greedy(llama, words):
    ids = words("w3 w1 w4", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.inference_mode():
            following = llama(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    expected = words.decode(ids[0], skip_special_tokens=True)
    assert continue_text(llama, words, "w3 w1 w4", num_tokens=5) == expected


def test_a_continuation_is_greedy_whatever_the_model_prefers(llama, words):
    expected = continue_text(llama, words, "w3 w1 w4")
    llama.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    assert {continue_text(llama, words, "w3 w1 w4") for _ in range(3)} == {expected}


# A source, and a healing.
class CountedTexts:
    """Texts that count how often they are read."""

    def __init__(self, texts):
        self.texts, self.times = texts, 0

    def __iter__(self):
        self.times += 1
        return iter(self.texts)


@pytest.fixture
def stored(learned, words, tmp_path):
    """A folder of the model that was trained a little."""
    sh.save_model(learned, words, tmp_path / "stored")
    return tmp_path / "stored"


@pytest.fixture
def counted(monkeypatch):
    """The names of what is loaded, and the layers of what is measured."""
    from shallower.evaluation import loss

    found = {"loaded": [], "measured": []}
    load, measure = AutoModelForCausalLM.from_pretrained, loss.measure_loss

    def counting_load(source, **options):
        found["loaded"].append(Path(source).name)
        return load(source, **options)

    def counting_measure(decoder, *arguments, **options):
        found["measured"].append((len(decoder), options.get("description")))
        return measure(decoder, *arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting_load)
    for name, module in list(sys.modules.items()):
        if name.startswith("shallower.") and getattr(module, "measure_loss", None) is measure:
            monkeypatch.setattr(module, "measure_loss", counting_measure)
    return found


def test_a_run_of_a_source_is_that_of_its_model(learned, words, stored, tmp_path):
    source = ModelSource(stored, dtype="float32")
    options = {"texts": TEXTS, "eval_texts": HELD_OUT, "sizes": [2, 1]}
    one = sh.run(source, out=tmp_path / "one", **options)
    two = sh.run(learned, words, out=tmp_path / "two", **options)
    assert one.comparison == two.comparison
    assert one.plan.blocks == two.plan.blocks
    assert one.plan.model.fingerprint == two.plan.model.fingerprint
    with pytest.raises(sh.ModelError, match="needs its tokenizer"):
        sh.run(learned, out=tmp_path / "three", **options)


def test_a_run_reads_loads_and_measures_once(stored, tmp_path, counted):
    texts, held_out = CountedTexts(progressions(600, 5)), CountedTexts(progressions(12, 1))
    done = sh.run(
        ModelSource(stored, dtype="float32"), texts=texts, eval_texts=held_out,
        out=tmp_path / "out", sizes=[1, 2], max_length=16, heal=QUICK,
    )  # fmt: skip
    assert (texts.times, held_out.times) == (1, 1)
    assert counted["loaded"].count("stored") == 1
    assert counted["loaded"].count("checkpoint") == 1  # to verify it
    whole = [description for layers, description in counted["measured"] if layers == 6]
    assert whole == ["loss, all layers"]
    assert (done.healing.original, done.healing.cut) == done.losses
    assert (done.out / "healed" / "shallower_patch.json").is_file()


def test_a_run_in_memory_heals_and_leaves_the_model_as_it_was(learned, words, tmp_path):
    before = state_of(learned)
    texts, held_out = progressions(600, 5), progressions(12, 1)
    done = sh.run(
        learned, words, once(texts), eval_texts=once(held_out), out=tmp_path / "out", sizes=[2],
        heal=True, heal_steps=6,
    )  # fmt: skip
    assert_same(before, state_of(learned))
    assert done.healing.cut is not None
    assert done.healing.recipe.steps == 6
    assert done.healing.recipe.dtype == "float32"
    assert done.healing.original.num_tokens == done.comparison.base.num_tokens
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results == done.to_json()
    assert results["healing"]["recipe"]["steps"] == 6
    healed = AutoModelForCausalLM.from_pretrained(done.out / "healed", dtype=torch.float32)
    assert len(healed.model.layers) == 4
    assert sorted(path.name for path in done.out.iterdir()) == [
        "checkpoint", "healed", "results.json", "scan.safetensors", "shallower_plan.json",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_too_few_for_a_patch_are_healed_with_alone(learned, words, tmp_path, dtype):
    """The loss that the training must lower is that of the weights that are trained."""
    few, held_out = progressions(600, 5), progressions(12, 1)
    few = [" ".join(few[start::7]) for start in range(7)]
    recipe = replace(QUICK, dtype=dtype)
    with pytest.warns(UserWarning, match="healed from the cut, without a patch: 7 texts"):
        done = sh.run(
            learned, words, few, eval_texts=held_out, out=tmp_path / "out", sizes=[1],
            max_length=16, heal=recipe,
        )  # fmt: skip
    assert done.healing.cut is None
    assert (done.healing.before == done.losses[1]) is (dtype == "float32")
    cut = done.out / "checkpoint"
    alone = sh.heal(cut, few, tmp_path / "alone", recipe=recipe, eval_texts=held_out)
    assert done.healing.before.nats == pytest.approx(alone.before.nats, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heal_steps": 2}, sh.RecipeError, "heal_steps .*without heal"),
        ({"heal_steps": 2, "heal": QUICK}, sh.RecipeError, "heal_steps"),
        ({"heal": replace(QUICK, dropout=2.0)}, sh.RecipeError, "dropout"),
        ({"sizes": [6]}, sh.LayersError, "n = 6"),
        ({"sizes": []}, sh.LayersError, "no block size"),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(
    stored, tmp_path, counted, options, error, message
):
    options = {"sizes": [1], **options}
    with pytest.raises(error, match=message):
        sh.run(
            ModelSource(stored), texts=Unread(), eval_texts=Unread(), out=tmp_path / "out",
            **options,
        )  # fmt: skip
    assert counted["loaded"] == []
    assert not (tmp_path / "out").exists()


def test_a_healing_that_cannot_be_is_refused_before_the_scan(llama, words, tmp_path):
    with pytest.raises(sh.RecipeError, match="distillation needs the uncut model"):
        sh.run(
            llama, words, Unread(), eval_texts=Unread(), out=tmp_path / "out", sizes=[1],
            heal=replace(QUICK, distill=1.0),
        )  # fmt: skip
    for texts, message in ((TEXTS[:2], "2 texts make 0 sequences"), ([], "no texts")):
        with pytest.raises(TextsError, match=message):
            sh.run(
                llama, words, texts, eval_texts=HELD_OUT, out=tmp_path / "out", sizes=[1],
                heal=True,
            )  # fmt: skip
    (tmp_path / "out" / "healed").mkdir(parents=True)
    (tmp_path / "out" / "healed" / "dear").write_text("to someone")
    with pytest.raises(sh.OutputError, match="healed exists already"):
        sh.run(
            llama, words, Unread(), eval_texts=Unread(), out=tmp_path / "out", sizes=[1], heal=True
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["healed"]

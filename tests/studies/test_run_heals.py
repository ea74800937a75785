"""The healing of a run's checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower.reporting.report import read_story
from shallower.reporting.results import Run
from shallower.studies.healing_stage import HealingStage
from tests.conftest import write_jsonl
from tests.cutting.card_tools import blocks_of_code, one_line
from tests.documents import assert_same, once, state_of
from tests.healing.cuts import MANY, QUICK, documents
from tests.studies.test_again import commands_of
from tests.studies.test_run_speech import PROMPTS, assert_speech, reloaded, spoken

TEXTS, REPORT = documents(140, 5), documents(12, 1)
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 1, "n": 1, "prompts": ()}


pytestmark = pytest.mark.usefixtures("warm")
"""These runs have all in common up to their healing."""


def test_a_run_heals_what_it_patched_and_lets_it_speak(learned, words, tmp_path):
    before = state_of(learned)
    taken = {**TAKEN, "prompts": PROMPTS, "heal": QUICK, "out": tmp_path / "out"}
    done = sh.run(learned, words, once(TEXTS), **taken)
    assert_same(before, state_of(learned))
    assert {*done.speech} == {"whole", "cut", "patched", "healed"}
    assert_speech(done.speech["healed"], spoken(reloaded(done.checkpoint), words, learned))
    assert all(isinstance(one.continued["healed"], str) for one in done.continuations)
    story = read_story(done.out, drawn=False)
    (section,) = (one for one in story.sections if one.title == "How it speaks")
    assert section.tables[0].head == ("", "whole", "cut", "patched", "healed")
    assert "the healed model would accept" in section.lines[0]
    recommended = done.recommended
    assert recommended.state == "healed"
    assert recommended.loss is recommended.healed
    assert recommended.healed.nats < recommended.patched.nats < recommended.cut.nats
    assert done.checkpoint == tmp_path / "out" / "healed"
    healed = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    assert len(healed.model.layers) == 3
    loss = sh.evaluate_loss(healed, words, REPORT, max_length=16)
    assert loss.nats == pytest.approx(recommended.healed.nats, abs=1e-6)
    assert (done.checkpoint / "shallower_patch.json").is_file()
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["recommended"]["healed"] == recommended.healed.nats
    card, outside = (done.checkpoint / "README.md").read_text(), recommended.out_of_domain
    assert [*outside] == ["whole", "cut", "patched", "healed"]
    assert f"; out of domain {outside['whole']} → {outside['healed']} |" in card
    assert f"| held-out loss | {done.whole} → {recommended.healed} nats a token, " in card
    before = f"{done.whole} → {recommended.patched} nats a token, "
    assert f"| held-out loss, before the healing | {before}" in card
    assert results["checkpoint"] == "healed"
    again = Run.load(done.out)
    assert again.speech.keys() == done.speech.keys()
    assert replace(again, scan=done.scan, speech=done.speech) == done
    saved = done.checkpoint.rename(tmp_path / "moved") / "model.safetensors"
    again = sh.run(learned, words, once(TEXTS), **taken)
    assert (again.checkpoint / saved.name).read_bytes() == saved.read_bytes()


def test_texts_that_fit_are_trained_on_last_and_those_that_choose_or_report_never(
    learned, words, tmp_path, monkeypatch
):
    seen = {}

    def note(stage, results, *_said):
        split = stage.study.split
        seen.update(texts=list(stage.texts), choosing=split.choose, report=split.report)
        return results

    monkeypatch.setattr(HealingStage, "heal", note)
    texts = [*TEXTS, *REPORT[:3]]
    sh.run(
        learned, words, texts, **TAKEN, out=tmp_path / "out", heal=QUICK, max_texts=80, cache=False
    )  # fmt: skip
    assert len(seen["choosing"]) == 26
    others = {*seen["choosing"], *seen["report"]}
    beyond = [text for text in texts[80:] if text not in others]
    assert seen["texts"][: len(beyond)] == beyond
    assert sorted(seen["texts"][len(beyond) :]) == sorted({*texts[:80]} - others)


@pytest.mark.slow
def test_a_healing_that_was_made_is_not_made_again(learned, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(HealingStage, "_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", heal=QUICK)
    monkeypatch.setattr("shallower.studies.healing_stage.heal", lambda *_, **__: 1 / 0)
    done = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", heal=QUICK)
    assert done.recommended.state == "healed"


def test_a_training_that_makes_it_worse_leaves_the_patched_model(
    learned, words, tmp_path, monkeypatch
):
    def worse(*_args, **_options):
        raise sh.ModelError("the training made it worse")

    monkeypatch.setattr("shallower.studies.healing_stage.heal", worse)
    with pytest.warns(UserWarning, match="the patched model is not healed: the training made"):
        done = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", heal=QUICK)
    assert done.recommended.state == "patched"
    assert done.checkpoint == tmp_path / "out" / "checkpoint"
    assert "not healed" in done.warnings[0]
    monkeypatch.setattr("shallower.studies.healing_stage.heal", lambda *_, **__: 1 / 0)
    again = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", heal=QUICK)
    assert again.recommended.unhealed == done.recommended.unhealed


@pytest.mark.slow
def test_the_healed_model_of_a_run_that_was_replaced_is_not_this_ones(
    learned, words, tmp_path, monkeypatch
):
    """It is killed before its own healing, and goes on without being told to replace."""
    wanted = {**TAKEN, "out": tmp_path / "out", "heal": QUICK}
    earlier = sh.run(learned, words, TEXTS, **wanted)
    other = {**wanted, "n": len(earlier.recommended.plan.dropped) + 1}
    with monkeypatch.context() as patched:
        patched.setattr(HealingStage, "heal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sh.run(learned, words, TEXTS, **other, overwrite=True)
    done = sh.run(learned, words, TEXTS, **other)
    whole = sh.run(learned, words, TEXTS, **{**other, "out": tmp_path / "whole"})
    assert done.recommended.healed == whole.recommended.healed
    assert done.recommended.plan.dropped != earlier.recommended.plan.dropped


def test_a_healing_that_cannot_be_is_refused_before_the_scan(llama, words, tmp_path):
    with pytest.raises(sh.RecipeError, match="compares with the uncut model"):
        sh.run(
            llama, words, TEXTS, **TAKEN, out=tmp_path / "out",
            heal=replace(QUICK, objective="kd"),
        )  # fmt: skip
    with pytest.raises(sh.TextsError, match="8 texts make 1 sequences of 128"):
        sh.run(llama, words, TEXTS[:12], **TAKEN, out=tmp_path / "out", heal=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "healed").mkdir(parents=True)
    (tmp_path / "out" / "healed" / "dear").write_text("to someone")
    with pytest.raises(sh.OutputError, match="healed exists already"):
        sh.run(llama, words, TEXTS, **TAKEN, out=tmp_path / "out", heal=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["healed"]


@pytest.mark.slow
def test_the_command_of_a_run_heals_again_what_it_leaves(learned, words, shallower, tmp_path):
    sh.save_model(learned, words, tmp_path / "stored")
    for name, passages in (("texts", documents(2 * MANY, 5)), ("held_out", REPORT)):
        write_jsonl(tmp_path / f"{name}.jsonl", passages)
    out = tmp_path / "out"
    done = shallower(
        "run", tmp_path / "stored", "--texts", tmp_path / "texts.jsonl", "--eval-texts",
        tmp_path / "held_out.jsonl", "--out", out, "--n", "1", "--top", "2", "--dtype",
        "float32", "--heal", "--heal-steps", "6", "--json",
    )  # fmt: skip
    assert done.json["checkpoint"] == str(out / "healed"), done.err
    card = (out / "healed" / "README.md").read_text()
    assert "not measured" not in card
    again, *_ = blocks_of_code(card, "sh")
    assert one_line(again) == Run.load(out).command
    assert "--heal --heal-steps 6" in one_line(again)
    assert "Healing it again" not in card  # the run does it
    evaluated = [one for one in commands_of(out) if one.startswith("shallower eval out/")]
    assert [one.split()[2] for one in evaluated] == ["out/checkpoint", "out/healed"]

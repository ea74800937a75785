"""The stages joined."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import shallower as sh
from shallower import TextsError
from shallower.models.source import ModelSource
from shallower.patching import checkpoint
from shallower.patching.descent import Descent
from shallower.reporting.results import Run
from shallower.results.scores import Difference
from shallower.studies import recommending
from shallower.texts.sources import own_texts
from tests.documents import Unread
from tests.healing.cuts import QUICK
from tests.healing.cuts import documents as progressions

FILES = {"scan.safetensors", "shallower_plan.json", "gain.json", "results.json", "checkpoint"}
TEXTS, REPORT = progressions(90, 5), progressions(12, 1)
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 2, "prompts": ()}


def read_results(folder):
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def done(trained, words, kept, tmp_path_factory):
    """A run of a model that was trained a little."""
    model = copy.deepcopy(trained)
    out = tmp_path_factory.mktemp("run") / "out"
    return sh.run(model, words, TEXTS, **TAKEN, out=out, n=2)


# The whole way.
def test_a_run_leaves_a_checkpoint_that_stock_transformers_loads(done, learned, words):
    assert {path.name for path in done.out.iterdir()} == FILES
    plan = done.recommended.plan
    assert sh.Plan.load(done.out / "shallower_plan.json") == plan
    assert sh.Plan.load(done.checkpoint / "shallower_plan.json").dropped == plan.dropped
    assert len(plan.dropped) == 2
    assert done.checkpoint == done.out / "checkpoint"
    assert done.difference <= 1e-5
    reloaded = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    assert len(reloaded.model.layers) == 2
    loss = sh.evaluate_loss(reloaded, words, REPORT, max_length=16)
    assert loss.nats == pytest.approx(done.recommended.patched.nats, abs=1e-6)


def test_the_losses_are_those_of_the_texts_that_report(done, learned, words):
    options = {"max_length": 16}
    recommended = done.recommended
    whole = sh.evaluate_loss(learned, words, REPORT, **options)
    with sh.without_layers(learned, recommended.plan.blocks):
        cut = sh.evaluate_loss(learned, words, REPORT, **options)
    for found, plain in ((recommended.whole, whole), (recommended.cut, cut)):
        assert found.nats == pytest.approx(plain.nats, abs=1e-6)
        assert found.stderr == pytest.approx(plain.stderr, abs=1e-6)
        assert (found.num_texts, found.num_tokens) == (plain.num_texts, plain.num_tokens)
    paired = recommended.patched.by_text.sums - recommended.whole.by_text.sums
    weights = recommended.whole.by_text.weights
    mean = paired.sum() / weights.sum()
    deviations = paired - mean * weights
    error = np.sqrt((deviations**2).sum() * 12 / 11) / weights.sum()
    assert recommended.difference.mean == pytest.approx(mean, abs=1e-12)
    assert recommended.difference.stderr == pytest.approx(error, abs=1e-12)


def test_losses_out_of_domain_are_those_of_built_in_texts(done, learned, words):
    states, options = done.recommended.out_of_domain, {"max_length": 16}
    assert [*states] == ["whole", "cut", "patched"]
    found = {"whole": sh.evaluate_loss(learned, words, own_texts(), **options)}
    with sh.without_layers(learned, done.recommended.plan.blocks):
        found["cut"] = sh.evaluate_loss(learned, words, own_texts(), **options)
    saved = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    found["patched"] = sh.evaluate_loss(saved, words, own_texts(), **options)
    for name, loss in found.items():
        assert states[name].nats == pytest.approx(loss.nats, abs=1e-5)
        assert states[name].num_texts == loss.num_texts == 32
    costs = read_results(done.out)["recommended"]["cost"]["out_of_domain"]
    lost = found["patched"].minus(found["whole"])
    assert costs["lost"]["mean"] == pytest.approx(lost.mean, abs=1e-5)
    assert costs["lost"]["stderr"] == pytest.approx(lost.stderr, abs=1e-5)
    card = (done.checkpoint / "README.md").read_text()
    assert f"; out of domain {states['whole']} → {states['patched']} |" in card


def test_texts_of_the_out_of_domain_set_are_not_fitted(llama, words, tmp_path):
    texts = [*TEXTS, *own_texts()]
    with pytest.raises(TextsError, match=r"32 texts of --texts are also in .* out-of-domain texts"):
        sh.run(llama, words, texts, **TAKEN, out=tmp_path / "out", n=1)
    assert not (tmp_path / "out").exists()


def test_the_results_say_what_the_interface_promises(done):
    results = read_results(done.out)
    assert results == json.loads(json.dumps(done.to_json()))
    recommended = results["recommended"]
    assert {
        "dropped", "whole", "cut", "patched", "healed", "stderr", "paired_stderr", "layer_forwards",
    } <= recommended.keys()  # fmt: skip
    assert recommended["whole"] < recommended["patched"] < recommended["cut"]
    assert recommended["healed"] is None
    assert results["checkpoint"] == "checkpoint"
    assert results["splits"] == {"fit": 60, "choose": 30, "report": 12}
    words = "shallower run MODEL --texts TEXTS --eval-texts EVAL_TEXTS "
    assert results["command"].startswith(words)  # as a shell takes them
    assert replace(Run.load(done.out), scan=done.scan) == done


def test_the_sentence_says_what_goes_and_what_it_costs(done):
    recommended = done.recommended
    said = recommended.sentence()
    blocks = " ".join(map(str, recommended.plan.blocks))
    assert said.startswith(f"Drop layers {blocks}: 50 % of layers, ")
    lost = recommended.patched.nats - recommended.whole.nats
    assert f"{lost:+.2f} ± {recommended.difference.stderr:.2f} nats a token on the test set" in said
    whole, _, patched = recommended.out_of_domain.values()
    assert f"({recommended.whole.nats:.2f} → {recommended.patched.nats:.2f}) and " in said
    assert f" on out-of-domain texts ({whole.nats:.2f} → {patched.nats:.2f}), patched; " in said
    assert said.endswith((" cannot be told from it.", "; all other proposals fell behind."))


def test_the_next_best_is_no_tie_where_one_behind_it_is(done):
    verified = done.recommended.verified
    next_best, tie, near = (
        replace(verified.candidates[0], lost_early=False, difference=Difference(mean, stderr, 32))
        for mean, stderr in ((0.01, 0.001), (0.02, 0.02), (0.005, 0.02))
    )
    for others, end in (
        ((next_best, tie), "; 1 other proposal cannot be told from it."),
        ((next_best, tie, tie), "; 2 other proposals cannot be told from it."),
        ((next_best, tie, near), "; the next best and 1 more cannot be told from it."),
        ((next_best,), "; all other proposals fell behind."),
        ((), "; all other proposals fell behind."),
    ):
        raced = replace(verified, candidates=(verified.candidates[0], *others))
        assert replace(done.recommended, verified=raced).sentence().endswith(end)


def test_texts_that_report_are_held_out_where_none_are_given(learned, words, tmp_path):
    taken = {**TAKEN, "eval_texts": None}
    texts = TEXTS[:60]
    done = sh.run(learned, words, texts, **taken, out=tmp_path / "out", n=1, plan_only=True)
    assert done.splits == {"fit": 30, "choose": 15, "report": 15}
    held_out = sh.evaluate_loss(learned, words, texts[3::4], max_length=16)
    assert done.whole.nats == pytest.approx(held_out.nats, abs=1e-6)


# What is wished for.
@pytest.mark.usefixtures("warm")
def test_parameters_and_a_loss_are_met(done, learned, words, tmp_path):
    layer = sum(p.numel() for p in learned.model.layers[0].parameters())
    whole = sum(p.numel() for p in learned.parameters())
    target = {"params": whole - 2 * layer}
    small = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "small", **target)
    left = AutoModelForCausalLM.from_pretrained(small.checkpoint)
    assert sum(p.numel() for p in left.parameters()) == whole - 2 * layer
    assert small.recommended.plan.dropped == done.recommended.plan.dropped
    assert small.recommended.patched.nats == done.recommended.patched.nats
    target = {"max_loss": 50.0}
    most = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "most", **target)
    assert len(most.recommended.plan.dropped) == 3
    lost = most.recommended.difference.mean
    more = replace(most.recommended, max_loss=lost - 1e-9)
    (warned,) = {*replace(most, recommended=more).warnings} - {*most.warnings}
    assert warned.startswith(f"the patched model loses {lost:+.3f} ± ")
    assert "on the test set, more than the" in warned


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"max_loss": 1e-6}, "no cut loses at most 1e-06 nats"),
        ({"params": 10}, "no cut leaves at most 10 parameters"),
        ({"target_memory": "1TB"}, "which is no more than 1000.0 GB .* already"),
    ],
)
def test_a_wish_that_no_cut_fulfils_is_one_sentence(
    done, learned, words, tmp_path, target, message
):
    out = tmp_path / "out"
    with pytest.raises(sh.PlanError, match=message):
        sh.run(learned, words, TEXTS, **TAKEN, out=out, **target)
    assert not list(out.glob("*"))
    if "max_loss" in target:  # which is measured, and goes on in the same folder
        assert sh.run(learned, words, TEXTS, **TAKEN, out=out, n=1).recommended.plan.dropped
        return
    if "params" not in target:
        return
    shutil.copytree(done.out, out, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(sh.PlanError, match=message):  # nothing is replaced
        sh.run(learned, words, TEXTS, **TAKEN, out=out, overwrite=True, **target)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.usefixtures("warm")
def test_without_a_wish_it_is_the_knee(learned, words, tmp_path):
    done = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out")
    assert done.recommended.reason.startswith(("the knee of the curve", "the least size"))


@pytest.mark.parametrize(
    ("parameters", "device", "expected"),
    [
        (134_515_008, "cpu", 196_608), (494_032_768, "cpu", 60_724), (8_030_261_248, "cpu", 32_768),
        (8_030_261_248, "cuda", 196_608),
    ],
)  # fmt: skip
def test_a_large_model_is_patched_by_fewer_tokens_on_a_cpu(parameters, device, expected):
    assert recommending.patch_tokens(parameters, on_cpu=device == "cpu") == expected


def test_a_patch_that_finds_no_room_is_not_lost(
    learned, words, done, warm, tmp_path, monkeypatch, capfd
):
    """The disk fills up behind the steps, and is found full by the checkpoint of the cut."""

    def full(*_args, **_options):
        raise sh.OutputError("cannot write it")

    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    out, steps = tmp_path / "out", []
    step = Descent._step
    monkeypatch.setattr(Descent, "_step", lambda *args: (steps.append(1), step(*args)))
    save = recommending.save_patched
    monkeypatch.setattr(recommending, "save_patched", full)
    with pytest.raises(sh.OutputError, match="cannot write it"):
        sh.run(learned, words, TEXTS, **TAKEN, out=out, n=2)
    monkeypatch.setattr(recommending, "save_patched", save)
    taken = len(steps)
    again = sh.run(learned, words, TEXTS, **TAKEN, out=out, n=2)
    assert taken == len(steps) > 0
    assert f"resuming: {taken} of {taken} steps of the patch were taken" in capfd.readouterr().err
    assert again.recommended.patched.nats == done.recommended.patched.nats
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.usefixtures("done", "warm")
def test_a_cut_that_cannot_be_patched_is_saved_bare(learned, words, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise sh.PatchError("there is no plain matrix")

    monkeypatch.setattr(recommending, "with_patch", refuse)
    with pytest.warns(UserWarning, match="the cut is not patched: there is no plain matrix"):
        done = sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", n=2)
    assert done.recommended.patched is None
    assert done.recommended.loss is done.recommended.cut
    assert "the cut is not patched" in done.to_json()["recommended"]["warnings"][0]
    assert "not patched" in done.recommended.sentence()
    reloaded = AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    kept = [learned.model.layers[index] for index in done.recommended.plan.survivors]
    for layer, original in zip(reloaded.model.layers, kept, strict=True):
        for name, weight in original.state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)


@pytest.mark.filterwarnings("ignore:.*samples rejected")
def test_a_family_that_no_patch_fits_is_cut(words, tmp_path):
    config = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="the cut is not patched"):
        done = sh.run(model, words, TEXTS[:40], **TAKEN, out=tmp_path / "out", n=1)
    assert done.recommended.state == "cut"
    assert done.recommended.verified.after == "none"


# Cut short, and gone on with.
@pytest.mark.usefixtures("warm")
def test_another_run_needs_overwrite_before_any_work(done, learned, words, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done.out, out)
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(learned, words, TEXTS, **TAKEN, out=out, n=1)
    assert (out / "results.json").read_bytes() == (done.out / "results.json").read_bytes()
    again = sh.run(learned, words, TEXTS, **TAKEN, out=out, n=1, overwrite=True)
    assert len(sh.Plan.load(again.checkpoint / "shallower_plan.json").dropped) == 1


@pytest.mark.usefixtures("done", "warm")
def test_the_results_are_there_when_the_checkpoint_is_another_model(
    learned, words, tmp_path, monkeypatch
):
    def other_model(*_args, **_options):
        raise sh.ModelError("the checkpoint is another model")

    monkeypatch.setattr("shallower.studies.recommending.verify_checkpoint", other_model)
    with pytest.raises(sh.ModelError, match=r"another model; all else is in .*results\.json"):
        sh.run(learned, words, TEXTS, **TAKEN, out=tmp_path / "out", n=2)
    results = read_results(tmp_path / "out")
    assert results["recommended"]["patched"] is not None
    assert results["max_logits_difference"] is None


# Bad input.
def test_too_few_texts_leave_nothing(llama, words, tmp_path):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.run(llama, words, TEXTS, eval_texts=["w1", ""], out=tmp_path / "out", n=1)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stored(learned, words, tmp_path):
    """A folder of the model that was trained a little."""
    sh.save_model(learned, words, tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heal_steps": 2}, sh.RecipeError, "heal_steps .*without heal"),
        ({"heal_steps": 2, "heal": QUICK}, sh.RecipeError, "heal_steps"),
        ({"heal": "yes"}, sh.RecipeError, "heal = 'yes': expected True, False or a Recipe"),
        ({"tops": 3}, sh.SettingsError, "no setting 'tops': did you mean top?"),
        ({"prompts": "w1 w2"}, sh.TextsError, "there is no file of prompts w1 w2"),
        ({"prompts": 3}, sh.TextsError, "prompts must be a file or a sequence, got int .*--speech"),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(
    stored, tmp_path, monkeypatch, options, error, message
):
    loaded = []
    monkeypatch.setattr(ModelSource, "load", lambda source, _progress=None: loaded.append(source))
    with pytest.raises(error, match=message):
        sh.run(
            ModelSource(stored), texts=Unread(), eval_texts=Unread(), out=tmp_path / "out",
            **options,
        )  # fmt: skip
    assert loaded == []
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_needs_its_tokenizer(learned, tmp_path):
    with pytest.raises(sh.ModelError, match="needs its tokenizer"):
        sh.run(learned, texts=TEXTS, out=tmp_path / "out")

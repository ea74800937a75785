"""Healings that are refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower.healing import job as jobs
from shallower.texts.sources import Texts
from tests.conftest import tiny_llama
from tests.families import small_config
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut


# What is refused
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": []}, sh.TextsError, "there are no texts to heal with"),
        ({"eval_texts": []}, sh.TextsError, "there are no texts to predict"),
        ({"eval_texts": [*HELD_OUT, f" {TEXTS[3]}"]}, sh.TextsError, "also in --eval-texts"),
        ({"eval_texts": ["w1"]}, sh.TextsError, "no text has two tokens"),
        ({"recipe": replace(QUICK, max_length=129)}, sh.RecipeError, "128 positions"),
        (
            {"recipe": replace(QUICK, objective="kd")},
            sh.RecipeError,
            "compares with the uncut model",
        ),
    ],
)
def test_bad_input_leaves_nothing(cut, tmp_path, change, error, message):
    given = {"texts": TEXTS, "eval_texts": HELD_OUT, "recipe": QUICK, **change}
    with pytest.raises(error, match=message):
        sh.heal(cut, out=tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["texts", "eval_texts"])
def test_texts_are_looked_at_before_a_model_is_loaded(cut, tmp_path, name, monkeypatch):
    monkeypatch.setattr(
        jobs.LoadedOnce, "load", lambda *_args, **_options: pytest.fail("too early")
    )
    (tmp_path / "texts.jsonl").write_text('{"body": "w1 w2"}\n')
    given = {"texts": TEXTS, "eval_texts": HELD_OUT, name: Texts(str(tmp_path / "texts.jsonl"))}
    with pytest.raises(sh.TextsError, match="no field `text`"):
        sh.heal(cut, out=tmp_path / "out", recipe=QUICK, **given)


def test_a_model_that_was_not_cut_is_refused(both, tmp_path):
    with pytest.raises(sh.PlanError, match=r"was not cut: .* shallower prune MODEL"):
        sh.heal(both[0], TEXTS, tmp_path / "out", recipe=QUICK)
    with pytest.raises(sh.ModelError, match="is not there"):
        sh.heal(tmp_path / "nowhere", TEXTS, tmp_path / "out", recipe=QUICK)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        sh.ModelError, match="is a GGUF file, and no such weights are trained: cut the whole model"
    ):
        sh.heal(tmp_path / "cut.gguf", TEXTS, tmp_path / "out", recipe=QUICK)


def test_a_plan_of_another_cut_is_refused(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "cut")
    sh.Plan(6, (sh.Block(1, 4),)).save(tmp_path / "cut" / "shallower_plan.json")
    with pytest.raises(sh.PlanError, match="leaves 3 layers, and the model has 4"):
        sh.heal(tmp_path / "cut", TEXTS, tmp_path / "out", recipe=QUICK)


def test_a_place_that_is_taken_is_refused(cut, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=QUICK)
    with pytest.raises(sh.OutputError, match="wrote file there; choose another place"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=QUICK, overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "mine"
    (tmp_path / "out" / "file").unlink()
    for seed in (0, 1):
        once = replace(QUICK, steps=1, seed=seed)
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=once, overwrite=True)
    assert sh.Healing.load(tmp_path / "out").recipe.seed == 1


def test_adapters_of_another_model_are_refused(healed, cut, words, tmp_path):
    other = tiny_llama(6, seed=1)
    other.model.norm.weight.data += 1
    _, another = save_cut(tmp_path, other, words)
    with pytest.raises(sh.ModelError, match=r"were trained for cut .* is another model"):
        sh.merge(healed[0], tmp_path / "out", another)
    assert not (tmp_path / "out").exists()
    patched, tokenizer = sh.load_model(cut, dtype="float32")
    patched.model.layers[1].mlp.down_proj.weight.data *= 1.1
    sh.save_model(patched, tokenizer, tmp_path / "patched")
    with pytest.raises(sh.ModelError, match="or has other weights"):
        sh.merge(healed[0], tmp_path / "out", tmp_path / "patched")
    with pytest.raises(sh.ModelError, match="is not a healing of shallower"):
        sh.merge(another, tmp_path / "out")


def test_quantised_weights_cannot_be_merged_into(words, tmp_path):
    model = tiny_llama(6)
    sh.save_model(model, words, tmp_path / "whole")
    loaded, tokenizer = sh.load_model(tmp_path / "whole", dtype="int8")
    sh.save_model(loaded, tokenizer, tmp_path / "cut", plan=sh.drop_layers(loaded, [2]))
    with pytest.raises(sh.ModelError, match="are quantised, and adapters are merged into plain"):
        sh.heal(tmp_path / "cut", TEXTS, tmp_path / "out", recipe=QUICK, merge=True)


@pytest.mark.filterwarnings("ignore:nf4 quantises linear maps alone:UserWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's words
def test_what_peft_would_not_adapt_is_refused(words, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config("qwen3_next")).bfloat16().eval()
    _, cut = save_cut(tmp_path, model, words, [3])
    with pytest.raises(sh.ModelError, match=r"not on the 31 .* try plain weights"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=replace(QUICK, dtype="nf4"))
    assert not (tmp_path / "out").exists()


def test_a_healing_that_makes_it_worse_is_not_saved(healed, tmp_path):
    """Merged, the healed model is where more of the same at a thousand times the rate ruins it."""
    sh.merge(healed[0], tmp_path / "merged")
    recipe = replace(QUICK, learning_rate=10.0, warmup_steps=0, steps=2)
    with pytest.raises(
        sh.ModelError, match=r"made it worse: .* step 2; .* Lower the learning rate"
    ):
        sh.heal(tmp_path / "merged", TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_training(cut, words, tmp_path):
    model, tokenizer = sh.load_model(cut, dtype="float32")
    model.lm_head.weight.data[3] = torch.inf
    sh.save_model(model, tokenizer, tmp_path / "cut")
    shutil.copy(cut / "shallower_plan.json", tmp_path / "cut")
    with pytest.raises(sh.ModelError, match=r"the training loss is nan at step 1: lower"):
        sh.heal(tmp_path / "cut", TEXTS, tmp_path / "out", recipe=QUICK)

"""Repair in closed form, on a small model that has learned something."""

import copy
import json
import re

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.models.residual_writers import Writers, find_writers
from shallower.patching import descent, least_squares, saving, solver
from shallower.patching import patch as patching
from shallower.patching.patch import patch, with_patch
from shallower.reporting.stories.stages import patch_table
from shallower.texts.sources import own_texts
from shallower.values.files import PATCH_FILE
from tests.commands import in_this_process
from tests.conftest import mostly_slow, tiny_llama, write_jsonl
from tests.examples import sentences
from tests.families import random_model


@pytest.fixture
def model(learned):
    return copy.deepcopy(learned)


BLOCK = [range(3, 5)]
TEXTS = sentences(56, seed=1)
HELD_OUT = [text for text in sentences(64, seed=2) if text not in TEXTS]


@pytest.fixture(scope="module")
def patched(learned, words):
    """A model that was patched once, and what was said of it."""
    model, tokenizer = copy.deepcopy(learned), words.backend_tokenizer
    before = tokenizer.truncation
    done = patch(model, words, BLOCK, texts=TEXTS)
    assert before is tokenizer.truncation is None
    return model, done


def loss(model, words):
    return sh.evaluate_loss(model, words, HELD_OUT).nats


@pytest.mark.parametrize(
    "blocks", mostly_slow([[range(3, 5)], [range(2, 3), range(5, 6)]], [[range(2, 3), range(5, 6)]])
)
def test_a_patch_lowers_the_loss_of_a_cut(model, words, blocks):
    base = loss(model, words)
    with sh.without_layers(model, blocks):
        cut = loss(model, words)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    done = patch(model, words, blocks, texts=TEXTS)
    patched = loss(model, words)
    assert base < cut
    assert patched < cut - 0.1 * (cut - base)
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert done.patched < done.cut
    assert done.original < done.cut
    assert done.recovered == pytest.approx((done.cut - done.patched) / (done.cut - done.original))
    assert [fit.layer for fit in done.fits] == [block.start - 1 for block in blocks]


def test_a_patch_keeps_what_its_plan_knows(model, words, tmp_path, monkeypatch):
    """Score, metric, texts and strategy come to the saved plan and its card."""
    hidden, make = [], saving.healed_card

    def card(*given):
        hidden.append(len([*tmp_path.glob(".*.partial.*")]))
        return make(*given)

    monkeypatch.setattr(saving, "healed_card", card)
    plan = sh.scan(model, words, TEXTS[:40]).plan(2)
    assert plan.strategy == "similarity"
    done = patch(model, words, plan, texts=TEXTS)
    assert done.plan == plan
    assert done.plan.blocks[0].score == plan.blocks[0].score is not None
    sh.save_patched(model, words, tmp_path / "patched", done=done)
    assert hidden == [1]  # which the next run removes, should this one be killed
    saved = sh.Plan.load(tmp_path / "patched" / "shallower_plan.json")
    assert (saved.strategy, saved.metric, saved.texts) == ("similarity", "angular", plan.texts)
    assert saved.blocks[0].score == plan.blocks[0].score
    card = (tmp_path / "patched" / "README.md").read_text()
    assert "angular distance" in card
    assert "similarity: of all blocks of its size" in card
    assert f"{plan.texts[0].num_texts} texts" in card


def test_a_model_can_be_patched_for_a_while(model, words, patched):
    """The body sees what patch leaves; afterwards every weight and layer is back."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with with_patch(model, words, BLOCK, texts=TEXTS, progress=False) as done:
        inside = loss(model, words)
        assert len(model.model.layers) == 6
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.num_hidden_layers == 8
    assert patched[1] == done
    assert loss(patched[0], words) == inside


def test_what_is_reported_is_the_loss_of_the_model_that_is_left(patched, words):
    model, done = patched
    held_out = [text for index, text in enumerate(TEXTS) if index % 8 == 7]
    assert done.patched == pytest.approx(sh.evaluate_loss(model, words, held_out).nats, abs=1e-5)
    losses = [*(fit.nats for fit in done.fits), *done.descent]
    assert losses == sorted(losses, reverse=True)
    assert done.patched == losses[-1]
    assert all(0 < fit.explained < 1 for fit in done.fits)
    assert done.num_held_out == 24 * len(held_out)
    assert done.num_tokens == 24 * (len(TEXTS) - len(held_out))


def test_a_cpu_fits_fewer_tokens_unless_they_are_asked_for(model, words, monkeypatch):
    assert patching.CPU_TOKENS < patching.NUM_TOKENS
    monkeypatch.setattr(patching, "CPU_TOKENS", 960)
    for num_tokens, expected in ((None, 960), (480, 480)):
        copied = copy.deepcopy(model)
        done = patch(copied, words, [range(3, 5)], texts=TEXTS, num_tokens=num_tokens)
        assert done.num_tokens == expected


def test_all_matrices_behind_the_cut_go_on_down(model, words):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    done = patch(model, words, [range(2, 6)], texts=TEXTS)
    assert done.patched == done.descent[-1] < done.fits[-1].nats < done.cut
    for name, weight in model.state_dict().items():
        layer = name.split(".")[2] if "layers" in name else "none"
        old = before[name.replace(".2.", ".6.").replace(".3.", ".7.")]
        assert torch.equal(weight, old) is not (layer in {"1", "2", "3"} and weight.ndim > 1)
    assert json.loads(json.dumps(done.to_json())) == done.to_json()
    assert sh.Patch.from_json(done.to_json()) == done


def test_the_feed_forward_is_ridge_regression_of_what_is_missing(learned, words, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (0.1,))
    monkeypatch.setattr(solver, "FIRST_WEIGHTS", (0.01,))
    monkeypatch.setattr(descent, "RATE", 0.0)
    monkeypatch.setattr(
        solver, "find_writers", lambda *a, **k: Writers(None, find_writers(*a, **k).feed_forward)
    )
    model = copy.deepcopy(learned)
    fitted = [text for index, text in enumerate(TEXTS) if index % 8 != 7]
    ids = torch.tensor(words(fitted)["input_ids"])
    taken = {}
    down = learned.model.layers[2].mlp.down_proj
    hook = down.register_forward_hook(lambda _, args, _out: taken.update(x=args[0]))
    with torch.inference_mode():
        states = learned(input_ids=ids, output_hidden_states=True).hidden_states
    hook.remove()
    weight = np.where(np.arange(24) == 0, 0.1, 1.0)[None, :, None]
    x, missing = taken["x"].double().numpy(), (states[5] - states[3]).double().numpy()
    width = x.shape[-1]
    rest = x[:, 1:].reshape(-1, width)
    x, missing = ((weight * v).reshape(-1, v.shape[-1]) for v in (x, missing))
    ridge = 0.1 * np.square(rest).sum(0).mean()
    solved = np.linalg.solve(x.T @ x + ridge * np.eye(width), x.T @ missing).T
    expected = down.weight.detach().double().numpy() + solved
    patch(model, words, [range(3, 5)], texts=TEXTS)
    found = model.model.layers[2].mlp.down_proj.weight.detach().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_transposed_weights_too(words):
    model = random_model("gpt2")
    shape = model.transformer.h[2].mlp.c_proj.weight.shape
    done = patch(model, words, [range(3, 5)], texts=sentences(100))
    assert done.fits[0].matrices == ("2.attn.c_proj", "2.mlp.c_proj")
    assert done.fits[0].explained > 0.3
    assert model.transformer.h[2].mlp.c_proj.weight.shape == shape == (48, 32)


def test_a_patch_that_does_not_help_leaves_the_model_alone(words, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (1e12,))
    monkeypatch.setattr(descent, "RATE", 0.0)
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(sh.PatchError, match=r"does not help: the loss on \d+ held-out tokens"):
        patch(model, words, [range(2, 4)], texts=sentences(40))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.config.num_hidden_layers == 6


def test_a_patch_without_enough_memory_says_what_to_set(model, words, monkeypatch):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sums = solver.Solver._sums

    def fail(work, layer, writers):
        if work.changes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums(work, layer, writers)

    monkeypatch.setattr(solver.Solver, "_sums", fail)
    with pytest.raises(sh.PatchError, match=r"with 16 texts of at most 256 .* lower batch_size"):
        patch(model, words, [range(3, 5)], texts=TEXTS)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2", "plain linear map"), ("mixtral", "plain linear map"), ("dory", "one by one")],
)
def test_families_without_such_a_matrix_are_refused(words, name, reason):
    model = random_model(name)
    with pytest.raises(sh.ShallowerError, match=reason):
        patch(model, words, [range(3, 5)], texts=sentences(40))
    assert model.config.get_text_config().num_hidden_layers == 8


@pytest.mark.parametrize(
    ("layers", "texts", "options", "reason"),
    [
        ([range(2)], TEXTS, {}, r"no layer before the block \[0, 2\)"),
        ([range(3, 5)], TEXTS[:7], {}, "7 texts, too few"),
        ([range(3, 5)], TEXTS, {"num_tokens": 0}, "num_tokens"),
        ([range(3, 9)], TEXTS, {}, "layer 8"),
    ],
)
def test_bad_input(model, words, layers, texts, options, reason):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(sh.ShallowerError, match=reason):
        patch(model, words, layers, texts=texts, **options)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def folder(learned, words, tmp_path_factory):
    """The model in a folder, with texts beside it."""
    folder = tmp_path_factory.mktemp("patch")
    sh.save_model(copy.deepcopy(learned), words, folder / "model")
    for name, texts in (("texts", TEXTS), ("held_out", HELD_OUT)):
        write_jsonl(folder / f"{name}.jsonl", texts)
    return folder


def run(folder, *more):
    command = ["patch", "model", "--texts", "texts.jsonl", "--dtype", "float32", *more]
    named = [str(folder / name) if (folder / name).exists() else name for name in command]
    return in_this_process(*named)


def test_without_held_out_text_a_patch_says_what_it_chose_by(patched):
    done = patched[1]
    share = f"{100 * done.recovered:.0f} %"
    said = f"patch by refit: {share} of the lost nats recovered on the texts that it chose by"
    assert patch_table(done, {}).title == said


def test_texts_that_are_held_out_are_not_fitted(folder, hasty):
    texts = folder / "both.jsonl"
    write_jsonl(texts, [*HELD_OUT, f"{TEXTS[5]} "])
    done = run(folder, "--drop", "3:5", "--out", "nowhere", "--eval-texts", str(texts), "--dry-run")
    assert done.status == 2
    assert "1 text of --texts is also in --eval-texts" in done.err
    write_jsonl(texts, [*TEXTS, own_texts()[3]])
    options = ("--eval-texts", str(folder / "held_out.jsonl"), "--texts", str(texts), "--dry-run")
    done = run(folder, "--drop", "3:5", "--out", "nowhere", *options)
    assert done.status == 2
    assert "1 text of --texts is also in --eval-texts or the built-in out-of-domain" in done.err


def test_the_command_saves_a_checkpoint_with_its_report_and_card(folder, words):
    out = folder / "patched"
    options = ("--drop", "3:5", "--out", str(out), "--eval-texts", str(folder / "held_out.jsonl"))
    done = run(folder, *options)
    assert done.status == 0, done.err
    share = r"(-?\d+) ± \d+ %"
    headline = (
        rf"{share} of the lost nats recovered on the test set, {share} on out-of-domain texts"
    )
    shares = re.search(rf"patch by refit: {headline}", " ".join(done.out.split())).groups()
    report = json.loads((out / PATCH_FILE).read_text())
    assert report["plan"]["drop"][0]["start"] == 3
    assert report["plan"]["model"]["num_layers"] == 8
    assert report["patched"] < report["cut"]
    card = (out / "README.md").read_text()
    assert "is not healed" not in card
    row = rf"\| {headline}, -?\d+ % on the texts that it chose by \|"
    assert re.search(row, card).groups() == shares
    assert "solved anew by least squares" in card
    values, (model, _) = (
        json.loads(run(folder, *options, "--json").out),
        sh.load_model(out, dtype="float32"),
    )
    sets = {"eval": HELD_OUT, "out_of_domain": own_texts()}
    for (name, texts), share, costs in zip(
        sets.items(), shares, values["cost"].values(), strict=True
    ):
        whole, cut, patched = (values[name][state]["nats"] for state in ("whole", "cut", "patched"))
        assert patched == pytest.approx(
            sh.evaluate_loss(model, words, texts, max_length=128).nats, abs=1e-5
        )
        assert costs["lost"]["mean"] == pytest.approx(patched - whole)
        assert costs["recovered"]["mean"] == pytest.approx((cut - patched) / (cut - whole))
        assert int(share) == pytest.approx(100 * costs["recovered"]["mean"], abs=0.5)
        assert f"{whole:.3f} ± " in card
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []

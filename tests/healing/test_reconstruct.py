"""The layer before each block fitted to the uncut model's states."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import shallower as sh
from shallower.healing import layer_fit, reconstruct
from shallower.healing.layer_fit import SequenceStates, batch_of, fit_layer, missed_shares
from shallower.models.layerwise import Layerwise
from shallower.texts.sequences import order, read_samples
from tests.conftest import tiny_llama
from tests.healing.cuts import FACTS, HELD_OUT, TEXTS, documents, save_cut

LOCAL = sh.Recipe(
    objective="reconstruct", steps=12, learning_rate=3e-3, max_length=16, dtype="float32",
    packing=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def rebuilt(patchable, tmp_path_factory):
    """A cut of layers 2 and 3 whose layer 1 was fitted, and its record."""
    whole, cut = patchable
    out = tmp_path_factory.mktemp("reconstructed") / "out"
    options = {"recipe": replace(LOCAL, steps=40), "eval_texts": HELD_OUT, "original": whole}
    return out, sh.heal(cut, documents(400, 5), out, **options)


def weights(path):
    return load_file(path / "model.safetensors")


def state_error(model, whole, tokenizer, layers, wanted):
    """The mean of ‖x' − x‖² / ‖x‖² on held-out text, in float64 of NumPy."""
    total, count = 0.0, 0
    for text in HELD_OUT:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            got, expected = (
                m(ids, output_hidden_states=True).hidden_states[index][0, 1:].double().numpy()
                for m, index in ((model, layers), (whole, wanted))
            )
        total += (((got - expected) ** 2).sum(-1) / (expected**2).sum(-1)).sum()
        count += len(got)
    return total / count


def test_the_states_come_closer_and_the_loss_falls(rebuilt, patchable):
    out, record = rebuilt
    (whole, tokenizer), (cut, _), (healed, _) = (
        sh.load_model(path, dtype="float32") for path in (*patchable, out)
    )
    before, after = (state_error(m, whole, tokenizer, 2, 4) for m in (cut, healed))
    assert after < 0.5 * before
    errors = [step.loss for step in record.steps]
    assert len(errors) == 40
    assert errors[-1] < 0.5 * errors[0]
    assert record.after.nats < record.before.nats
    loss = sh.evaluate_loss(healed, tokenizer, HELD_OUT, max_length=16)
    assert record.after.nats == pytest.approx(loss.nats, abs=1e-6)


def test_every_other_weight_is_as_it_was(rebuilt, patchable):
    out, record = rebuilt
    before, after = weights(patchable[1]), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
    assert record.adapted == len(changed)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_the_folder_is_a_standard_checkpoint_with_its_papers(rebuilt, patchable):
    out, record = rebuilt
    names = {file.name for file in out.iterdir()}
    assert {"README.md", "LICENSE", "healing.json", "shallower_plan.json", "mergekit.yaml"} <= names
    assert not [name for name in names if "adapter" in name]
    assert sh.Healing.load(out) == record
    assert sh.Plan.load(out / "shallower_plan.json") == record.plan
    card = (out / "README.md").read_text()
    assert "| objective | reconstruct |" in card
    assert "the layer before each block was fitted" in card
    assert "rank" not in card
    assert not list(out.parent.glob(".*"))
    with pytest.raises(sh.ModelError, match="nothing to merge"):
        sh.merge(out, out.parent / "merged")


def test_the_first_error_is_that_of_numpy(rebuilt, patchable):
    """Before the first step the layer is the cut's."""
    _, record = rebuilt
    (whole, tokenizer), (cut, _) = (sh.load_model(p, dtype="float32") for p in patchable)
    samples = read_samples(
        tokenizer, documents(400, 5), max_length=16, packing=True, num_samples=40 * 16
    )
    rows = [samples.rows[index] for index in order(len(samples), 40 * 16, 0)[:16]]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    with torch.inference_mode():
        got, wanted = (
            model(ids, output_hidden_states=True).hidden_states[index][:, 1:].double().numpy()
            for model, index in ((cut, 2), (whole, 4))
        )
    shares = ((got - wanted) ** 2).sum(-1) / (wanted**2).sum(-1)
    assert record.steps[0].loss == pytest.approx(shares.mean(), rel=1e-5)


def test_the_seed_decides_all_bits(patchable, tmp_path):
    whole, cut = patchable
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = replace(LOCAL, steps=3, seed=seed)
        sh.heal(cut, TEXTS, tmp_path / name, recipe=recipe, original=whole)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("packing", [True, False])
def test_the_forward_may_be_of_any_size(patchable, tmp_path, packing):
    whole, cut = patchable
    found = []
    for size in (1, 16):
        recipe, out = (
            replace(LOCAL, steps=3, packing=packing, batch_size=size),
            tmp_path / f"{size}",
        )
        record = sh.heal(cut, TEXTS, out, recipe=recipe, original=whole)
        found.append((weights(out), [step.loss for step in record.steps]))
    (first, errors), (second, others) = found
    assert errors == pytest.approx(others, rel=1e-5)
    assert all(np.abs(first[name] - second[name]).max() < 1e-4 for name in first)


def test_several_blocks_are_fitted_from_the_first_on(words, tmp_path):
    """The second layer is trained on what the first has become."""
    blocks = [sh.Block(1, 2), sh.Block(3, 5)]
    whole, cut = save_cut(tmp_path, tiny_llama(6, seed=4), words, blocks)
    recipe = replace(LOCAL, steps=8)
    record = sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, original=whole)
    assert [step.step for step in record.steps] == list(range(1, 17))
    before, after = weights(cut), weights(tmp_path / "out")
    changed = {n.split(".")[2] for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {"0", "1"}
    (original, tokenizer), (old, _), (new, _) = (
        sh.load_model(p, dtype="float32") for p in (whole, cut, tmp_path / "out")
    )
    for here, there in ((1, 2), (2, 5)):
        errors = [state_error(m, original, tokenizer, here, there) for m in (old, new)]
        assert errors[1] < errors[0]


def test_it_starts_from_the_patch(patchable, tmp_path):
    """Layers that the patch solved anew, and that are not trained, stay as it left them."""
    whole, cut = patchable
    out, texts = tmp_path / "out", documents(600, 5)
    recipe = replace(LOCAL, learning_rate=1.0)
    options = {"original": whole, "from_patch": True}
    with pytest.warns(UserWarning, match="no step of the training was better than the patch"):
        record = sh.heal(
            cut, texts, tmp_path / "patch", recipe=recipe, eval_texts=HELD_OUT, **options
        )
    assert record.best_step == 0
    record = sh.heal(cut, texts, out, recipe=LOCAL, **options)
    assert (record.best_step, record.held_out) == (12, ())
    before, after = weights(tmp_path / "patch"), weights(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
    report = (tmp_path / "patch" / "shallower_patch.json").read_bytes()
    assert (out / "shallower_patch.json").read_bytes() == report
    assert not list(tmp_path.glob(".*"))


def test_a_bfloat16_cut_stays_bfloat16(words, tmp_path):
    whole, cut = save_cut(tmp_path, tiny_llama(6).to(torch.bfloat16), words)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        sh.heal(cut, TEXTS, out, recipe=replace(LOCAL, dtype=dtype), original=whole)
        assert {v.dtype for v in load_torch(out / "model.safetensors").values()} == {torch.bfloat16}
        before = sh.load_model(cut, dtype="bfloat16")[0].state_dict()
        after = sh.load_model(out, dtype="bfloat16")[0].state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all(name.startswith("model.layers.1.") for name in changed)


def test_where_the_loss_does_not_fall_nothing_is_saved(patchable, tmp_path):
    whole, cut = patchable
    options = {"original": whole, "eval_texts": HELD_OUT}
    recipe = replace(LOCAL, learning_rate=1.0)
    with pytest.raises(sh.ModelError, match="made it worse"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, **options)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_one_leaves_nothing(patchable, tmp_path, monkeypatch):
    whole, cut = patchable

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruct, "write_reconstructed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=replace(LOCAL, steps=1), original=whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, sh.RecipeError, "reconstruct compares with the uncut model: name it"),
        ({"rank": 4}, sh.RecipeError, "leave out rank"),
        ({"attention": True}, sh.RecipeError, "leave out rank"),
        ({"distill": 1.0}, sh.RecipeError, "uncut model"),
    ],
)
def test_what_does_not_fit_is_refused(cut, tmp_path, options, error, message):
    original = {"original": "nowhere"} if options and "distill" not in options else {}
    with pytest.raises(error, match=message):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=replace(LOCAL, **options), **original)
    assert not list(tmp_path.iterdir())


def test_a_cut_of_the_first_layers_is_refused(words, tmp_path):
    whole, cut = save_cut(tmp_path, tiny_llama(4), words, [sh.Block(0, 2)])
    with pytest.raises(sh.RecipeError, match=r"no layer before the block \[0, 2\)"):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=LOCAL, original=whole)


def test_several_processes_are_refused(both, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "num_processes", lambda: 2)
    with pytest.raises(sh.ProcessesError, match="cannot reconstruct together"):
        sh.heal(both[1], TEXTS, tmp_path / "out", recipe=LOCAL, original=both[0])


# One layer
def test_a_layer_finds_the_states_of_its_own_kind(words, tmp_path):
    """What another layer of the same shape makes can be learned; nothing else changes."""
    model = tiny_llama(3, seed=2)
    model.requires_grad_(False)
    samples = read_samples(words, TEXTS, max_length=16, packing=True, num_samples=64)
    runner, batch = Layerwise(model), batch_of(samples, range(64))
    given, wanted = (
        SequenceStates(tmp_path / name, samples, model.config.hidden_size, torch.float32)
        for name in ("given", "wanted")
    )
    states = runner.embed(batch)
    given.put(batch, states)
    wanted.put(batch, runner.run(batch, states, (2,)))
    errors = []
    recipe = replace(LOCAL, steps=60, learning_rate=1e-2).resolve(FACTS)
    trained = fit_layer(
        runner, 0, samples, given=given, wanted=wanted, recipe=recipe,
        report=lambda step: errors.append(step.loss),
    )  # fmt: skip
    assert errors[-1] < 0.2 * errors[0]
    layer = dict(model.model.layers[0].named_parameters())
    assert trained.keys() == layer.keys()
    assert all(torch.equal(trained[name], layer[name]) for name in layer)


def test_states_are_taken_as_they_were_put(words, tmp_path):
    samples = read_samples(words, TEXTS, max_length=30, packing=False, num_samples=40)
    kept = SequenceStates(tmp_path / "states", samples, 5, torch.float32)
    generator = torch.Generator().manual_seed(0)
    known = {}
    for indices in ([3, 0, 17], [1, 2], [39]):
        batch = batch_of(samples, indices)
        drawn = torch.randn(*batch.input_ids.shape, 5, generator=generator)
        known.update(zip(indices, drawn, strict=True))
        kept.put(batch, torch.stack([known[index] for index in indices]))
    batch = batch_of(samples, [2, 39, 0, 3])
    taken = kept.take(batch)
    for row, index in enumerate(batch.samples):
        length = len(samples.rows[index])
        assert torch.equal(taken[row, :length], known[int(index)][:length])
        assert not taken[row, length:].any()


def test_the_first_token_and_padding_count_for_nothing(words):
    samples = read_samples(words, TEXTS, max_length=9, packing=False, num_samples=30)
    batch = batch_of(samples, range(30))
    generator = torch.Generator().manual_seed(0)
    got, wanted = (torch.randn(*batch.input_ids.shape, 4, generator=generator) for _ in range(2))
    total, count = missed_shares(batch, got, wanted)
    expected = []
    for row, ids in enumerate(samples.rows):
        x, y = (z[row, 1 : len(ids)].double().numpy() for z in (got, wanted))
        expected += list(((x - y) ** 2).sum(-1) / (y**2).sum(-1))
    assert count == len(expected)
    assert float(total) == pytest.approx(sum(expected), rel=1e-5)


def test_the_rate_is_that_of_a_healing():
    recipe = replace(LOCAL, steps=12, warmup_steps=3, learning_rate=0.004).resolve(FACTS)
    rates = [layer_fit.rate_at(step, recipe) for step in range(12)]
    expected = [
        0.004 * (k / 3 if k < 3 else 0.5 * (1 + np.cos(np.pi * (k - 3) / 9))) for k in range(12)
    ]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_its_settings_are_its_own():
    resolved = sh.Recipe(objective="reconstruct").resolve(FACTS, auto="bfloat16")
    assert (resolved.steps, resolved.dtype) == (300, "bfloat16")
    assert "rank" not in str(resolved)
    assert "objective reconstruct" in str(resolved)
    assert sh.Recipe().resolve(FACTS).steps == 5000

"""The healing of a cut of experts: by texts alone, and by the whole model."""

import pytest
import torch

import shallower as sh
from shallower.healing.checks import resolve
from shallower.models.experts import find_experts, stacked_weights
from tests.conftest import mostly_slow, word_tokenizer
from tests.cutting.mixtures import mixture, some_experts
from tests.healing.cuts import HELD_OUT, TEXTS


def save_cut(place, model):
    sh.save_model(model, word_tokenizer(), place / "whole")
    sh.prune(place / "whole", (), place / "cut", experts=some_experts(model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtures")
    save_cut(place, mixture("mixtral", num_hidden_layers=3))
    return place


@pytest.mark.parametrize("objective", mostly_slow(["lm", "kd"], ["kd"]))
def test_a_cut_of_experts_is_healed(folders, objective):
    out, whole = folders / objective, folders / "whole" if objective == "kd" else None
    recipe = sh.Recipe(
        steps=2, dtype="float32", max_length=16, rank=4, objective=objective, eval_every=1
    )
    healing = sh.heal(
        folders / "cut", TEXTS, out, recipe=recipe, eval_texts=HELD_OUT, original=whole,
        merge=True, progress=False,
    )  # fmt: skip
    assert healing.after.nats < healing.before.nats
    healed, _ = sh.load_model(out, dtype="float32")
    cut, _ = sh.load_model(folders / "cut", dtype="float32")
    assert {one.num_experts for one in find_experts(healed)} == {4}
    moved = [
        name
        for name, weight in healed.named_parameters()
        if not torch.equal(weight, dict(cut.named_parameters())[name])
    ]
    assert any("experts" in name for name in moved)


# In 4 bits.
@pytest.mark.parametrize("dtype", mostly_slow(["nf4", "bfloat16"], ["nf4"]))
def test_experts_that_stay_plain_are_counted_apart_and_named(folder, shallower, dtype):
    """Where a healing is forecast, refused and begun."""
    save_cut(folder, mixture("mixtral", num_hidden_layers=2))
    cut = folder / "cut"
    model, _ = sh.load_model(cut, "bfloat16", progress=False)
    size = sum(weight.nbytes for weight in stacked_weights(model))
    found = sh.memory_forecast(cut, dtype=dtype, max_length=16, device_memory="16GB")
    assert found.parts["routed experts"] == size > found.parts["weights"] / 2
    assert found.peak_bytes == sum(found.parts.values())
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    options = ("--texts", folder / "texts.jsonl", "--max-length", 16, "--out", "out", "--dry-run")
    said = " ".join(shallower("heal", cut, *options, "--dtype", dtype).out.split())
    assert "experts: adapters lie on them too, and on no router" in said
    assert ("on no router; nf4 quantises linear" in said) == (dtype == "nf4")
    if dtype != "nf4":
        assert "nf4" not in said
        return
    words = "nf4 quantises linear maps alone: the routed experts, .* stay in bfloat16"
    recipe = sh.Recipe(dtype="nf4", max_length=16)
    with pytest.raises(sh.RecipeError, match=words):
        resolve(str(cut), sh.Plan.load(cut / "shallower_plan.json"), recipe, device_memory="538MB")
    with pytest.warns(UserWarning, match=words):
        sh.load_model(cut, "nf4", progress=False)

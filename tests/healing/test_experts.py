"""The healing of a cut of experts: by texts alone, and by the whole model."""

import pytest
import torch

import shallower as sh
from shallower.models.experts import find_experts
from tests.conftest import word_tokenizer
from tests.cutting.mixtures import mixture, some_experts
from tests.healing.cuts import HELD_OUT, TEXTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtures")
    model = mixture("mixtral")
    sh.save_model(model, word_tokenizer(), place / "whole")
    sh.prune(place / "whole", (), place / "cut", experts=some_experts(model))
    return place


@pytest.mark.parametrize("objective", ["lm", "kd"])
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

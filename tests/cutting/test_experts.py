"""Experts cut out of every family, saved, and reloaded by stock transformers."""

import copy
import itertools
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

import shallower as sh
from shallower.cutting import experts as cutting
from shallower.models.experts import find_experts
from shallower.values.experts import DroppedExperts
from shallower.values.layers import Block
from tests.conftest import mostly_slow
from tests.cutting.mixtures import NUM_EXPERTS, mixture, some_experts, unchosen
from tests.cutting.test_families import check_generation, generation, logits, reload
from tests.documents import documents
from tests.families import EXPERTS_STAY, MIXTURES, SCALES
from tests.models.offloaded import offloaded

TEXTS = documents(6)
FAST = ["deepseek_v3", "gpt_oss", "llama4_text", "mixtral"]
"""Routers that differ most."""


@pytest.mark.parametrize("name", mostly_slow(sorted(MIXTURES), ["deepseek_v3", "llama4_text"]))
def test_a_cut_is_the_mixture_whose_dropped_experts_cannot_be_chosen(name, tmp_path):
    model = mixture(name)
    tokens = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(2))
    dropped = some_experts(model)
    whole = logits(model, tokens)
    with unchosen(model, dropped):
        wanted = logits(model, tokens)
        said = generation(model, tokens[:1], True)
    assert torch.isfinite(wanted).all()
    assert torch.equal(logits(model, tokens), whole)
    plan = sh.drop_experts(model, dropped)
    assert plan.experts.by_layer == {layer: tuple(some) for layer, some in dropped.items()}
    found = reload(model, tmp_path / "cut")
    assert {one.num_experts for one in find_experts(found)} == {NUM_EXPERTS - 2}
    scale = max(1.0, float(wanted.abs().max()))
    tolerance = SCALES.get(name, 1e-5) * scale
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(found, tokens), wanted, rtol=0, atol=tolerance)
    assert float((wanted - whole).abs().max()) > 100 * tolerance, "the experts do nothing"
    check_generation(found, tokens[:1])
    assert torch.equal(generation(found, tokens[:1], True).sequences, said.sequences)


@pytest.mark.parametrize("name", sorted(EXPERTS_STAY))
def test_what_routes_otherwise_is_refused_and_stays(name):
    model = mixture(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sh.ModelError, match=EXPERTS_STAY[name]):
        sh.drop_experts(model, {layer: [0] for layer in range(8)})
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("cut", [sh.drop_layers, lambda *cut: sh.without_layers(*cut).__enter__()])
def test_a_cut_without_room_for_its_parts_leaves_the_model_whole(cut, monkeypatch):
    model = mixture("mixtral")
    tensors, config = dict(model.named_parameters()), model.config.to_dict()
    part_of, calls = cutting.part_of, count()

    def part(*given, **more):
        if next(calls) == 7:
            raise torch.OutOfMemoryError("no room")
        return part_of(*given, **more)

    monkeypatch.setattr(cutting, "part_of", part)
    plan = sh.Plan(8, (), experts=DroppedExperts(6, some_experts(model)))
    with pytest.raises(torch.OutOfMemoryError):
        cut(model, plan)
    assert model.config.to_dict() == config
    assert all(value is tensors[name] for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "place"),
    mostly_slow(itertools.product(FAST, ["stream", "cpu"]), [("mixtral", "stream")]),
)
def test_experts_are_cut_as_offloaded_layers_are_read(name, place, tmp_path, words):
    sh.save_model(mixture(name), words, tmp_path / "model")
    whole, _ = sh.load_model(tmp_path / "model", dtype="float32", progress=False)
    if place == "stream":
        away, _ = sh.load_model(tmp_path / "model", "float32", "stream", progress=False)
    else:
        away = offloaded(mixture(name), range(8))
    assert any(weight.is_meta for weight in away.parameters())
    plan = sh.Plan(8, (), experts=DroppedExperts(NUM_EXPERTS, some_experts(whole)))
    cut = replace(plan, blocks=(Block(3, 5),), experts=plan.experts.without([3, 4]))
    before, found = sh.evaluate_loss(away, words, TEXTS), []
    for model in (whole, away):
        with sh.without_layers(model, cut):
            found.append(sh.evaluate_loss(model, words, TEXTS))
    assert found[0] == found[1] != before
    assert sh.evaluate_loss(away, words, TEXTS) == before
    for model, folder in ((whole, "a"), (away, "b")):
        sh.drop_experts(model, plan.experts.by_layer)
        sh.save_model(model, words, tmp_path / folder)
    found = (load_file(tmp_path / one / "model.safetensors") for one in "ab")
    first, second = (dict(sorted(one.items())) for one in found)
    assert [*first] == [*second]
    assert all(torch.equal(one, second[key]) for key, one in first.items())

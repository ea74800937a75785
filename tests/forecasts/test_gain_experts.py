"""What a cut of experts gains."""

import json

import pytest

import shallower as sh
from shallower.memory.weights import num_parameters
from shallower.results.gain import Gain
from tests.conftest import mostly_slow
from tests.cutting.mixtures import mixture, some_experts


@pytest.fixture(scope="module")
def model():
    return mixture("qwen2_moe", num_hidden_layers=3, layer_types=3 * ["full_attention"])


def test_what_is_left_is_counted(model):
    dropped = sh.DroppedExperts(6, some_experts(model))
    for layers in ((), (1, 2)):
        plan = sh.Plan.of(3, layers) if layers else sh.Plan(3, (), experts=dropped)
        plan = sh.Plan(3, plan.blocks, experts=dropped.without(layers))
        found = sh.gain(model, plan, device="a100-80", context=16)
        with sh.without_layers(model, plan):
            assert found.after.parameters == num_parameters(model)
        assert found.before.parameters == num_parameters(model)
        assert found.after.decode_flops < found.before.decode_flops or not layers
        assert Gain.from_json(json.loads(json.dumps(found.to_json()))) == found
        assert found.words == plan.words
    assert found.words == "[1, 3) and 2 of 6 experts a layer"


def test_experts_are_named_as_to_prune(shallower, model, tmp_path):
    sh.save_model(model, None, tmp_path / "model")
    dropped = sh.DroppedExperts(6, some_experts(model))
    expected = sh.gain(model, sh.Plan(3, (), experts=dropped), context=16, device="a100-80")
    options = {"context": 16, "device": "a100-80"}
    for experts in (dropped, dropped.by_layer):
        assert sh.gain(model, (), experts=experts, **options).after == expected.after
    (tmp_path / "experts.txt").write_text(str(dropped))
    command = [
        "gain",
        tmp_path / "model",
        "--context",
        16,
        "--forecast-device",
        "a100-80",
        "--json",
    ]
    command += ["--dtype", "float32"]
    for named in (dropped, tmp_path / "experts.txt"):
        done = shallower(*command, "--drop-experts", named)
        assert done.status == 0, done.err
        assert done.json["after"] == expected.to_json()["after"]
    assert "name the layers to drop" in shallower(*command).error


def test_experts_that_the_router_needs_stay(model):
    dropped = sh.DroppedExperts(6, some_experts(model, 5))
    with pytest.raises(sh.ExpertsError, match="keep at least 2"):
        sh.gain(model, sh.Plan(3, (), experts=dropped), device="a100-80")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Two mixtures of as many layers and experts, which is all that a config says of a cut."""
    folder = tmp_path_factory.mktemp("mixtures")
    found = {
        "qwen": mixture("qwen3_moe", mlp_only_layers=[], num_hidden_layers=2),
        "mixtral": mixture("mixtral", num_hidden_layers=2),
    }
    for name, model in found.items():
        model.save_pretrained(folder / name)
    plan = sh.prune(folder / "qwen", (), folder / "cut", experts=some_experts(found["qwen"]))
    return folder, found, plan


@pytest.mark.parametrize("by", mostly_slow(["place", "config", "memory"], ["place", "memory"]))
def test_a_plan_of_another_mixture_is_refused_as_prune_refuses_it(mixtures, by):
    folder, models, plan = mixtures
    own, other = (
        {"place": folder / name, "config": models[name].config, "memory": models[name]}[by]
        for name in ("mixtral", "qwen")
    )
    with pytest.raises(sh.PlanError, match="the plan was made for qwen"):
        sh.prune(folder / "mixtral", plan, folder / "out")
    with pytest.raises(sh.PlanError, match=r"the plan was made for qwen .* is another model"):
        sh.gain(own, plan, device="a100-80")
    assert sh.gain(other, plan, device="a100-80", context=16).experts == plan.experts

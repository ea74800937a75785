"""``shallower eval`` of a plan with experts."""

import json
from dataclasses import replace

import pytest

import shallower as sh
from shallower.values.experts import DroppedExperts
from tests.conftest import word_tokenizer
from tests.cutting.mixtures import mixture, some_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "mixture"
    sh.save_model(mixture("mixtral"), word_tokenizer(), place)
    return place


def test_a_plan_with_experts_is_measured_and_found_again(shallower, folder, texts, tmp_path):
    model, tokenizer = sh.load_model(folder, dtype="float32")
    plan = sh.Plan(8, (), experts=DroppedExperts.of(6, some_experts(model)))
    other = sh.Plan(8, (), experts=DroppedExperts.of(6, some_experts(model, seed=1)))
    plan.save(tmp_path / "plan.json")
    other.save(tmp_path / "other.json")
    held_out = [
        json.loads(line)["text"] for line in (texts / "held_out.jsonl").read_text().splitlines()
    ]
    command = ["eval", folder, "--texts", texts / "held_out.jsonl", "--dtype", "float32", "--plan"]
    first = shallower(*command, tmp_path / "plan.json", "--json")
    assert first.status == 0, first.err
    assert first.json["experts"] == plan.experts.to_json()
    assert first.json["drop"] == []
    with sh.without_layers(model, plan):
        loss = sh.evaluate_loss(model, tokenizer, held_out)
    assert first.json["cut"]["nats"] == pytest.approx(loss.nats, rel=1e-12)
    told = shallower(*command, tmp_path / "plan.json")
    assert "without 2 of 6 experts a layer" in told.out
    assert told.err.count("measured before") == 1
    second = shallower(*command, tmp_path / "other.json", "--json")
    assert second.json["cut"] != first.json["cut"]


def test_a_plan_with_experts_cannot_be_patched(folder, texts):
    model, tokenizer = sh.load_model(folder, dtype="float32")
    plan = sh.Plan.of(8, [3, 4])
    dropped = DroppedExperts.of(6, some_experts(model)).without([3, 4])
    with pytest.raises(sh.PatchError, match="also drops 2 experts a layer: prune by it"):
        sh.patch(model, tokenizer, replace(plan, experts=dropped), texts=["w1 w2 w3"] * 8)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_nor_by_the_command(shallower, folder, texts, tmp_path, options):
    model, _ = sh.load_model(folder, dtype="float32")
    sh.Plan(8, (), experts=DroppedExperts.of(6, some_experts(model))).save(tmp_path / "plan.json")
    command = ["patch", folder, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"]
    done = shallower(*command, "--texts", texts / "held_out.jsonl", *options)
    assert "also drops 2 experts a layer: prune by it" in done.error
    assert not (tmp_path / "out").exists()

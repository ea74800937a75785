"""``shallower eval`` of a plan with experts."""

import itertools
import json
from dataclasses import replace

import pytest

import shallower as sh
from shallower.results.speech import MEASURES, ON_WORDS
from shallower.values.experts import DroppedExperts
from shallower.values.layers import Block, blocks_of
from tests.conftest import mostly_slow, word_tokenizer
from tests.cutting.mixtures import mixture, some_experts

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "mixture"
    sh.save_model(mixture("mixtral", num_hidden_layers=NUM_LAYERS), word_tokenizer(), place)
    return place


def test_a_plan_with_experts_is_measured_and_found_again(shallower, folder, texts, tmp_path):
    model, tokenizer = sh.load_model(folder, dtype="float32")
    plan = sh.Plan(NUM_LAYERS, (), experts=DroppedExperts.of(6, some_experts(model)))
    other = sh.Plan(NUM_LAYERS, (), experts=DroppedExperts.of(6, some_experts(model, seed=1)))
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
    assert told.err.count("cached, measured") == 1
    second = shallower(*command, tmp_path / "other.json", "--json")
    assert second.json["cut"] != first.json["cut"]
    named = ("--drop-experts", plan.experts), ("--drop-experts", tmp_path / "plan.json")
    for cut in named:
        assert shallower(*command[:-1], *cut, "--json").json == first.json
    layers = replace(plan, blocks=(Block(1, 3),), experts=plan.experts.without([1, 2]))
    third = shallower(*command[:-1], "--drop", "1:3", "--drop-experts", layers.experts, "--json")
    with sh.without_layers(model, layers):
        loss = sh.evaluate_loss(model, tokenizer, held_out)
    assert third.json["cut"]["nats"] == pytest.approx(loss.nats, rel=1e-12)


@pytest.mark.parametrize(
    "options", [(), ("--stream",), ("--dry-run",), ("--shard", "1/2", "--out", "shards")]
)
def test_a_cut_that_cannot_be_is_refused_before_anything_is_read(
    shallower, folder, texts, options, monkeypatch
):
    monkeypatch.setattr("shallower.models.loading.load_weights", lambda *_, **__: 1 / 0)
    command = ["eval", folder, "--texts", texts / "held_out.jsonl", *options, "--drop-experts"]
    every = ";".join(f"{layer}:0:5" for layer in range(NUM_LAYERS))
    assert "keep at least 2" in shallower(*command, every).error
    assert "layer 1 would keep all of its 6 experts" in shallower(*command, "0:1").error


@pytest.mark.parametrize(
    ("layers", "place"),
    mostly_slow(itertools.product([(), (1, 2)], [(), ("--stream",)]), [((), ("--stream",))]),
)
def test_a_cut_by_a_plan_is_measured_as_the_cut_on_disk(shallower, folder, tmp_path, layers, place):
    model, _ = sh.load_model(folder, dtype="float32")
    dropped = DroppedExperts.of(6, some_experts(model)).without(layers)
    plan = sh.Plan(NUM_LAYERS, blocks_of(layers), experts=dropped)
    plan.save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(200)))
    asked = [json.dumps({"prompt": f"w{i} w{2 * i}"}) for i in range(1, 4)]
    (tmp_path / "asked.jsonl").write_text("\n".join(asked))
    cut = ["--plan", tmp_path / "plan.json"]
    assert shallower("prune", folder, *cut, "--out", tmp_path / "cut").status == 0
    options = ["--perplexity", tmp_path / "text.txt", "--context", 32, "--speech"]
    options += [tmp_path / "asked.jsonl", "--speech-tokens", 4, "--dtype", "float32", "--json"]
    expected = shallower("eval", tmp_path / "cut", "--against", folder, *options).json
    command = ["eval", folder, *cut, *options, *place]
    done = shallower(*command)
    assert done.status == 0, done.err
    found, speech = done.json, done.json["speech"]
    assert found["perplexity"]["cut"]["nats"] == pytest.approx(
        expected["perplexity"]["model"]["nats"], rel=1e-6
    )
    assert speech["words"] == expected["speech"]["words"]
    assert expected["speech"]["agreement"] < 1
    for name in ON_WORDS if place else MEASURES:
        assert speech[name] == pytest.approx(expected["speech"][name], rel=1e-5)
        lost = speech["difference"][name]["mean"]
        assert lost == pytest.approx(expected["speech"]["difference"][name]["mean"], rel=1e-4)
    told = shallower(*(one for one in command if one != "--json"))
    assert told.status == 0, told.err
    assert ("says nothing itself" in told.out) == bool(place)
    planned = shallower(*command, "--dry-run").json
    assert planned["drop"] == plan.words
    assert planned["stream"]["passes"] == 16 if place else "stream" not in planned


def test_a_plan_with_experts_cannot_be_patched(folder, texts):
    model, tokenizer = sh.load_model(folder, dtype="float32")
    plan = sh.Plan.of(NUM_LAYERS, [1, 2])
    dropped = DroppedExperts.of(6, some_experts(model)).without([1, 2])
    with pytest.raises(sh.PatchError, match="also drops 2 experts a layer: prune by it"):
        sh.patch(model, tokenizer, replace(plan, experts=dropped), texts=["w1 w2 w3"] * 8)

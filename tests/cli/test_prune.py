"""The command `prune`."""

import json

import pytest

from shallower import Plan
from shallower.models import loading
from tests.cli.documents import assert_cut, tree


def test_prune_drops_the_layers_that_are_named(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "0,3:5", "--out", "cut")
    assert done.status == 0
    assert_cut(folder / "cut", tiny, [1, 2, 5])
    plan = Plan.load(folder / "cut" / "shallower_plan.json")
    assert (plan.dropped, plan.strategy, plan.model.name) == ((0, 3, 4), "manual", "tiny")
    assert "plan: 3 of 6 layers" in done.out
    assert "[1, 3) [5, 6)" in done.out
    assert "wrote cut" in done.out.splitlines()


@pytest.mark.parametrize("name", ["", "shallower_plan.json"])
def test_prune_carries_out_a_plan(shallower, folder, tiny, plans, name):
    plan = Plan.load(plans / "tiny" / "shallower_plan.json")
    done = shallower("prune", tiny, "--plan", plans / "tiny" / name, "--out", "cut", "--json")
    assert done.json == {**plan.to_json(), "max_logits_difference": None, "written": "cut"}
    assert_cut(folder / "cut", tiny, plan.survivors)
    assert Plan.load(folder / "cut" / "shallower_plan.json") == plan


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_prune_verifies(shallower, tiny, dtype, most):
    command = ["prune", tiny, "--drop", "1:3", "--verify", "--dtype", dtype]
    assert 0 <= shallower(*command, "--out", "a", "--json").json["max_logits_difference"] <= most
    assert "logits differ by at most" in shallower(*command, "--out", "b").out


@pytest.fixture
def never_loaded(monkeypatch):
    """Loading a model is an error."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("options", [[], ["--dtype", "float32"]])
def test_prune_cuts_a_folder_without_loading_it(shallower, folder, tiny, never_loaded, options):
    done = shallower(
        "prune", tiny, "--drop", "0,3:5", "--out", "cut", "--max-shard-size", "30KB", *options
    )
    assert done.status == 0
    assert_cut(folder / "cut", tiny, [1, 2, 5])
    assert len(list((folder / "cut").glob("*.safetensors"))) > 1
    stored = json.loads((folder / "cut" / "config.json").read_text())
    assert (stored["num_hidden_layers"], stored["dtype"]) == (3, "float32")


def test_prune_says_how_much_it_would_write(shallower, folder, tiny, never_loaded):
    done = shallower("prune", tiny, "--drop", "1", "--out", "cut", "--dry-run", "--json").json
    assert tree(folder) == {}
    shallower("prune", tiny, "--drop", "1", "--out", "cut")
    assert done["bytes"] == (folder / "cut" / "model.safetensors").stat().st_size
    refused = shallower(
        "prune", tiny, "--drop", "1", "--out", "c", "--max-shard-size", "x", "--dry-run"
    )
    assert "'x'" in refused.error


def test_prune_refuses_a_shard_size_that_it_cannot_keep(shallower, folder, tiny, never_loaded):
    command = ["prune", tiny, "--drop", "1", "--out", "cut", "--max-shard-size", "1GB"]
    assert "--max-shard-size goes with" in shallower(*command, "--dtype", "float16").error
    assert tree(folder) == {}


def test_prune_verifies_a_cut_on_disk(shallower, tiny):
    command = ["prune", tiny, "--drop", "1:3", "--verify", "--json", "--out", "cut"]
    assert shallower(*command).json["max_logits_difference"] == 0


@pytest.mark.parametrize(
    ("command", "plan"),
    [
        ("prune --out cut", "twin"),
        ("prune --out cut", "deeper"),
        ("prune --out cut --dry-run", "deeper"),
        ("eval --texts {texts}", "twin"),
        ("eval --texts {texts}", "deeper"),
    ],
)
def test_a_plan_of_another_model_is_refused(shallower, folder, tiny, plans, jsonl, command, plan):
    name, *options = command.format(texts=jsonl).split()
    message = shallower(name, tiny, "--plan", plans / plan, *options).error
    assert "plan" in message
    assert "tiny" in message
    assert tree(folder) == {}


def test_a_refusal_names_the_option_that_replaces(shallower, tiny, plans):
    assert "--overwrite" in shallower("prune", tiny, "--drop", "1", "--out", plans).error


def test_prune_replaces_only_when_told_so(shallower, folder, tiny):
    assert shallower("prune", tiny, "--drop", "1", "--out", "cut").status == 0
    before = tree(folder)
    refused = shallower("prune", tiny, "--drop", "1:4", "--out", "cut")
    assert "cut exists already" in refused.error
    assert tree(folder) == before
    assert shallower("prune", tiny, "--drop", "1:4", "--out", "cut", "--overwrite").status == 0
    assert_cut(folder / "cut", tiny, [0, 4, 5])
    assert [path.name for path in folder.iterdir()] == ["cut"]


def test_prune_replaces_a_file_when_told_so(shallower, folder, tiny):
    (folder / "cut").write_text("a file")
    assert shallower("prune", tiny, "--drop", "1", "--out", "cut", "--overwrite").status == 0
    assert_cut(folder / "cut", tiny, [0, 2, 3, 4, 5])
    assert [path.name for path in folder.iterdir()] == ["cut"]


def test_prune_does_not_replace_the_folder_that_one_is_in(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "1", "--out", ".", "--overwrite")
    assert "it is the current folder" in done.error
    assert tree(folder) == {}

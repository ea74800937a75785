"""The command `prune`."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shallower as sh
from shallower import Plan
from shallower.models import loading
from tests.cutting.checkpoints import stored
from tests.cutting.mixtures import mixture
from tests.folders import tree
from tests.models.gguf_files import write_gguf


def assert_cut(path, model, survivors):
    """``path`` holds the layers ``survivors`` of the checkpoint ``model``, bit for bit."""
    cut, whole = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in (path, model)
    )
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(survivors)
    for layer, index in zip(cut.model.layers, survivors, strict=True):
        original = whole.model.layers[index].state_dict()
        assert all(torch.equal(layer.state_dict()[name], original[name]) for name in original)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("w1 w2")["input_ids"] == [1, 2]


def test_prune_drops_the_layers_that_are_named(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "0,3:5", "--out", "cut")
    assert done.status == 0
    assert_cut(folder / "cut", tiny, [1, 2, 5])
    plan = Plan.load(folder / "cut" / "shallower_plan.json")
    assert (plan.dropped, plan.strategy, plan.model.name) == ((0, 3, 4), "manual", "tiny")
    assert "plan: 3 of 6 layers" in done.out
    assert "[1, 3) [5, 6)" in done.out
    assert done.out.splitlines()[-2:] == ["wrote cut", "to upload it: hf upload USER/NAME cut"]


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


def test_a_plain_cut_of_a_gguf_file_says_what_becomes_of_its_bytes(shallower, folder):
    write_gguf(folder / "tiny.gguf")
    for out in ("made", "made"):  # and where it is already there
        said = shallower("prune", "tiny.gguf", "--drop", "1", "--out", out).out
        assert "tiny.gguf has 1 MB of quantised weights; they were dequantised, and what" in said
        assert "shallower prune tiny.gguf --drop 1 --as-gguf --out CUT cuts the file" in said
    for options in (["--out", "cut.gguf"], ["--out", "cut", "--as-gguf"]):
        assert "quantised" not in shallower("prune", "tiny.gguf", "--drop", "1", *options).out


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
    said = shallower("prune", tiny, "--drop", "1", "--out", "cut", "--dry-run").out
    assert re.search(r"^disk: a few MB of [\d.]+ [TG]B that are free\nwould write ", said, re.M)
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


def test_prune_does_not_replace_the_folder_that_one_is_in(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "1", "--out", ".", "--overwrite")
    assert "it is the current folder" in done.error
    assert tree(folder) == {}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A random Mixtral of 8 layers with 6 experts each, two of them for a token."""
    folder = tmp_path_factory.mktemp("mixed") / "mix"
    mixture("mixtral").save_pretrained(folder)
    return folder


def experts_of(layers):
    return ";".join(f"{layer}:1,4:6" for layer in layers)


def test_prune_drops_experts(shallower, folder, mixed):
    done = shallower("prune", mixed, "--drop-experts", experts_of(range(8)), "--out", "cut")
    assert done.status == 0
    assert "plan: 0 of 8 layers, 3 of 6 experts" in done.out
    assert json.loads((folder / "cut" / "config.json").read_text())["num_local_experts"] == 3
    lines = "".join(f"{i}: 1, 4:6  # first; last\r\n" for i in range(8))
    (folder / "experts.txt").write_text(lines, encoding="utf-8-sig")
    for options in (
        ["--drop-experts", "experts.txt"],
        ["--drop-experts", "cut"],
        ["--drop-experts", "cut/shallower_plan.json"],
        ["--plan", "cut"],
    ):
        name = options[-1].replace(".", "_").replace("/", "_") + options[0]
        again = shallower("prune", mixed, *options, "--out", name, "--json")
        assert again.json["experts"]["num_experts"] == 6
        assert stored(folder / name) == stored(folder / "cut")


def test_a_cut_does_not_replace_the_file_that_names_its_experts(shallower, folder, mixed):
    (folder / "cut").mkdir()
    (folder / "cut" / "experts.txt").write_text(experts_of(range(8)).replace(";", "\n"))
    before, words = tree(folder), "it holds cut/experts.txt, which is read"
    options = ("--drop-experts", "cut/experts.txt", "--out", "cut", "--overwrite")
    assert words in shallower("prune", mixed, *options).error
    with pytest.raises(sh.OutputError, match=words):
        sh.prune(mixed, (), "cut", experts="cut/experts.txt", overwrite=True)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--drop-experts", "0:1"],
            "layer 1 would keep all of its 6 experts, and a config has one",
        ),
        (["--drop-experts", "0:x"], "'x'"),
        (["--drop-experts", "gone.txt"], "'gone.txt' is neither experts"),
        (["--drop-experts", "gone.json"], "cannot read the plan gone.json"),
        (["--drop", "3", "--drop-experts", experts_of(range(8))], "layer 3 goes whole"),
    ],
)
def test_experts_that_cannot_go_are_refused_in_a_sentence(shallower, folder, mixed, options, words):
    message = shallower("prune", mixed, *options, "--out", "cut").error
    assert words in message
    assert tree(folder) == {}

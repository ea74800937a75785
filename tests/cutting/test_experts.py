"""Experts cut out of every family, in memory and on disk, and reloaded by stock transformers.

On disk the oracle is the cut in memory, which is compared with the uncut model.
"""

import copy
import itertools
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file

import shallower as sh
from shallower.cutting import checkpoint
from shallower.cutting import experts as cutting
from shallower.cutting.checkpoint import identity_of
from shallower.cutting.prune import plan_prune
from shallower.healing.job import LoadedOnce
from shallower.models.experts import find_experts
from shallower.models.source import ModelSource
from shallower.values.experts import DroppedExperts
from shallower.values.layers import Block
from tests.conftest import mostly_slow
from tests.cutting.checkpoints import read_json, stored
from tests.cutting.mixtures import NUM_EXPERTS, mixture, some_experts, unchosen
from tests.cutting.test_checkpoint import FRESH
from tests.cutting.test_families import check_generation, generation, logits, reload
from tests.cutting.tiny_models import reload as stock
from tests.documents import documents
from tests.families import EXPERTS_STAY, MIXTURES, SCALES
from tests.folders import tree
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


TOKENS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(2))
PLAIN = ["granitemoe", "mixtral", "olmoe"]
"""Whose checkpoints are cut by their config alone."""


@pytest.mark.parametrize(
    "name", mostly_slow([*FAST, "ernie4_5_moe", "qwen2_moe"], ["gpt_oss", "mixtral"])
)
def test_a_checkpoint_in_the_names_of_the_model_is_cut_alike(name, tmp_path):
    """Stacks where transformers saves single experts; it loads either."""
    model = mixture(name)
    model.save_pretrained(tmp_path / "whole")
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    dropped = some_experts(model)
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=dropped)
    sh.drop_experts(model, dropped)
    assert torch.equal(logits(stock(tmp_path / "cut"), TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("name", ["gpt_oss", "lara_mini", "llama4_text"])
def test_a_checkpoint_of_single_experts_is_cut_alike(name, tmp_path):
    """Where transformers saves stacks, whatever an expert's part is called."""
    model = mixture(name)
    model.save_pretrained(tmp_path / "whole")
    dropped = some_experts(model)
    paths = {one.layer: one.path for one in find_experts(model)}
    tensors = {}
    for key, value in model.state_dict().items():
        number, _, rest = key.removeprefix("model.layers.").partition(".")
        path = paths.get(int(number)) if number.isdecimal() else None
        if path and rest.startswith(f"{path}."):
            for expert, part in enumerate(value):
                single = key.replace(".experts.", f".experts.{expert}.")
                tensors[single] = part.clone()
        else:
            tensors[key] = value.clone()
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=dropped)
    sh.drop_experts(model, dropped)
    cut = stored(tmp_path / "cut")
    for layer, path in paths.items():
        stacked = model.get_submodule(f"model.layers.{layer}.{path}").state_dict()
        for key, value in stacked.items():
            for expert, part in enumerate(value):
                single = cut[f"model.layers.{layer}.{path}.{expert}.{key}"]
                assert single.content == part.contiguous().numpy().tobytes()
    kept = NUM_EXPERTS - 2
    assert not any(f".experts.{kept}." in key for key in cut)


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_config_alone_says_is_what_the_model_says(name, tmp_path, monkeypatch):
    model = mixture(name)
    model.save_pretrained(tmp_path / "whole")
    dropped = some_experts(model)
    raw = read_json(tmp_path / "whole" / "config.json")
    names = stored(tmp_path / "whole")
    assert checkpoint.plain_model(tmp_path / "whole", raw, names).routing is not None
    sh.prune(tmp_path / "whole", [2], tmp_path / "plain", experts=_without(dropped, 2))
    monkeypatch.setattr(checkpoint, "plain_model", lambda *_: None)
    sh.prune(tmp_path / "whole", [2], tmp_path / "built", experts=_without(dropped, 2))
    assert tree(tmp_path / "plain") == tree(tmp_path / "built")


def _without(experts, layer):
    return {index: some for index, some in experts.items() if index != layer}


def test_what_is_stored_otherwise_is_looked_up_in_the_model(tmp_path):
    model = mixture("mixtral")
    model.save_pretrained(tmp_path)
    raw = read_json(tmp_path / "config.json")
    names = [*stored(tmp_path)]
    strange = [*names, "model.layers.0.block_sparse_moe.bias"]
    assert checkpoint.plain_model(tmp_path, raw, strange) is None
    assert checkpoint.plain_model(tmp_path, raw | {"num_experts": 6}, names) is None
    assert checkpoint.plain_model(tmp_path, raw | {"num_experts_per_tok": None}, names) is None


def test_a_count_under_two_names_is_changed_under_both(tmp_path):
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    text = path.read_text()
    path.write_text(text.replace("{", '{"num_experts": 6, "of_someone": [6],', 1))
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=some_experts(model))
    edited = read_json(tmp_path / "cut" / "config.json")
    assert (edited["num_experts"], edited["num_local_experts"]) == (4, 4)
    assert edited["of_someone"] == [6]


def test_a_mixture_in_another_dtype_is_cut_in_memory(tmp_path, words):
    model = mixture("mixtral")
    sh.save_model(model, words, tmp_path / "whole")
    text = ";".join(f"{layer}:{some[0]},{some[1]}" for layer, some in some_experts(model).items())
    options = {"experts": text, "dtype": "bfloat16"}
    planned = plan_prune(tmp_path / "whole", (), tmp_path / "cut", **options)
    assert planned.way == "memory"
    plan = sh.prune(tmp_path / "whole", (), tmp_path / "cut", verify=True, **options)
    assert str(plan.experts) == text
    assert find_experts(stock(tmp_path / "cut"))[0].num_experts == 4
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert {path.name for path in planned.files if "*" not in path.name} <= names


@pytest.mark.parametrize("name", mostly_slow(PLAIN, ["mixtral"]))
def test_a_plain_mixture_is_cut_without_torch_and_in_little_memory(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "whole")
    folders = f"{str(tmp_path / 'whole')!r}, (), {str(tmp_path / 'cut')!r}"
    experts = {layer: [1, 4] for layer in range(8)}
    call = f"import shallower; shallower.prune({folders}, experts={experts})"
    code = textwrap.dedent(FRESH.replace("{}", call, 1))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, *heavy = done.stderr.splitlines()[-1].split()
    assert heavy == []
    assert float(peak) < 64
    assert read_json(tmp_path / "cut" / "config.json")["hidden_size"] == 32


@pytest.fixture
def whole_and_cut(words, tmp_path):
    """A mixture, and what a plan of experts leaves of it, with the tokenizer of both."""
    model = mixture("mixtral")
    sh.save_model(model, words, tmp_path / "whole")
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=some_experts(model))
    return tmp_path / "whole", tmp_path / "cut"


def test_a_plan_of_the_whole_does_not_cut_the_cut(whole_and_cut, tmp_path):
    """By layers, which are as many in both: on disk, in memory, and as a teacher."""
    whole, cut = whole_and_cut
    plan = replace(sh.Plan.of(8, [1]), model=identity_of(whole))
    sh.prune(whole, plan, tmp_path / "fits")
    for taken in (
        lambda: sh.prune(cut, plan, tmp_path / "out"),
        lambda: sh.prune(cut, plan, tmp_path / "out", dtype="bfloat16"),
        lambda: sh.drop_layers(sh.load_model(cut, "float32")[0], plan),
        lambda: sh.without_layers(sh.load_model(cut, "float32")[0], plan).__enter__(),
        lambda: sh.gain(cut, plan, device="a100-80"),
        lambda: LoadedOnce(ModelSource(str(cut)), plan).load("float32"),
    ):
        with pytest.raises(sh.PlanError, match=r"the plan was made for whole .* cut is another"):
            taken()
    assert not (tmp_path / "out").exists()

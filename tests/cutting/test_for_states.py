"""Cuts for inner hidden states: equal to the bit after a stock reload, or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralModel,
    Qwen3Model,
)

import shallower as sh
from shallower.cutting.checkpoint import PreparedCut
from shallower.cutting.gguf import PreparedGguf
from shallower.healing.folders import plan_of_cut
from shallower.models.architecture import find_layers
from tests.cutting.checkpoints import edit_json, read_json
from tests.cutting.mixtures import mixture
from tests.cutting.tiny_models import GATED, GEMMA3, MISTRAL, QWEN3, build
from tests.families import with_towers
from tests.folders import tree
from tests.models.gguf_files import write_gguf

SHAPES = {
    "qwen3": QWEN3,
    "qwen3 without a head": (Qwen3Model, *QWEN3[1:]),
    "gemma3": GEMMA3,
    "gemma3 without a head": (Gemma3TextModel, *GEMMA3[1:]),
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "mistral": MISTRAL,
    "mistral without a head": (MistralModel, *MISTRAL[1:]),
    "mistral with a window everywhere": (
        *MISTRAL[:2],
        {**MISTRAL[2], "sliding_window": 80, "max_position_embeddings": 256},
    ),
}
IDS = torch.tensor([[(11 * i + 3) % 90 + 3 for i in range(23)], list(range(30, 53))])
MASK = torch.ones_like(IDS)
MASK[1, 14:] = 0


def saved(name, folder, dtype=torch.float32):
    """A model alone, without a tokenizer, as image pipelines store their text encoders."""
    model = build(*SHAPES[name]).to(dtype)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)  # whose tables of rotary angles stay float32


def inputs_of_layers(model):
    """What each layer of a model receives, whatever the model says of it."""
    found = []
    for layer in find_layers(model).modules:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    return found


def states_of(model):
    with torch.no_grad():
        return model(
            input_ids=IDS, attention_mask=MASK, use_cache=False, output_hidden_states=True
        ).hidden_states


def assert_lossless(cut, inputs, states):
    """A stock reload gives the states, and has no more layers than it takes."""
    named = read_json(cut / "config.json")["architectures"]
    kind = AutoModelForCausalLM if named[0].endswith("CausalLM") else AutoModel
    model, info = kind.from_pretrained(cut, output_loading_info=True)
    assert not any(info.values())
    found = states_of(model)
    assert len(found) == max(states) + 2
    for state in states:
        assert torch.equal(found[state], inputs[state])


@pytest.mark.parametrize("states", [(0,), (3, 1), (1, 2, 4)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_states_are_those_of_the_whole_model(tmp_path, name, states):
    inputs = inputs_of_layers(saved(name, tmp_path / "whole"))
    plan = sh.prune(tmp_path / "whole", sh.ForStates(states), tmp_path / "cut", progress=False)
    assert (plan.states, plan.strategy) == (tuple(sorted(states)), "states")
    assert plan.survivors == tuple(range(max(states) + 1))
    assert sh.Plan.load(tmp_path / "cut" / "shallower_plan.json") == plan
    assert_lossless(tmp_path / "cut", inputs, states)


REFUSED = {
    (-2,): r"state -2 counts from the end, where layers go: expected states from 0 on \(of 6 ",
    (1, 7): r"the model has no state 7: its 6 layers have the states 0 \.\. 6",
    (6,): "state 6 of 6 layers needs all of them, since the last state .* behind the final norm",
    (1, 5): "state 5 of 6 layers needs all of them, since the last state",
    (): "no state is named",
    ("a",): "expected an integer",
    (1.5,): "expected an integer",
    "9": "'9' names no states: expected integers",
    4: "4 names no states: expected integers",
}


@pytest.mark.parametrize("states", REFUSED)
def test_states_that_cannot_be_are_refused(tmp_path, states):
    saved("llama", tmp_path / "whole")
    before = tree(tmp_path)
    with pytest.raises(sh.LayersError, match=REFUSED[states]):
        sh.prune(tmp_path / "whole", sh.ForStates(states), tmp_path / "cut")
    assert tree(tmp_path) == before


def test_states_are_in_order_and_each_is_there_once():
    assert sh.ForStates([3, 1, 3]) == sh.ForStates((1, 3)) == sh.ForStates.parse(" 3, 1")
    for text in ("", "1,", "1:3", "one", "9 18"):
        with pytest.raises(sh.LayersError, match="cannot read the states"):
            sh.ForStates.parse(text)


def test_experts_stay(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "whole")
    experts = {layer: [1] for layer in range(4)}
    plan = sh.Plan(8, (), experts=sh.DroppedExperts.of(8, experts))
    for named in (experts, plan):
        with pytest.raises(sh.ExpertsError, match="states need all experts"):
            sh.prune(tmp_path / "whole", sh.ForStates([3]), tmp_path / "cut", experts=named)


# The comparison can fail.
def spoiling(monkeypatch, kind, spoil):
    """What a cut writes is damaged before it is compared."""
    write = kind.write

    def damaged(self, *args, check, **options):
        def spoiled(made):
            spoil(made)
            check(made)

        write(self, *args, check=spoiled, **options)

    monkeypatch.setattr(kind, "write", damaged)


def shifted(name):
    """Damages a tensor of a checkpoint."""

    def shift(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name] += 1e-3
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return shift


def reconfigured(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


SPOILED = {
    "a layer": ("qwen3", shifted("model.layers.1.mlp.down_proj.weight"), 3),
    "the embeddings": ("qwen3", shifted("model.embed_tokens.weight"), 1),
    "an epsilon": ("llama", reconfigured(rms_norm_eps=1e-3), 1),
    "kinds of attention": ("qwen3", reconfigured(layer_types=["sliding_attention"] * 4), 1),
    "a window that is longer than most texts": (
        "mistral with a window everywhere", reconfigured(sliding_window=None), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_cut_that_differs_is_removed(tmp_path, monkeypatch, name):
    shape, spoil, state = SPOILED[name]
    saved(shape, tmp_path / "whole")
    sh.prune(tmp_path / "whole", [2], tmp_path / "earlier")
    before = tree(tmp_path)
    spoiling(monkeypatch, PreparedCut, spoil)
    for out in ("cut", "earlier"):
        with pytest.raises(sh.ModelError, match=rf"{out} is not lossless.* state {state} is off"):
            sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / out, overwrite=True)
        assert tree(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "earlier"}


def test_what_no_state_depends_on_may_differ(tmp_path, monkeypatch):
    """The layer behind the last state is there for its place alone."""
    saved("llama", tmp_path / "whole")
    spoiling(monkeypatch, PreparedCut, shifted("model.layers.3.mlp.down_proj.weight"))
    sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / "cut")
    assert (tmp_path / "cut").is_dir()


# The other ways to cut.
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device_map": "stream"}], ids=str)
def test_a_model_that_is_loaded(tmp_path, words, options):
    """In memory or, where it does not fit there, layer by layer."""
    model = saved("llama", tmp_path / "whole")
    words.save_pretrained(tmp_path / "whole")
    sh.prune(tmp_path / "whole", sh.ForStates([2]), tmp_path / "cut", **options)
    dtype = options.get("dtype", "float32")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert_lossless(tmp_path / "cut", inputs_of_layers(whole), [2])
    plan = sh.drop_layers(model, sh.ForStates([2]))
    assert (plan.states, plan.survivors) == ((2,), (0, 1, 2))


@pytest.mark.parametrize("as_gguf", [False, True])
def test_a_gguf_file(tmp_path, monkeypatch, as_gguf):
    write_gguf(tmp_path / "whole.gguf")
    out = tmp_path / ("cut" if as_gguf else "cut.gguf")
    plan = sh.prune(tmp_path / "whole.gguf", sh.ForStates([1]), out, as_gguf=as_gguf)
    file = out / "cut.gguf" if as_gguf else out
    whole, cut = (sh.load_model(one, dtype="float32")[0] for one in (tmp_path / "whole.gguf", file))
    found = states_of(cut)
    assert (plan.survivors, len(found)) == ((0, 1), 3)
    assert torch.equal(found[1], inputs_of_layers(whole)[1])
    before = tree(tmp_path)

    def zero(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))

    spoiling(monkeypatch, PreparedGguf, zero)
    again = tmp_path / ("again" if as_gguf else "again.gguf")
    with pytest.raises(sh.ModelError, match="state 1 is off by up to"):
        sh.prune(tmp_path / "whole.gguf", sh.ForStates([1]), again, as_gguf=as_gguf)
    assert tree(tmp_path) == before


# What is told.
def test_the_plan_says_why_and_is_carried_out_again(tmp_path):
    inputs = inputs_of_layers(saved("qwen3", tmp_path / "whole"))
    plan = sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / "cut")
    assert plan.why == (
        "states 1, 3 of 6 layers need [0, 4): the last state of a stock model is behind the final "
        "norm, so layer 3 stays"
    )
    assert sh.prune(tmp_path / "whole", tmp_path / "cut", tmp_path / "again") == plan
    assert_lossless(tmp_path / "again", inputs, [1, 3])
    assert tree(tmp_path / "again") == tree(tmp_path / "cut")
    same = sh.Plan.of(6, [range(4, 6)])
    assert (same.key, same.gone) == (plan.key, plan.gone)  # what was measured of one is known


def test_the_card_says_what_it_is_for(tmp_path, monkeypatch, shallower):
    inputs = inputs_of_layers(saved("llama", tmp_path / "whole"))
    (tmp_path / "whole" / "README.md").write_text("---\npipeline_tag: text-generation\n---\nIt.")
    sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "**This model is for its hidden states 1, 3**, which are those of its source" in card
    assert "pipeline_tag: feature-extraction" in card
    assert "| why | states 1, 3 of 6 layers need [0, 4): " in card
    for word in ("not healed", "vllm", "held-out loss", "AutoTokenizer"):
        assert word not in card
    *_, loading = card.split("```python\n")
    monkeypatch.chdir(tmp_path / "cut")
    place = {}
    exec(loading.split("```")[0], place)
    assert torch.equal(states_of(place["encoder"])[3], inputs[3])
    assert "--for-states 1,3 --out cut" in card
    assert "sh.prune('SOURCE', sh.ForStates([1, 3]), 'cut')" in card


def test_it_is_neither_patched_nor_healed(tmp_path, words):
    model = saved("llama", tmp_path / "whole")
    plan = sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / "cut")
    with pytest.raises(sh.PatchError, match="lossless for its states, which a patch changes"):
        sh.patch(model, words, plan, texts=["w1 w2 w3"])
    with pytest.raises(sh.PlanError, match="lossless for its states, which a healing changes"):
        plan_of_cut(str(tmp_path / "cut"))


DAMAGED = [
    {"states": [1]}, {"states": [3, 1]}, {"states": [1, 1, 3]}, {"states": [-1, 3]},
    {"states": [5]}, {"states": [9]}, {"states": ["3"]}, {"states": 3}, {"states": None},
    {"strategy": "manual"}, {"drop": [{"start": 5, "stop": 6, "score": None, "stderr": None}]},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED)
def test_a_plan_whose_states_do_not_fit_is_refused(tmp_path, change):
    data = {**sh.ForStates([1, 3]).plan(6).to_json(), **change}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(sh.PlanError):
        sh.Plan.load(tmp_path / "plan.json")


# The command.
@pytest.fixture
def whole(folder, words):
    saved("llama", folder / "whole")
    words.save_pretrained(folder / "whole")
    return "whole"


def test_the_command_says_what_stays_and_why(shallower, whole):
    command = ["prune", whole, "--for-states", "3,1", "--out", "cut"]
    planned = shallower(*command, "--dry-run")
    assert "why: states 1, 3 of 6 layers need [0, 4): the last state" in planned.out
    assert not Path("cut").exists()
    done = shallower(*command)
    assert done.status == 0, done.err
    assert "states 1, 3 of 6 layers need [0, 4): the last state of a stock model" in done.out
    assert "the states are those of the whole model, to the bit" in done.out
    again = shallower("prune", whole, "--for-states", "1,3", "--out", "cut")
    assert again.out == done.out
    assert "cut is already there" in again.err
    assert shallower(*command, "--json").json["states"] == [1, 3]
    for other in (["--drop", "4:6"], ["--for-states", "2,3"]):
        assert "cut exists already" in shallower("prune", whole, *other, "--out", "cut").error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--for-states 1 --drop 3", "--for-states decides what goes: name no layers"),
        ("--for-states 1 --drop-experts 0:1", "and no experts (--drop-experts)"),
        ("--for-states 1,x", "cannot read the states '1,x': expected integers such as 9,18,27"),
    ],
)
def test_the_command_refuses(shallower, whole, options, said):
    assert said in shallower("prune", whole, *options.split(), "--out", "cut").error
    assert not Path("cut").exists()


# Text encoders that read images, too, as those of FLUX.2 [dev] and Qwen-Image.
@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl"])
def test_an_encoder_of_images_and_text(tmp_path, name):
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(with_towers(name)).save_pretrained(tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    sh.prune(tmp_path / "whole", sh.ForStates([1, 3]), tmp_path / "cut")
    cut, read = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert not any(read.values())
    expected, found = states_of(whole), states_of(cut)
    assert (len(expected), len(found)) == (9, 5)
    assert all(torch.equal(found[state], expected[state]) for state in (1, 3))

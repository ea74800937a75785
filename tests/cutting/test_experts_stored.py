"""Experts in checkpoints of other formats; and what is refused, with nothing written."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import shallower as sh
from shallower.values.experts import DroppedExperts
from tests.conftest import mostly_slow, tiny_llama
from tests.cutting.checkpoints import edit_json, read_json, stored
from tests.cutting.mixtures import mixture, some_experts
from tests.cutting.test_checkpoint_formats import FORMATS
from tests.cutting.test_experts import TOKENS
from tests.cutting.test_families import logits
from tests.cutting.tiny_models import reload
from tests.families import EXPERTS_STAY
from tests.folders import tree
from tests.models.gguf_files import write_gguf

DROPPED = {layer: [1, 4] for layer in range(8)}
KEPT = [0, 2, 3, 5]


@pytest.fixture
def source(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def rewrite(folder, change):
    """Give a checkpoint other tensors: ``change`` takes and gives them by name."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def assert_refused(error, words, source, what=(), **options):
    out = source.parent / "cut"
    before = tree(source.parent)
    with pytest.raises(error, match=words) as refused:
        sh.prune(source, what, out, **options)
    assert "\n" not in str(refused.value)
    assert tree(source.parent) == before


@pytest.mark.parametrize("method", FORMATS)
def test_quantised_single_experts_are_renamed_and_copied(method, source):
    def quantised(tensors):
        made = {}
        for name, value in tensors.items():
            module, _, _leaf = name.rpartition(".")
            if ".experts." not in name:
                made[name] = value
                continue
            for position, (part, dtype) in enumerate(FORMATS[method].items()):
                seed = sum(map(int, re.findall(r"\d+", name)))
                made[f"{module}.{part}"] = torch.full((seed, 8), position + 1).to(dtype)
        return made

    rewrite(source, quantised)
    ignored = [f"model.layers.2.block_sparse_moe.experts.{j}.w1" for j in range(6)]
    ignored += ["model.layers.1.block_sparse_moe.gate", r"re:.*gate$"]
    quantisation = {"quant_method": method, "ignore": ignored}
    edit_json(source / "config.json", quantization_config=quantisation)
    before = stored(source)
    out = source.parent / "cut"
    sh.prune(source, [range(1)], out, experts={k: v for k, v in DROPPED.items() if k})
    expected = {}
    for name, tensor in before.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if match and match[1] == "0":
            continue
        if match:
            name = f"model.layers.{int(match[1]) - 1}.{match[2]}"
        expert = re.search(r"experts\.(\d)", name)
        if expert and int(expert[1]) not in KEPT:
            continue
        if expert:
            name = name.replace(expert[0], f"experts.{KEPT.index(int(expert[1]))}")
        if name.endswith("gate.weight") and match:
            rows = [tensor.content[at * 128 : (at + 1) * 128] for at in KEPT]
            tensor = tensor._replace(shape=[4, 32], content=b"".join(rows))
        expected[name] = tensor
    assert stored(out) == expected
    edited = read_json(out / "config.json")
    kept = [f"model.layers.1.block_sparse_moe.experts.{j}.w1" for j in range(4)]
    assert edited["quantization_config"]["ignore"] == [
        *kept, "model.layers.0.block_sparse_moe.gate", r"re:.*gate$",
    ]  # fmt: skip
    assert edited["num_local_experts"] == 4


def test_a_regex_that_tells_experts_apart_is_refused(source):
    quantisation = {"quant_method": "x", "ignore": [r"re:.*experts\.[0-2]\.w1"]}
    edit_json(source / "config.json", quantization_config=quantisation)
    assert_refused(sh.ModelError, "distinguishes experts by number", source, experts=DROPPED)


def packed(tensors):
    """Of gpt-oss, weights of experts in MXFP4: blocks of 32 in 16 bytes, and their exponents."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = value.to(torch.bfloat16)
            continue
        experts, rows, columns = value.shape[0], value.shape[2], value.shape[1]
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, shape[:-1], generator=generator, dtype=torch.uint8)
        made[f"{name}_blocks"], made[f"{name}_scales"] = blocks, scales
    return made


@pytest.mark.filterwarnings("ignore")
def test_experts_of_a_checkpoint_in_mxfp4_go_with_blocks_and_scales(tmp_path):
    model = mixture("gpt_oss", intermediate_size=64)
    model.save_pretrained(tmp_path / "whole")
    rewrite(tmp_path / "whole", packed)
    quantisation = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.mlp.router"],
    }
    edit_json(tmp_path / "whole" / "config.json", quantization_config=quantisation)
    dropped = some_experts(model)
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=dropped)
    whole, cut = reload(tmp_path / "whole"), reload(tmp_path / "cut")
    before = logits(whole, TOKENS)
    sh.drop_experts(whole, dropped)
    wanted = logits(whole, TOKENS)
    assert not torch.equal(before, wanted)
    assert torch.equal(logits(cut, TOKENS), wanted)


def test_scales_of_a_router_and_of_shared_experts_are_told_apart(tmp_path):
    model = mixture("qwen2_moe")
    model.save_pretrained(tmp_path / "whole")
    gate = "model.layers.0.mlp.gate"
    scales = {
        f"{gate}.weight_scale": torch.arange(6.0)[:, None],
        f"{gate}.input_scale": torch.ones(()),
        "model.layers.0.mlp.shared_expert.up_proj.weight_scale": torch.arange(6.0)[:, None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(6.0),
    }
    mixed = {
        name.replace(".0.", f".{i}.", 1): value.clone()
        for name, value in scales.items()
        for i in (0, 2, 3, 5, 6, 7)
    }
    rewrite(tmp_path / "whole", lambda tensors: tensors | mixed)
    dropped = some_experts(model)
    sh.prune(tmp_path / "whole", (), tmp_path / "cut", experts=dropped)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    kept = [expert for expert in range(6) if expert not in dropped[0]]
    assert cut[f"{gate}.weight_scale"].flatten().tolist() == kept
    for name in scales.keys() - {f"{gate}.weight_scale"}:
        assert torch.equal(cut[name], scales[name])


STRANGE = {
    "gate.qweight": (
        torch.zeros(6, 4, dtype=torch.int32),
        "layer 0: the tensor .* of I32 and shape .* in a plain dtype",
    ),
    "gate.weight_scale_inv": (torch.zeros(1, 5), "does not hold one expert's part after"),
    "jitter": (torch.zeros(6), "is unknown to transformers"),
    "experts.6.w1.weight": (torch.zeros(2), "also has expert 6"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_tensor_of_unknown_meaning_is_refused_by_name(name, source):
    tensor, words = STRANGE[name]
    more = {f"model.layers.{i}.block_sparse_moe.{name}": tensor + i for i in range(8)}
    rewrite(source, lambda tensors: tensors | more)
    assert_refused(sh.ModelError, words, source, experts=DROPPED)
    sh.prune(source, [3], source.parent / "layers")


def without_an_expert(tensors):
    return {k: v for k, v in tensors.items() if "layers.2.block_sparse_moe.experts.5." not in k}


def under_other_names(tensors):
    return {k.replace("block_sparse_moe.gate", "ffn.router"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: tensors | {"mtp.layers.0.mlp.experts.3.up.weight": torch.zeros(2)},
            "outside of the 8 decoder layers",
        ),
        (without_an_expert, "lacks "),
        (under_other_names, "does not hold the experts of layer 0 under names that transformers"),
    ],
)
def test_tensors_that_make_no_whole_experts_are_refused(change, words, source):
    rewrite(source, change)
    assert_refused(sh.ModelError, words, source, experts=DROPPED)


def test_experts_of_layers_for_multi_token_prediction_are_refused(tmp_path):
    source = tmp_path / "source"
    model = mixture("deepseek_v3")
    model.save_pretrained(source)

    def more(tensors):
        last = {k: v for k, v in tensors.items() if k.startswith("model.layers.7.")}
        return tensors | {k.replace(".7.", ".8.", 1): v + 1 for k, v in last.items()}

    edit_json(source / "config.json", num_nextn_predict_layers=1)
    sh.prune(source, (), tmp_path / "fine", experts=some_experts(model))  # counted, but not there
    rewrite(source, more)
    words = "multi-token prediction have: which of them could go was not measured"
    assert_refused(sh.ModelError, words, source, experts=some_experts(model))
    sh.prune(source, [7], tmp_path / "layers")


@pytest.mark.parametrize("name", mostly_slow(sorted(EXPERTS_STAY), ["jetmoe", "zaya"]))
def test_what_routes_otherwise_is_refused_on_disk(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "source")
    experts = {layer: [0] for layer in range(8)}
    assert_refused(sh.ModelError, EXPERTS_STAY[name], tmp_path / "source", experts=experts)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({k: [0, 1, 2, 3, 4] for k in range(8)}, "1 expert would be left .* keep at least 2"),
        ({k: [0] for k in range(7)}, "layer 7 would keep all of its 6 experts"),
        ({**DROPPED, 7: [1]}, "every layer must lose as many"),
        ({}, "no expert is named"),
        (DroppedExperts(8, dict.fromkeys(range(8), (0,))), "for 8 experts a layer, and .* 6"),
        ("0:1;0:2", "layer 0 is named twice"),
        ({"0": [1]}, r"expected them by layer, as .*, and not \{'0': \[1\]\}"),
        ("nowhere.txt", "neither experts, as .* nor a file"),
    ],
)
def test_experts_that_cannot_go_are_refused(experts, words, source):
    assert_refused(sh.ExpertsError, words, source, experts=experts)


def test_a_dense_model_and_dense_layers_lose_no_experts(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "source")
    words = "has no layer with routed experts: drop whole layers"
    assert_refused(sh.ModelError, words, tmp_path / "source", experts={0: [1]})
    dense = tmp_path / "dense"
    model = mixture("qwen2_moe")
    model.save_pretrained(dense)
    experts = {**some_experts(model), 1: [0, 1]}
    assert_refused(sh.ExpertsError, "layer 1 has no routed experts", dense, experts=experts)


def test_two_plans_do_not_name_the_same(source):
    both = sh.Plan.of(8, [2])
    experts = sh.Plan(8, (), experts=DroppedExperts(6, DROPPED))
    assert_refused(sh.PlanError, "the plan names no experts", source, [2], experts=both)
    assert_refused(sh.ExpertsError, "names experts already", source, experts, experts=DROPPED)
    done = sh.prune(source, both, source.parent / "done", experts=experts)
    assert (done.dropped, sorted(done.experts.by_layer)) == ((2,), [0, 1, 3, 4, 5, 6, 7])
    words = r"drops the layers .* already"
    assert_refused(sh.PlanError, words, source, [3], experts=done)


def test_a_gguf_file_without_experts_loses_none(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    words = "tiny.gguf counts no routed experts: drop whole layers instead"
    with pytest.raises(sh.ModelError, match=words):
        sh.prune(path, (), tmp_path / "cut.gguf", experts={0: [1]})
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]

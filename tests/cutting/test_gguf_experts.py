"""Experts cut out of GGUF files: the bytes of those that stay, and what reads them afterwards."""

import itertools

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

import shallower as sh
from shallower._core import Gguf
from shallower.cutting.exports import CARD_FILE, export_path
from shallower.cutting.gguf import plan_path, prepare_gguf
from shallower.models.experts import find_experts
from shallower.values.experts import DroppedExperts
from tests.conftest import ROOT, mostly_slow
from tests.cutting.gguf_files import write
from tests.cutting.test_gguf import check_like_llama_cpp, fields, renamed, scalar
from tests.models.gguf_files import write_family, written

NUM_LAYERS, NUM_EXPERTS = 4, 8

STACKS = {
    "ffn_gate_inp.weight": Kind.F32,
    "ffn_gate_exps.weight": None,
    "ffn_up_exps.weight": None,
    "ffn_down_exps.weight": None,
}
"""Tensors with a part for every expert; without a type those of the family."""

FAMILIES = {
    "llama": (Kind.Q4_0, STACKS, {}),
    "olmoe": (Kind.F32, STACKS, {}),
    "qwen3moe": (Kind.Q8_0, STACKS, {"attn_k_norm.weight": (NUM_EXPERTS,)}),
    "deepseek2": (
        Kind.F16,
        STACKS | {"exp_probs_b.bias": Kind.F32},
        {"ffn_up_shexp.weight": (NUM_EXPERTS, 4), "ffn_gate_inp_shexp.weight": (4,)},
    ),
    "gpt-oss": (
        Kind.MXFP4,
        STACKS
        | {"ffn_gate_inp.bias": Kind.F32}
        | {f"ffn_{which}_exps.bias": Kind.F32 for which in ("gate", "up", "down")},
        {"attn_sinks.weight": (NUM_EXPERTS,)},
    ),
    "gemma4": (
        Kind.Q6_K,
        {
            "ffn_gate_inp.weight": Kind.F32,
            "ffn_gate_up_exps.weight": None,
            "ffn_down_exps.weight": Kind.Q4_K,
            "ffn_down_exps.scale": Kind.F32,
        },
        {"ffn_gate_inp.scale": (5,)},
    ),
}
"""By architecture the type of its experts, its stacks, and what else lies in a layer."""


def write_mixture(path, arch, extra=(), tensors=(), dense=1, count=NUM_EXPERTS):
    """A synthetic mixture, its first layers dense; every tensor's bytes are its own."""
    kind, stacks, others = FAMILIES[arch]
    writer = GGUFWriter(path, arch)
    writer.add_block_count(NUM_LAYERS)
    writer.add_leading_dense_block_count(dense)
    writer.add_string("general.name", "Mixture")
    if count is not None:
        writer.add_expert_count(count)
    for name, value, code, sub in (scalar(f"{arch}.expert_used_count", 2), *extra):
        writer.add_key_value(name, value, code, sub)
    rng = np.random.default_rng(0)

    def add(name, kind, outer):
        values, size = GGML_QUANT_SIZES[kind]
        row = size * 2 if values > 1 else size
        raw = rng.integers(0, 256, size=(*outer, row), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kind)

    add("token_embd.weight", Kind.F16, (7,))
    for layer in range(NUM_LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", rng.normal(size=5).astype(np.float32))
        for name, shape in others.items():
            values = rng.normal(size=shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}", values)
        for name, one in stacks.items() if layer >= dense else ():
            if name.endswith((".bias", ".scale")) and "_exps.b" not in name:
                values = rng.normal(size=NUM_EXPERTS).astype(np.float32)
                writer.add_tensor(f"blk.{layer}.{name}", values)
            else:
                outer = (NUM_EXPERTS,) if "inp" in name or "bias" in name else (NUM_EXPERTS, 3)
                add(f"blk.{layer}.{name}", one or kind, outer)
    for name, shape in tensors:
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    return written(writer, path)


def plan_of(by_layer, layers=(), num_experts=NUM_EXPERTS):
    """A plan of ``NUM_LAYERS`` layers that drops these layers and these experts."""
    blocks = sh.Plan.of(NUM_LAYERS, layers).blocks if layers else ()
    return sh.Plan(NUM_LAYERS, blocks, experts=DroppedExperts(num_experts, by_layer))


def check_bytes(source, out, plan):
    """What stays has the bytes that NumPy takes out of the whole, and nothing else is there."""
    after = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    _, stacks, _ = FAMILIES[fields(GGUFReader(source))["general.architecture"][1]]
    expected = []
    for tensor in GGUFReader(source).tensors:
        name = renamed(tensor.name, plan.survivors)
        if name is None:
            continue
        expected.append(name)
        whole = tensor.data
        if name.startswith("blk.") and name.split(".", 2)[2] in stacks:
            kept = plan.experts.kept(int(tensor.name.split(".")[1]))
            assert len(whole) == NUM_EXPERTS
            whole = whole[list(kept)]
        assert after[name].tensor_type == tensor.tensor_type
        assert after[name].data.shape == whole.shape
        assert after[name].data.tobytes() == whole.tobytes()
    assert list(after) == expected


DROPPED = {1: (0, 7), 2: (4, 2), 3: (3, 5)}


@pytest.mark.parametrize("layers", [(), (0, 2)], ids=["experts", "layers too"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_the_experts_that_stay_keep_their_bytes(arch, layers, tmp_path):
    keys = {"expert_group_count": 2, "expert_group_used_count": 1, "attention.q_lora_rank": 8}
    keys = [scalar(f"{arch}.{key}", value) for key, value in keys.items()]
    source = write_mixture(tmp_path / "a.gguf", arch, keys)
    layers = (0, 1) if layers and arch == "gpt-oss" else layers  # whose layers alternate
    plan = plan_of({n: some for n, some in DROPPED.items() if n not in layers}, layers)
    out = tmp_path / "b.gguf"
    assert sh.prune(source, plan, out) is plan
    check_bytes(source, out, plan)
    check_like_llama_cpp(out)
    before, after = fields(GGUFReader(source)), fields(GGUFReader(out))
    changed = {f"{arch}.expert_count": 6, "general.name": "Mixture (6 experts)"}
    if layers:
        changed[f"{arch}.block_count"] = 2
        changed[f"{arch}.leading_dense_block_count"] = 0
        changed["general.name"] = "Mixture (2 layers, 6 experts)"
    assert after == {
        name: (types, changed.get(name, value)) for name, (types, value) in before.items()
    }
    assert Gguf(out).expert_layers == ([0, 1] if layers else [1, 2, 3])
    assert sh.Plan.load(plan_path(out)) == plan
    assert set(tmp_path.iterdir()) == {source, out, plan_path(out), export_path(out, CARD_FILE)}


def loaded(path):
    model, _ = sh.load_model(path, dtype="float32")
    return model


def answers(model):
    """The logits of a prompt, and the greedy words behind it."""
    prompt = torch.tensor([[72, 105, 32, 9, 200, 13]])
    with torch.inference_mode():
        said = model.generate(prompt, max_new_tokens=12, do_sample=False)
        return model(prompt).logits, said[0].tolist()


@pytest.mark.parametrize(
    ("family", "layers"),
    mostly_slow(
        itertools.product(["minimax-m2", "qwen2moe", "qwen3moe"], [(), (1,)]),
        [("qwen3moe", (1,))],
    ),
)
def test_the_file_is_the_mixture_cut_in_memory(family, layers, tmp_path):
    sizes = {"attention.key_length": 16, "expert_count": 6, "expert_used_count": 2}
    source = write_family(tmp_path / "whole.gguf", family, **sizes)
    dropped = {0: (5, 1), 1: (0, 2), 2: (3, 4), 3: (1, 2)}
    dropped = {layer: some for layer, some in dropped.items() if layer not in layers}
    plan = plan_of(dropped, layers, num_experts=6)
    sh.prune(source, plan, tmp_path / "cut.gguf")
    model, found = loaded(source), loaded(tmp_path / "cut.gguf")
    whole, _ = answers(model)
    sh.drop_layers(model, plan)
    weights, wanted = found.state_dict(), model.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(value, weights[name]) for name, value in wanted.items())
    assert {one.num_experts for one in find_experts(found)} == {4}
    (logits, said), (wanted_logits, wanted_said) = answers(found), answers(model)
    assert torch.equal(logits, wanted_logits)
    assert said == wanted_said
    assert not torch.allclose(logits, whole, atol=1e-2), "the experts do nothing"


def refused(source, plan, error, words):
    """A plan is refused, by what checks and by what writes, and nothing is written."""
    before = set(source.parent.iterdir())
    for attempt in (prepare_gguf, sh.prune):
        with pytest.raises(error, match=words) as caught:
            attempt(source, plan, source.with_name("b.gguf"))
        assert "\n" not in str(caught.value)
    assert set(source.parent.iterdir()) == before


def test_experts_that_the_router_cannot_do_without_are_refused(tmp_path):
    arch = "deepseek2"
    groups = [scalar(f"{arch}.expert_group_count", 4), scalar(f"{arch}.expert_group_used_count", 2)]
    source = write_mixture(tmp_path / "a.gguf", arch, groups)
    for dropped, words in [
        (range(7), "1 expert would be left in layer 1, and its router sends a token to 2"),
        ((0, 1), "would keep 0, 2, 2, 2 experts of its 4 groups"),
        ((0, 2, 4, 6), "the two best of a group decide about it"),
    ]:
        plan = plan_of({layer: tuple(dropped) for layer in (1, 2, 3)})
        refused(source, plan, sh.ExpertsError, words)
    odd = write_mixture(tmp_path / "odd.gguf", arch, [scalar(f"{arch}.expert_group_count", 3)])
    refused(odd, plan_of(DROPPED), sh.ModelError, "expert_group_count is 3")
    other = plan_of(dict.fromkeys((1, 2, 3), (0,)), num_experts=16)
    refused(source, other, sh.ExpertsError, "the plan is for 16 experts a layer, and .* has 8")


def test_layers_without_experts_are_refused(tmp_path):
    source = write_mixture(tmp_path / "a.gguf", "llama")
    for layers, words in [
        ((0, 1, 2, 3), r"layer 0 has no routed experts: those with experts are \[1, 4\)"),
        ((1, 2), "layer 3 would keep all of its 8 experts"),
    ]:
        refused(source, plan_of(dict.fromkeys(layers, (0,))), sh.ExpertsError, words)
    left = plan_of({0: (1,)}, (1, 2, 3))
    refused(source, left, sh.ExpertsError, "those with experts are none that stays")
    dense = write(tmp_path / "dense.gguf", NUM_LAYERS)
    refused(dense, plan_of(DROPPED), sh.ModelError, "no layer with routed experts")
    longer = write(tmp_path / "longer.gguf", NUM_LAYERS + 1)
    refused(longer, plan_of(DROPPED), sh.PlanError, "for 4 layers, .* has 5")


def test_what_the_file_cannot_describe_is_refused(tmp_path):
    plan = plan_of(DROPPED)
    silent = write_mixture(tmp_path / "silent.gguf", "llama", count=None)
    refused(silent, plan, sh.ModelError, "llama.expert_count is missing")
    several = gguf.GGUFValueType.ARRAY
    by_layer = ("llama.expert_count", [8] * NUM_LAYERS, several, None)
    by_layer = write_mixture(tmp_path / "by_layer.gguf", "llama", [by_layer], count=None)
    refused(by_layer, plan, sh.ModelError, "not one whole number for all layers")
    name = "blk.2.ffn_gate_tid2eid.weight"
    source = write_mixture(tmp_path / "a.gguf", "llama", tensors=[(name, (NUM_EXPERTS, 2))])
    refused(source, plan, sh.ModelError, f"{name} .*sends tokens to experts by their number")


@pytest.mark.slow
def test_every_tensor_of_gguf_has_a_decision(tmp_path):
    """A newer gguf with a new tensor of a layer fails here, so that somebody decides."""
    start = "blk.{bid}."
    names = {name for name in gguf.TENSOR_NAMES.values() if name.startswith(start)}
    undecided, divided = set(), set()
    for name in sorted(name.removeprefix(start) for name in names):
        source, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
        held = f"{name}.weight" in (*FAMILIES["llama"][1], "attn_norm.weight")
        tensors = () if held else [(f"blk.1.{name}.weight", (NUM_EXPERTS, 2))]
        write_mixture(source, "llama", tensors=tensors)
        try:
            sh.prune(source, plan_of(DROPPED), out, overwrite=True)
        except sh.ModelError as error:
            if "no rule says" in str(error):
                undecided.add(name)
            continue
        after = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
        if len(after[f"blk.1.{name}.weight"].data) == NUM_EXPERTS - 2:
            divided.add(name)
    assert undecided == set()
    assert divided == {
        "exp_probs_b", "ffn_down_exps", "ffn_gate_exps", "ffn_gate_inp", "ffn_gate_up_exps",
        "ffn_up_exps",
    }  # fmt: skip


def test_every_key_of_gguf_that_speaks_of_experts_has_a_decision():
    """A newer gguf with a new such key fails here, so that somebody decides."""
    changed = {"expert_count"}
    checked = {"expert_used_count", "expert_group_count", "expert_group_used_count"}
    of_layers = {"interleave_moe_layer_step", "moe_every_n_layers"}  # rules.rs
    stays = {
        "expert_chunk_feed_forward_length", "expert_feed_forward_length", "expert_gating_func",
        "expert_group_scale", "expert_shared_count", "expert_shared_feed_forward_length",
        "expert_weights_norm", "expert_weights_scale", "experts_per_group", "moe_latent_size",
    }  # fmt: skip
    keys = {value for value in vars(gguf.Keys.LLM).values() if isinstance(value, str)}
    of_experts = {key.removeprefix("{arch}.") for key in keys if "expert" in key or "moe" in key}
    assert of_experts - {"general.file_type"} == changed | checked | of_layers | stays
    assert '"expert_count"' in (ROOT / "rust" / "gguf" / "rules.rs").read_text()

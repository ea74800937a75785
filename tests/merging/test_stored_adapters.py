"""Adapters merged from file to file, held to peft's merge in memory."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Chunk

import shallower as sh
from shallower.cutting.rewriting import StoredCheckpoint
from shallower.merging.low_rank import LowRank, add_low_rank, deviation, rounding
from shallower.merging.stored_adapters import WeightProxy, low_rank_changes
from tests.conftest import mostly_slow
from tests.merging.merges import family, merged_by_peft, merged_by_stream, steps_apart, tensors

slow = pytest.mark.slow
FAMILIES = ["gpt2", "mixtral", "qwen3_next", "opt", "phi", "gpt_neox", "llama"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_slow(
        product(FAMILIES, ("float32", "bfloat16", "float16")),
        quick=[
            ("gpt2", "float32"),
            ("mixtral", "bfloat16"),
            ("llama", "bfloat16"),
        ],
    ),
)
def test_the_sums_are_those_of_peft(name, dtype, tmp_path):
    """In bfloat16 and float16 the same bits but for ties, in float32 within two units."""
    base, adapters, _ = family(name, dtype, tmp_path)
    expected = merged_by_peft(base, adapters, tmp_path / "peft", dtype)
    got = merged_by_stream(base, adapters, tmp_path / "stream")
    before = tensors(base)
    assert got.keys() == expected.keys()
    apart = {key: steps_apart(got[key], value) for key, value in expected.items()}
    assert max(int(steps.max()) for steps in apart.values()) <= (2 if dtype == "float32" else 1)
    off, total = (
        sum(int((s > 0).sum()) for s in apart.values()),
        sum(map(torch.numel, apart.values())),
    )
    assert off < 1e-3 * total
    changed = {key for key in got if not torch.equal(got[key], before[key])}
    assert {key.partition(".weight")[0].rpartition(".")[2] for key in changed}.isdisjoint(
        {"embed_tokens", "wte", "lm_head", "norm"}
    )
    assert len(changed) > 20


@pytest.mark.parametrize("form", ["shards", "without the prefix", "fused"])
def test_weights_may_be_stored_otherwise(form, tmp_path):
    name = "gpt2" if form == "without the prefix" else "mixtral"
    size = "40KB" if form == "shards" else "5GB"
    base, adapters, _ = family(name, "bfloat16", tmp_path, max_shard_size=size)
    expected = merged_by_peft(base, adapters, tmp_path / "peft", "bfloat16")
    if form == "shards":
        assert (base / "model.safetensors.index.json").is_file()
    elif form == "without the prefix":
        stored = tensors(base)
        save_file(
            {key.removeprefix("transformer."): value for key, value in stored.items()},
            base / "model.safetensors",
        )
        expected = {key.removeprefix("transformer."): value for key, value in expected.items()}
    else:
        save_file(fused(tensors(base)), base / "model.safetensors")
        expected = fused(expected)
    got = merged_by_stream(base, adapters, tmp_path / "stream")
    assert got.keys() == expected.keys()
    assert all(int(steps_apart(got[key], expected[key]).max()) <= 1 for key in got)


def fused(stored):
    """The tensors of a Mixtral under the names of its modules, experts stacked."""
    made = {}
    for key, value in stored.items():
        if ".experts." not in key:
            made[key.replace("block_sparse_moe", "mlp")] = value
    for layer in range(8):
        place = f"model.layers.{layer}.block_sparse_moe.experts"

        def stack(name, place=place):
            return torch.stack([stored[f"{place}.{k}.{name}.weight"] for k in range(4)])

        experts = f"model.layers.{layer}.mlp.experts"
        made[f"{experts}.gate_up_proj"] = torch.cat([stack("w1"), stack("w3")], dim=1)
        made[f"{experts}.down_proj"] = stack("w2")
    return made


@pytest.fixture(scope="module")
def llama_made(tmp_path_factory):
    """A Llama, its adapters and their merge."""
    folder = tmp_path_factory.mktemp("llama")
    base, adapters, _ = family("llama", "float32", folder)
    return base, adapters, merged_by_stream(base, adapters, folder / "merged")


@pytest.fixture
def of_llama(llama_made, tmp_path):
    """The Llama, and a copy of its adapters."""
    return llama_made[0], shutil.copytree(llama_made[1], tmp_path / "adapters")


@pytest.mark.parametrize("change", [
    pytest.param({"lora_alpha": 12}, marks=slow), {"use_rslora": True},
    {"alpha_pattern": {"down_proj": 7}},
])  # fmt: skip
def test_the_factor_is_that_of_the_settings(change, llama_made, of_llama, tmp_path):
    (base, adapters), once = of_llama, llama_made[2]
    edit(adapters, **change)
    expected = merged_by_peft(base, adapters, tmp_path / "peft", "float32")
    got = merged_by_stream(base, adapters, tmp_path / "stream")
    assert any(not torch.equal(got[key], once[key]) for key in got)
    assert all(int(steps_apart(got[key], expected[key]).max()) <= 2 for key in got)


def edit(adapters, **change):
    file = adapters / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def damage(adapters, change):
    file = adapters / "adapter_model.safetensors"
    stored = load_file(file)
    change(stored, min(stored))
    save_file(stored, file)


def as_bin(adapters):
    """As peft saved adapters before: what it reads, and the stream does not."""
    file = adapters / "adapter_model.safetensors"
    torch.save(load_file(file), adapters / "adapter_model.bin")
    file.unlink()


def a_nan(stored, name):
    stored[name].view(-1)[3] = torch.nan


def a_lost_one(stored, name):
    del stored[name]


def a_stranger(stored, name):
    stored["base_model.model.other.lora_A.weight"] = stored[name].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: edit(a, r=5, lora_alpha=5), "cannot load the adapters|is of shape"),
        (lambda a: edit(a, use_dora=True), "made with use_dora=True, which shallower heal never"),
        (lambda a: edit(a, bias="all"), "made with bias='all'"),
        (lambda a: edit(a, modules_to_save=["lm_head"]), "made with modules_to_save"),
        (lambda a: edit(a, peft_type="LOHA"), "are LOHA: expected LORA"),
        (lambda a: damage(a, a_nan), "lora_A.weight in .* holds NaN or infinity: train it again"),
        (lambda a: damage(a, a_lost_one), "lacks base_model"),
        (lambda a: damage(a, a_stranger), "hold base_model.model.other"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "cannot load the adapters"),
        (as_bin, "cannot load the adapters"),
        (lambda a: (a / "adapter_config.json").unlink(), "holds no adapters of peft"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # peft's
def test_other_adapters_are_refused(change, message, of_llama):
    base, adapters = of_llama
    change(adapters)
    with pytest.raises(sh.ModelError, match=message):
        low_rank_changes(StoredCheckpoint.open(base), adapters)


def test_a_name_that_is_not_there_is_not_guessed(tmp_path):
    base, adapters, _ = family("llama", "float32", tmp_path)
    stored = tensors(base)
    stored["odd"] = stored.pop("model.layers.3.mlp.up_proj.weight")
    save_file(stored, base / "model.safetensors")
    assert low_rank_changes(StoredCheckpoint.open(base), adapters) is None
    stored["model.layers.3.mlp.up_proj.weight"] = stored.pop("odd").to(torch.float8_e4m3fn)
    save_file(stored, base / "model.safetensors")
    assert low_rank_changes(StoredCheckpoint.open(base), adapters) is None


# The sum and its check
def low_rank(dtype, *, rows=64, columns=48, experts=1, size=1e-2):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(experts, rows, 3, generator=generator) * size
    right = torch.randn(experts, 3, columns, generator=generator)
    weight = torch.randn(experts, rows, columns, generator=generator).to(dtype)
    return LowRank("w", left, right, 0.5, dtype), weight


def reader(tensor):
    data, place = tensor.contiguous().view(-1).view(torch.uint8).numpy(), 0

    def read(count):
        nonlocal place
        place += count
        return bytearray(data[place - count : place])

    return read


def bytes_of(change, weight):
    blocks = list(change.changed(reader(weight), torch.device("cpu")))
    raw = np.concatenate([np.frombuffer(block, np.uint8) for block in blocks])
    return torch.from_numpy(raw).view(weight.dtype).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("panel", [100, 1000, 1 << 21])
def test_the_check_knows_rounding_from_errors(dtype, panel, monkeypatch):
    monkeypatch.setattr("shallower.merging.low_rank.PANEL", panel)
    change, weight = low_rank(dtype, experts=3)
    merged = bytes_of(change, weight)
    whole = add_low_rank(weight, change.left, change.right, scaling=0.5).to(dtype)
    assert int(steps_apart(merged, whole).max()) <= 1
    device = torch.device("cpu")
    relative, _ = deviation(change, reader(weight), reader(merged), device=device)
    assert 0 < relative < torch.finfo(dtype).eps
    for wrong in (weight, add_low_rank(weight, change.left, change.right, scaling=0.51).to(dtype)):
        with pytest.raises(sh.ModelError, match="w was not merged as it should be"):
            deviation(change, reader(weight), reader(wrong), device=device)
    one = merged.clone()
    one[2, 60, 40] = torch.nextafter(one[2, 60, 40], torch.tensor(9, dtype=dtype))
    one[2, 60, 40] = torch.nextafter(one[2, 60, 40], torch.tensor(9, dtype=dtype))
    if dtype != torch.float32:
        with pytest.raises(sh.ModelError, match="w was not merged as it should be"):
            deviation(change, reader(weight), reader(one), device=device)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32).filter(lambda x: abs(x) < 6e4))
def test_rounding_is_half_a_unit(value):
    exact = torch.tensor([value], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = exact.to(torch.float32).to(dtype).double()
        assert float((rounded - exact).abs()) <= float(
            rounding(exact[None], dtype, left=torch.zeros(1, 1), right=torch.zeros(1, 1))
        )


def test_what_overflows_is_named():
    change, weight = low_rank(torch.float16, size=1.0)
    weight[0, 20, 7] = 65504
    change.left[0, 20], change.right[0, :, 7] = 30.0, 30.0
    with pytest.raises(
        sh.ModelError, match="into w: the sum of weight and adapter overflows float"
    ):
        bytes_of(change, weight)
    weight[0, 20, 7] = torch.nan
    with pytest.raises(sh.ModelError, match="into w: it holds NaN or infinity already"):
        bytes_of(change, weight)


# The proxy
@pytest.mark.parametrize("seed", range(4))
def test_a_stand_in_follows_a_weight(seed):
    """What becomes of a product is the product of what becomes of its factors."""
    generator = np.random.default_rng(seed)
    left, right = (torch.from_numpy(generator.normal(size=s)) for s in ((4, 6, 2), (4, 2, 10)))
    whole, stand_in = left @ right, WeightProxy.of((4, 6, 10))
    both = []
    for weight in (whole, stand_in):
        parts = {}
        for name, half in Chunk(dim=1 + seed % 2).convert(
            {"fused": weight}, source_patterns=["fused"], target_patterns=["a", "b"]
        ).items():  # fmt: skip
            half = torch.transpose(half, 1, 2) if seed > 1 else half
            for k, part in enumerate(torch.split(half, [1, 1, 2], dim=0)):
                parts[f"{name}{k}"] = part.squeeze(0) if k < 2 else part
        both.append(parts)
    assert both[0].keys() == both[1].keys()
    for name, expected in both[0].items():
        assert both[1][name].is_matrix
        assert both[1][name].shape == expected.shape
        one, other = both[1][name].of_product(left, right)
        assert torch.allclose((one @ other).view(expected.shape), expected)


def test_a_stand_in_refuses_what_it_does_not_know():
    with pytest.raises(NotImplementedError, match="cat of a proxy"):
        torch.cat([WeightProxy.of((4, 4))])
    assert not WeightProxy.of((4, 6, 8)).transpose(0, 1).is_matrix


def test_sums_are_float32_whatever_the_process_has_asked_for():
    """TF32 has ten bits: the check would take its sums for damaged ones."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen = []

    class Left(torch.Tensor):
        def __matmul__(self, other):
            seen.append((cuda.fp32_precision, cpu.fp32_precision))
            return torch.Tensor(self) @ other

    change, weight = low_rank(torch.float32)
    left = change.left[0].as_subclass(Left)
    torch.set_float32_matmul_precision("medium")
    try:
        before = cuda.fp32_precision, cpu.fp32_precision
        merged = add_low_rank(weight[0], left, change.right[0], scaling=0.5)
        assert (cuda.fp32_precision, cpu.fp32_precision) == before == ("tf32", "bf16")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", "ieee")]
    expected = add_low_rank(weight[0], change.left[0], change.right[0], scaling=0.5)
    assert torch.equal(merged, expected)

"""Models with random adapters, and their merge by peft itself."""

import json
import struct
import warnings
from functools import partial
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from shallower.cutting.rewriting import StoredCheckpoint, rewrite
from shallower.healing.training import add_adapters
from shallower.merging.stored_adapters import low_rank_changes
from shallower.models.feed_forward import feed_forward_targets
from tests.families import small_config


def random_adapters(model, folder, *, rank=3, attention=True, size=0.05):
    """Adapters of heal's kind that change every weight by a part of its size."""
    targets = feed_forward_targets(model, attention)
    adapted = add_adapters(model, targets, SimpleNamespace(seed=0, rank=rank, dropout=0.0), base="")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the base has no name
        adapted.save_pretrained(folder)
    return len(targets)


def family(name, dtype, path, **saving):
    """A small model of a family on disk, and adapters for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(name)).to(getattr(torch, dtype)).eval()
    model.save_pretrained(path / "base", **saving)
    count = random_adapters(model.float(), path / "adapters")
    return path / "base", path / "adapters", count


def merged_by_peft(base, adapters, out, dtype):
    """The whole model in float32, peft's sums, each rounded once: what the stream is held to."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        merged = PeftModel.from_pretrained(model.float(), str(adapters)).merge_and_unload(True)
    for name, value in merged.state_dict().items():
        owner, _, key = name.rpartition(".")
        getattr(merged.get_submodule(owner), key).data = value.to(dtypes[name])
    merged.save_pretrained(out)
    return tensors(out)


def merged_by_stream(base, adapters, out, *, device="cpu"):
    stored = StoredCheckpoint.open(base)
    changes = low_rank_changes(stored, adapters)
    assert changes is not None
    out.mkdir()
    made = {
        name: partial(change.changed, device=torch.device(device))
        for name, change in changes.items()
    }
    rewrite(stored, out, made)
    return tensors(out)


def tensors(folder):
    """All tensors of the files in a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def steps_apart(one, other):
    """How many values of the dtype lie between those of two tensors."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    bits = [value.contiguous().view(kinds[value.dtype]).long() for value in (one, other)]
    low = torch.iinfo(kinds[one.dtype]).min
    ordered = [torch.where(value < 0, low - value, value) for value in bits]
    return (ordered[0] - ordered[1]).abs()


def sparse_neox(folder, hidden, inner, *, layers=1, shards=1):
    """A GPT-NeoX of zeros in bfloat16, in sparse files: a large model that takes no room.

    Its feed-forward weights are of ``2 * hidden * inner`` bytes.
    """
    config = GPTNeoXConfig(
        vocab_size=100, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=128, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = dict(GPTNeoXForCausalLM(config).named_parameters())
    files = [list(names)[k::shards] for k in range(shards)]
    index = {}
    for k, inside in enumerate(files):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        header, place = {}, 0
        for name in inside:
            size = 2 * names[name].numel()
            header[name] = {
                "dtype": "BF16", "shape": list(names[name].shape),
                "data_offsets": [place, place + size],
            }  # fmt: skip
            place, index[name] = place + size, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + place)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return [name for name in names if "dense_h_to_4h.weight" in name or "4h_to_h.weight" in name]


def adapters_of(folder, names, shapes, rank):
    """Random adapters for weights by name, of the shapes (out, in)."""
    LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank,
        target_modules=sorted({name.split(".")[-2] for name in names}),
    ).save_pretrained(folder)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in names:
        rows, columns = shapes[name.split(".")[-2]]
        place = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{place}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        weights[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")

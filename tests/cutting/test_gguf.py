"""Cuts of GGUF files, read back as llama.cpp reads them."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

import shallower as sh
from tests.conftest import ROOT
from tests.cutting.gguf_files import write
from tests.models.gguf_files import write_gguf, written


def fields(reader):
    """Key -> (types, value), in order; what the reader adds of its own left out."""
    return {
        name: (tuple(field.types), field.contents())
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


def renamed(name, survivors):
    """A tensor's name in the cut, or None."""
    if not name.startswith("blk."):
        return name
    _, block, rest = name.split(".", 2)
    place = {old: new for new, old in enumerate(survivors)}.get(int(block))
    return None if place is None else f"blk.{place}.{rest}"


def check_like_llama_cpp(path):
    """What llama.cpp's loader asserts of a file, by a reader of our own.

    Offsets are aligned and contiguous in order (``gguf_init_from_file``), names shorter than 64
    bytes and unique; the blocks are 0 .. block_count-1, and a per-layer array has block_count
    elements (``get_key_or_arr``).
    """
    data = Path(path).read_bytes()
    magic, version, num_tensors, num_entries = struct.unpack_from("<4sIQQ", data)
    assert magic == b"GGUF"
    assert version in (2, 3)
    position = 24
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
    formats |= {10: "Q", 11: "q", 12: "d"}

    def take(form):
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text():
        nonlocal position
        length = take("Q")
        position += length
        return data[position - length : position].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return take(formats[kind])

    metadata = {}
    for _ in range(num_entries):
        key = text()
        assert key not in metadata
        metadata[key] = value(take("I"))
    infos = []
    for _ in range(num_tensors):
        name, num_dims = text(), take("I")
        dims = [take("Q") for _ in range(num_dims)]
        infos.append((name, dims, take("I"), take("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-position // alignment) * alignment
    assert not any(data[position:start])
    expected = 0
    for name, dims, kind, offset in infos:
        assert len(name.encode()) < 64
        assert offset == expected, name
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        num_bytes = int(np.prod(dims)) // block * size
        assert start + offset + num_bytes <= len(data)
        expected = -(-(offset + num_bytes) // alignment) * alignment
    assert start + expected == len(data)
    names = [name for name, *_ in infos]
    assert len(set(names)) == len(names)
    blocks = metadata[metadata["general.architecture"] + ".block_count"]
    found = {int(name.split(".")[1]) for name in names if name.startswith("blk.")}
    assert found == set(range(blocks))
    return metadata, infos


def array(name, values, sub=None):
    return name, values, GGUFValueType.ARRAY, sub


def scalar(name, value, kind=GGUFValueType.UINT32):
    return name, value, kind, None


def check_cut(source, out, survivors, changed):
    """The cut holds the survivors' bytes, and the metadata but for ``changed``."""
    before, after = GGUFReader(source), GGUFReader(out)
    expected = {name: renamed(name, survivors) for name in (t.name for t in before.tensors)}
    assert [t.name for t in after.tensors] == [new for new in expected.values() if new]
    cut = {tensor.name: tensor for tensor in after.tensors}
    for tensor in before.tensors:
        new = cut.get(expected[tensor.name])
        if new is not None:
            assert new.tensor_type == tensor.tensor_type
            assert new.shape.tolist() == tensor.shape.tolist()
            assert new.data.tobytes() == tensor.data.tobytes()
    old_fields, new_fields = fields(before), fields(after)
    assert list(old_fields) == list(new_fields)
    for name, (types, value) in old_fields.items():
        assert new_fields[name] == (types, changed.get(name, value)), name
    check_like_llama_cpp(out)


def test_a_small_file_gives_the_logits_of_the_model_cut_in_memory(tmp_path):
    source = write_gguf(tmp_path / "whole.gguf")
    sh.prune(source, [1, 2], tmp_path / "cut.gguf")
    (whole, _), (loaded, _) = (
        sh.load_model(tmp_path / name, dtype="float32") for name in ("whole.gguf", "cut.gguf")
    )
    assert len(loaded.model.layers) == loaded.config.num_hidden_layers == 2
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        before = whole(ids).logits
        with sh.without_layers(whole, [1, 2]):
            expected = whole(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_every_type_that_gguf_knows_keeps_its_bytes(tmp_path):
    plain = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
    types = [kind for kind in GGMLQuantizationType if kind.name not in plain]
    source = write(tmp_path / "a.gguf", 3, types=types)
    sh.prune(source, [1], tmp_path / "b.gguf")
    check_cut(source, tmp_path / "b.gguf", [0, 2], {"llama.block_count": 2})
    for kind in (np.float64, np.int8, np.int16, np.int32, np.int64):
        writer = GGUFWriter(tmp_path / "c.gguf", "llama")
        writer.add_block_count(2)
        for layer in range(2):
            writer.add_tensor(f"blk.{layer}.x.weight", np.arange(layer, 13, dtype=kind))
        written(writer, tmp_path / "c.gguf")
        sh.prune(tmp_path / "c.gguf", [0], tmp_path / "d.gguf", overwrite=True)
        assert GGUFReader(tmp_path / "d.gguf").tensors[0].data.tolist() == list(range(1, 13))


def test_metadata_follows_the_survivors(tmp_path):
    kind = GGUFValueType
    source = write(
        tmp_path / "a.gguf",
        alignment=64,
        extra=[
            array("llama.attention.head_count", [1, 2, 3, 4, 5, 6]),
            array("llama.attention.head_count_kv", [6, 5, 4, 3, 2, 1], kind.UINT32),
            array("llama.feed_forward_length", [7] * 6),
            array("llama.attention.sliding_window_pattern", [True, False] * 3),
            array("llama.swiglu_clamp_exp", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]),
            array("llama.layer_types", ["a", "bb", "", "dddd", "e", "f"]),
            array("llama.attention.layer_indices", [1, 3, 5]),
            array("llama.rope.dimension_sections", [4, 4, 4, 0]),
            array("xielu.alpha_n", [0.0, 0.25, 0.5, 0.75, 1.0, 2.0]),
            array("tokenizer.ggml.tokens", ["q", "r", "s", "t", "u", "v"]),
            array("tokenizer.ggml.scores", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            scalar("llama.leading_dense_block_count", 3),
            scalar("llama.expert_count", 6),
            scalar("llama.attention.scale", 0.125, kind.FLOAT64),
            scalar("llama.causal", True, kind.BOOL),
            scalar("llama.big", 2**63, kind.UINT64),
            scalar("llama.small", -(2**63), kind.INT64),
            scalar("general.name", "a name", kind.STRING),
        ],
    )
    sh.prune(source, [0, range(3, 5)], tmp_path / "b.gguf")
    changed = {
        "llama.block_count": 3,
        "llama.attention.head_count": [2, 3, 6],
        "llama.attention.head_count_kv": [5, 4, 1],
        "llama.feed_forward_length": [7] * 3,
        "llama.attention.sliding_window_pattern": [False, True, False],
        "llama.swiglu_clamp_exp": [1.5, 2.5, 5.5],
        "llama.layer_types": ["bb", "", "f"],
        "llama.attention.layer_indices": [0, 2],
        "xielu.alpha_n": [0.25, 0.5, 2.0],
        "llama.leading_dense_block_count": 2,
        "general.name": "a name (3 layers)",
    }
    check_cut(source, tmp_path / "b.gguf", [1, 2, 5], changed)


def test_what_the_metadata_cannot_describe_is_refused(tmp_path):
    extra = [scalar("llama.attention.sliding_window_pattern", 2)]
    source = write(tmp_path / "a.gguf", extra=extra)
    for make in (sh.prune, sh.plan_prune):
        with pytest.raises(sh.ModelError, match=r"a\.gguf.*sliding_window_pattern is 2"):
            make(source, [1], tmp_path / "b.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_every_key_of_gguf_that_speaks_of_layers_has_a_decision():
    """A newer gguf with a new such key fails here, so that somebody decides."""
    rules = (ROOT / "rust" / "gguf" / "rules.rs").read_text()
    harmless = {
        "layer_norm_epsilon",  # a number, and no count of layers
        "layer_norm_rms_epsilon",
        "posnet.block_count",  # of another net, whose tensors are not blk.N
        "convnext.block_count",
    }
    groups = [gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM, gguf.Keys.PosNet]
    groups += [gguf.Keys.ConvNext, gguf.Keys.ShortConv, gguf.Keys.WKV, gguf.Keys.KDA]
    keys = {
        value.removeprefix("{arch}.")
        for group in groups
        for name, value in vars(group).items()
        if isinstance(value, str) and value.startswith("{arch}.")
    }
    words = ("layer", "block", "pattern", "interval", "step", "every")
    layered = {key for key in keys if any(word in key for word in words)}
    undecided = {
        key
        for key in layered
        if f'"{key}"' not in rules and not any(key.endswith(name) for name in harmless)
    }
    assert undecided == {"ssm.time_step_rank"}

"""Cuts of GGUF files: a real one through gguf and transformers, synthetic and hostile ones."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

import shallower as sh
from shallower import demo
from shallower.gguf import gguf_files, plan_path

CUT = range(12, 20)


@pytest.fixture(scope="session")
def real():
    return demo.model_path()


@pytest.fixture(scope="session")
def cut(real, tmp_path_factory):
    """The real model without layers 12 .. 19."""
    out = tmp_path_factory.mktemp("gguf") / "cut.gguf"
    sh.prune_gguf(real, CUT, out)
    return out


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


def write(path, num_layers=6, arch="llama", alignment=None, extra=(), types=(), split=None):
    """A synthetic model by gguf's own writer; every tensor's bytes are its own."""
    writer = GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(num_layers)
    for name, value, kind, sub in extra:
        writer.add_key_value(name, value, kind, sub)
    if split:
        writer.add_uint16("split.count", split)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(7, 5)).astype(np.float32))
    for layer in range(num_layers):
        writer.add_tensor(
            f"blk.{layer}.attn_norm.weight", rng.normal(size=3 + layer).astype(np.float16)
        )
        for kind in types:
            _, size = GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 256, size=(3, 2 * size), dtype=np.uint8)
            name = f"blk.{layer}.{kind.name.lower()}.weight"
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_the_real_model_is_cut(real, cut):
    survivors = [layer for layer in range(30) if layer not in CUT]
    check_cut(real, cut, survivors, {"llama.block_count": 22})
    assert len(GGUFReader(cut).tensors) == 272 - 8 * 9
    assert sh.count_gguf_layers(cut) == 22


def test_the_plan_lies_beside(real, cut):
    plan = sh.Plan.load(cut.with_name("cut.shallower_plan.json"))
    assert plan == sh.plan_gguf(real, CUT)
    assert plan.num_layers == 30
    assert plan.dropped == tuple(CUT)
    assert set(cut.parent.iterdir()) == set(gguf_files(cut))


def test_the_file_gives_the_logits_of_the_model_cut_in_memory(smol, cut):
    model, tokenizer = smol
    loaded, reloaded = sh.load_model(cut, dtype="float32")
    assert len(loaded.model.layers) == loaded.config.num_hidden_layers == 22
    text = "The quick brown fox jumps over the lazy dog, and then it does so again."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert reloaded(text, return_tensors="pt")["input_ids"].tolist() == ids.tolist()
    with torch.inference_mode():
        with sh.without_layers(model, CUT):
            expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)


def test_cutting_twice_is_cutting_once(cut, real, tmp_path):
    sh.prune_gguf(cut, [0, 21], tmp_path / "twice.gguf")
    sh.prune_gguf(real, [0, CUT, 29], tmp_path / "once.gguf")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [None, 8, 16, 64, 4096])
def test_alignments(tmp_path, alignment):
    source = write(tmp_path / "a.gguf", alignment=alignment)
    sh.prune_gguf(source, [0, 3], tmp_path / "b.gguf")
    check_cut(source, tmp_path / "b.gguf", [1, 2, 4, 5], {"llama.block_count": 4})


def test_every_type_that_gguf_knows_keeps_its_bytes(tmp_path):
    plain = {"F32", "F16", "F64", "I8", "I16", "I32", "I64"}
    types = [kind for kind in GGMLQuantizationType if kind.name not in plain]
    source = write(tmp_path / "a.gguf", 3, types=types)
    sh.prune_gguf(source, [1], tmp_path / "b.gguf")
    check_cut(source, tmp_path / "b.gguf", [0, 2], {"llama.block_count": 2})
    for kind in (np.float64, np.int8, np.int16, np.int32, np.int64):
        writer = GGUFWriter(tmp_path / "c.gguf", "llama")
        writer.add_block_count(2)
        for layer in range(2):
            writer.add_tensor(f"blk.{layer}.x.weight", np.arange(layer, 13, dtype=kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sh.prune_gguf(tmp_path / "c.gguf", [0], tmp_path / "d.gguf", overwrite=True)
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
    sh.prune_gguf(source, [0, range(3, 5)], tmp_path / "b.gguf")
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
    }
    check_cut(source, tmp_path / "b.gguf", [1, 2, 5], changed)


REFUSALS = {
    "period": (
        "llama",
        scalar("llama.attention.sliding_window_pattern", 2),
        "llama.attention.sliding_window_pattern is 2",
    ),
    "interval": (
        "qwen3next",
        scalar("qwen3next.full_attention_interval", 3),
        "full_attention_interval is 3",
    ),
    "step": ("llama", scalar("llama.interleave_moe_layer_step", 2), "drop 2 layers in a row"),
    "habit": ("gemma2", scalar("gemma2.x", 1), "gemma2 is an architecture"),
    "shared": ("gemma4", scalar("gemma4.attention.shared_kv_layers", 2), "shared_kv_layers is 2"),
    "unknown": ("llama", array("llama.odd", [1, 2]), "llama.odd is an array of 2 elements"),
    "table": (
        "gemma4",
        scalar("gemma4.embedding_length_per_layer_input", 256),
        "every layer's slice",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_metadata_cannot_describe_is_refused(tmp_path, case):
    arch, extra, words = REFUSALS[case]
    source = write(tmp_path / "a.gguf", arch=arch, extra=[extra])
    with pytest.raises(sh.ModelError, match=words) as caught:
        sh.prune_gguf(source, [1], tmp_path / "b.gguf")
    assert str(source) in str(caught.value)
    with pytest.raises(sh.ModelError, match=words):
        sh.plan_gguf(source, [1])
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_every_key_of_gguf_that_speaks_of_layers_has_a_decision():
    """A newer gguf with a new such key fails here, so that somebody decides."""
    rules = (Path(__file__).resolve().parents[1] / "rust" / "gguf" / "rules.rs").read_text()
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


def test_split_files_are_refused(tmp_path):
    source = write(tmp_path / "a-00001-of-00003.gguf", split=3)
    with pytest.raises(sh.ModelError, match=r"one of 3 files.*llama-gguf-split --merge"):
        sh.prune_gguf(source, [1], tmp_path / "b.gguf")


def test_layers_and_plans_are_checked(tmp_path):
    source, out = write(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    for layers, words in [
        ([6], "no layer 6"),
        ([1, 1], "named twice"),
        (range(6), "at least one must stay"),
        ([], "no layer is named"),
        ("12", "does not name layers"),
    ]:
        with pytest.raises(sh.LayersError, match=words):
            sh.prune_gguf(source, layers, out)
    block = sh.Block(1, 3)
    with pytest.raises(sh.PlanError, match=r"for 8 layers, .*a\.gguf has 6"):
        sh.prune_gguf(source, block, out, plan=sh.Plan(8, (block,)))
    with pytest.raises(sh.PlanError, match=r"drops the layers \[1, 2\]"):
        sh.prune_gguf(source, [1], out, plan=sh.Plan(6, (block,)))
    assert not out.exists()
    plan = sh.Plan(6, (block,), "deepest")
    assert sh.prune_gguf(source, block, out, plan=plan) is plan
    assert sh.Plan.load(plan_path(out)).strategy == "deepest"


def test_nothing_is_overwritten_unasked(tmp_path):
    source, out = write(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    out.write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.prune_gguf(source, [1], out)
    out.unlink()
    plan_path(out).write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.prune_gguf(source, [1], out)
    assert not out.exists()
    sh.prune_gguf(source, [1], out, overwrite=True)
    assert sh.count_gguf_layers(out) == 5
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.prune_gguf(source, [1], source)
    sh.prune_gguf(source, [1], source, overwrite=True)
    assert source.read_bytes() == out.read_bytes()
    with pytest.raises(sh.OutputError, match=r"name ends in \.gguf"):
        sh.prune_gguf(source, [1], tmp_path / "c")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(sh.OutputError, match="is a folder"):
        sh.prune_gguf(source, [1], tmp_path / "d.gguf", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(sh.OutputError, match="not a folder"):
        sh.prune_gguf(source, [1], tmp_path / "file" / "e.gguf")


def test_an_interrupted_cut_leaves_nothing(real, tmp_path):
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.prune_gguf(real, CUT, tmp_path / "b.gguf", progress=stop)
    assert len(seen) == 3
    assert seen[0][0] < seen[2][0] < seen[2][1]
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_the_whole(real, tmp_path):
    seen = []
    out = tmp_path / "b.gguf"
    sh.prune_gguf(real, CUT, out, progress=lambda *step: seen.append(step))
    assert seen == sorted(seen)
    assert seen[-1] == (out.stat().st_size, out.stat().st_size)


def test_a_full_disk_leaves_nothing(real, tmp_path):
    code = (
        "import resource, signal, sys, shallower as sh\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))\n"
        "try: sh.prune_gguf(sys.argv[1], range(12, 20), sys.argv[2])\n"
        "except sh.OutputError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(real), str(tmp_path / "b.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_gil_is_free(real, tmp_path):
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    sh.prune_gguf(real, CUT, tmp_path / "b.gguf")
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < moment < end for moment in ticks) > 5


def test_memory_is_constant(real, tmp_path):
    code = (
        "import resource, sys, shallower as sh\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "sh.prune_gguf(sys.argv[1], range(12, 20), sys.argv[2])\n"
        "print(peak() - before, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(real), str(tmp_path / "b.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes, has_torch = done.stdout.split()
    assert int(kilobytes) < 16 * 1024
    assert has_torch == "False"


def damage(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def test_hostile_files(tmp_path):
    good = write(tmp_path / "good.gguf").read_bytes()
    huge = struct.pack("<Q", 2**63 + 1)
    cases = {
        "empty": (b"", "cut short"),
        "text": (b"hello, this is no model at all", "no GGUF file"),
        "zip": (b"PK\3\4" + good[4:], "no GGUF file"),
        "version 1": (damage(good, 4, struct.pack("<I", 1)), "version 1"),
        "big endian": (damage(good, 4, struct.pack(">I", 3)), "big-endian"),
        "tensors": (damage(good, 8, huge), "tensors are counted, and there is room for"),
        "entries": (damage(good, 16, huge), "entries are counted, and there is room for"),
        "key": (damage(good, 24, huge), "expected at most"),
        "cut header": (good[:100], "room for"),
        "cut names": (good[:200], "cut short"),
        "cut data": (good[:-40], "cut short"),
        "tail": (good + b"x", "truncate -s"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(sh.ModelError, match=words) as caught:
            sh.prune_gguf(path, [1], tmp_path / "out.gguf")
        assert "bad.gguf" in str(caught.value), name
    with pytest.raises(sh.ModelError, match="No such file"):
        sh.count_gguf_layers(tmp_path / "none.gguf")
    with pytest.raises(sh.ModelError, match="not a regular file"):
        sh.count_gguf_layers(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(sh.ModelError, match="not a regular file"):
        sh.count_gguf_layers(tmp_path / "pipe.gguf")
    assert {file.name for file in tmp_path.iterdir()} == {"good.gguf", "bad.gguf", "pipe.gguf"}


def test_a_sparse_giant_is_refused_at_once(tmp_path):
    path = tmp_path / "giant.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
        file.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**36))
        file.truncate(2**40)
    start = time.perf_counter()
    with pytest.raises(sh.ModelError, match="elements are counted, and there is room for"):
        sh.count_gguf_layers(path)
    assert time.perf_counter() - start < 1


def shallower(*words):
    command = [sys.executable, "-m", "shallower", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line(real, tmp_path):
    out = tmp_path / "cut.gguf"
    dry = shallower("prune", real, "--drop", "12:20", "--out", out, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "[12, 20)" in dry.stdout
    assert not out.exists()
    done = shallower("prune", real, "--drop", "12:20", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert described["written"] == [str(path) for path in gguf_files(out)]
    assert described["survivors"] == [*range(12), *range(20, 30)]
    again = shallower("prune", real, "--drop", "12:20", "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    plan = shallower("prune", real, "--plan", plan_path(out), "--out", out, "--overwrite")
    assert plan.returncode == 0, plan.stderr
    assert "wrote" in plan.stdout


def test_the_command_line_refuses_with_status_2(real, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    sh.Plan(28, (sh.Block(1, 3),)).save(tmp_path / "plan.json")
    small = write(tmp_path / "gemma.gguf", arch="gemma2")
    out = tmp_path / "out.gguf"
    for words, message in [
        ((bad, "--drop", "1"), "cut short"),
        ((real, "--drop", "30"), "no layer 30"),
        ((real,), "--drop or by --plan"),
        ((real, "--plan", tmp_path / "plan.json"), "is for 28 layers"),
        ((real, "--drop", "1", "--dtype", "nf4"), "--dtype nf4 does not go with"),
        ((tmp_path, "--drop", "1"), "is no .gguf file"),
        ((small, "--drop", "1", "--dry-run"), "gemma2 is an architecture"),
        ((tmp_path, "--gguf-file", "none.gguf", "--drop", "1"), "No such file"),
    ]:
        done = shallower("prune", *words, "--out", out)
        assert done.returncode == 2, words
        assert message in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr
    assert not out.exists()

"""Models whose layers wait in a GGUF file: the same bits as when it is loaded whole."""

import itertools
import tracemalloc

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

import shallower as sh
from shallower.models.architecture import find_layers
from shallower.models.offload import (
    fetch_ahead,
    reading_of,
    stored_bytes,
    stored_weight,
    write_weight,
)
from tests.conftest import mostly_slow, write_jsonl
from tests.judgement.test_streamed_race import verified
from tests.memory.test_streaming import assert_same_scans, both
from tests.models.gguf_files import FAMILIES, write_family, write_gguf
from tests.peaks import tensors_peak

QUICK = ["llama", "gpt2", "gemma2", "lfm2", "mamba", "qwen3moe"]
"""Permuted rows, turned matrices, norms less one, conversions, wider states, experts joined."""

TEXTS = ["héllo ab", "one more text of bytes", "ab ab ab and another one"] * 4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "qwen2")


def stored_in(file, of="blk."):
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors if t.name.startswith(of))


@pytest.mark.parametrize(
    ("family", "dtype"),
    mostly_slow(
        itertools.product(["llama", *FAMILIES], ["float32", "bfloat16"]),
        [("llama", "float32"), *((family, "bfloat16") for family in QUICK)],
    ),
)
def test_every_way_to_make_weights_of_tensors_gives_the_same_bits(family, dtype, tmp_path):
    file = tmp_path / f"{family}.gguf"
    write_gguf(file) if family == "llama" else write_family(file, family)
    streamed, whole, tokenizer = both(file, dtype)
    assert streamed.config.to_dict() == whole.config.to_dict()
    assert streamed.name_or_path == whole.name_or_path
    assert_same_scans(streamed, whole, tokenizer, TEXTS, positions="last:3", max_length=12)
    reading = reading_of(streamed)
    assert (reading.passes, reading.bytes_read) == (1, stored_in(file))
    losses = [sh.evaluate_loss(one, tokenizer, TEXTS, max_length=12) for one in (streamed, whole)]
    assert losses[0] == losses[1]


def test_a_streamed_gguf_model_is_raced_and_patched_as_one_in_memory(file):
    streamed, whole, tokenizer = both(file)
    assert verified(streamed, tokenizer, 1)[0] == verified(whole, tokenizer, 1)[0]
    losses = []
    for model in (streamed, whole):  # random, so that no patch helps it
        with pytest.raises(sh.PatchError, match="the patch does not help") as raised:
            sh.patch(model, tokenizer, [1], texts=TEXTS, num_tokens=300, progress=False)
        losses.append(str(raised.value))
    assert losses[0] == losses[1]


def test_a_streamed_gguf_model_is_changed_cut_and_saved_as_one_in_memory(file, tmp_path):
    streamed, whole, tokenizer = both(file)
    found = []
    for name, model in (("a", streamed), ("b", whole)):
        changed = find_layers(model).modules[1].mlp.down_proj
        with torch.no_grad():
            write_weight(changed, "weight", stored_weight(changed, "weight") * 1.5)
        sh.drop_layers(model, [2])
        sh.save_model(model, tokenizer, tmp_path / name)
        found.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert found[0] == found[1]


def test_a_dry_run_tells_what_will_be_read_of_a_gguf_file(file, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    command = ["patch", file, "--drop", "1", "--texts", texts, "--dtype", "float32"]
    command += ["--max-length", "12", "--stream", "--out", tmp_path / "out", "--dry-run", "--json"]
    planned = shallower(*command).json["stream"]
    assert planned["bytes_read"] == planned["passes"] * stored_in(file)


def test_tensors_are_fetched_ahead_as_they_are_stored(file, monkeypatch):
    streamed, _ = sh.load_model(file, "float32", "stream", progress=False)
    layer, asked = find_layers(streamed).modules[1], []
    monkeypatch.setattr("os.posix_fadvise", lambda *call: asked.append(call[1:3]), raising=False)
    fetch_ahead(layer)
    assert sum(size for _, size in asked) == stored_bytes(layer) == stored_in(file, "blk.1.")


def test_no_more_than_all_beside_the_layers_and_two_of_them_are_in_memory(file, tmp_path):
    sizes = {"embedding_length": 256, "feed_forward_length": 512, "block_count": 6}
    large = write_family(tmp_path / "large.gguf", "qwen2", **sizes)

    def work(file):
        model, tokenizer = sh.load_model(file, "float32", "stream", progress=False)
        sh.scan(model, tokenizer, TEXTS[:2], max_length=8, progress=False)
        return model

    work(file)  # what is imported stays
    tracemalloc.start()  # what NumPy has, which dequantises
    try:
        peak = tensors_peak(lambda: work(large)) + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole, _ = sh.load_model(large, "float32", progress=False)
    layer = sum(4 * p.numel() for p in whole.model.layers[0].parameters())
    beside = sum(4 * p.numel() for p in whole.parameters()) - 6 * layer
    assert peak < beside + 2 * layer
    assert beside < layer


@pytest.mark.parametrize("left_out", ["blk.2.ffn_up", "blk.0.attn_norm", "token_embd", "blk.3"])
def test_a_file_without_a_weight_is_refused_as_it_is_whole(left_out, tmp_path):
    file = write_gguf(tmp_path / "lacking.gguf", left_out=left_out)
    said = []
    for device_map in ("stream", None):
        with pytest.raises(sh.ModelError, match="lacks") as raised:
            sh.load_model(file, "float32", device_map, progress=False)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_blocks_that_cannot_be_dequantised_are_refused_before_a_layer_runs(file, monkeypatch):
    monkeypatch.delitem(gguf.quants._type_traits, GGMLQuantizationType.Q8_0)
    with pytest.raises(sh.ModelError, match="Q8_0"):
        sh.load_model(file, "float32", "stream", progress=False)


def test_a_stock_load_is_as_it_was_after_one_that_failed(tmp_path):
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    before = GgufHfQuantizer.get_state_dict
    test_a_file_without_a_weight_is_refused_as_it_is_whole("blk.3", tmp_path)
    assert GgufHfQuantizer.get_state_dict is before

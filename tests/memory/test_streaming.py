"""Models whose layers are streamed: the same bits as in memory, each layer read once a pass."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower import ModelError
from shallower.memory import budget
from shallower.memory.streaming import Streamed, plan_stream
from shallower.models.architecture import find_layers
from shallower.models.offload import fetch_ahead, reading_of, stored_bytes, stored_weight
from shallower.models.stored_layers import LayerWeights
from shallower.scanning.scan_file import scan_bytes
from tests.conftest import mostly_slow, tiny_llama, write_jsonl
from tests.documents import documents
from tests.families import families, random_model
from tests.peaks import needs_linux, peak_of

FAMILIES = [
    *("llama", "gemma3_text", "gpt2", "qwen2_moe", "mamba2", "qwen3_next", "gpt_oss", "bloom"),
    *("dbrx", "glm_moe_dsa"),
]
"""Full and sliding attention, learned positions, experts, states of a recurrence, both, sinks,
biases by distance; weights that are read by others than their modules, and choices passed on."""

TEXTS, MANY = documents(64), documents(80)
"""Of many, not all are read before the first of them run."""


def stored(folder, model, words):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def both(folder, dtype="float32"):
    """A model that is streamed, and the same in memory, with their tokenizer."""
    streamed, tokenizer = sh.load_model(folder, dtype, "stream", progress=False)
    whole, _ = sh.load_model(folder, dtype, progress=False)
    assert all(p.is_meta for layer in find_layers(streamed).modules for p in layer.parameters())
    return streamed, whole, tokenizer


def assert_same_scans(streamed, whole, *texts, **options):
    one, other = (sh.scan(model, *texts, **options) for model in (streamed, whole))
    assert scan_bytes(one.contents) == scan_bytes(other.contents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    return stored(tmp_path_factory.mktemp("stream") / "tiny", tiny_llama(6), words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_scan_has_the_same_bytes(folder, dtype):
    streamed, whole, tokenizer = both(folder, dtype)
    options = {"positions": "last:3", "max_length": 12, "keep_samples": True}
    assert_same_scans(streamed, whole, tokenizer, TEXTS, **options)
    reading = reading_of(streamed)
    assert reading.passes == 1
    assert reading.bytes_read == sum(map(stored_bytes, streamed.model.layers))
    assert reading.bytes_read == sum(p.numel() for p in whole.model.layers.parameters()) * 4


def test_a_streamed_loss_and_that_of_its_cuts_have_the_same_bits(folder):
    streamed, whole, tokenizer = both(folder)
    for dropped in ([], [1], [2, 3, 5]):
        losses = []
        for model in (streamed, whole):
            with sh.without_layers(model, dropped) if dropped else nullcontext():
                losses.append(sh.evaluate_loss(model, tokenizer, TEXTS, max_length=12))
        first, second = losses
        assert first == second
        np.testing.assert_array_equal(first.by_text.sums, second.by_text.sums)


def test_a_streamed_perplexity_reads_each_layer_once_to_the_same_bits(folder):
    streamed, whole, tokenizer = both(folder)
    options = {"context": 16, "batch_size": 2}
    reading = reading_of(streamed)
    before = reading.bytes_read
    first, second = (
        sh.evaluate_perplexity(one, tokenizer, " ".join(TEXTS), **options)
        for one in (streamed, whole)
    )
    np.testing.assert_array_equal(first.by_window.sums, second.by_window.sums)
    assert len(first.by_window) > 4
    assert reading.bytes_read - before == sum(map(stored_bytes, streamed.model.layers))


# Experts are joined of stored tensors; layers of Zamba share weights.
@pytest.mark.parametrize("family", mostly_slow(families(), ["qwen2_moe", "zamba"]))
def test_no_family_is_streamed_to_other_bits(family, tmp_path, words):
    if family in NOT_STREAMED:
        with pytest.raises(ModelError):
            measured_both(family, tmp_path, words)
        return
    streamed, whole = measured_both(family, tmp_path, words)
    assert streamed == whole


NOT_STREAMED = {
    # Layers are given more than states, or states are changed between them.
    *("dory", "gemma4_text, shared keys and values", "inkling2_loop_text", "inkling2_text"),
    *("kolibri1_1", "rwkv", "zaya"),
    # Their states are of other shapes, or the model does not run: no scan in memory, either.
    *("bailing_hybrid", "cpmant", "deepseek_v4", "gemma3n_text", "hy_v4", "openai-gpt", "xlnet"),
    # No causal model of transformers.
    *("emu3", "mllama"),
}


def measured_both(family, folder, words):
    """The bytes of the scan and the losses of a streamed model, and of the same in memory."""
    place = stored(folder / "stored", random_model(family), words)
    streamed, _ = sh.load_model(place, "float32", "stream", progress=False)
    whole, _ = sh.load_model(place, "float32", progress=False)
    found = []
    for one in (streamed, whole):
        scan = sh.scan(one, words, TEXTS[:20], max_length=12)
        found.append((scan_bytes(scan.contents), sh.evaluate_loss(one, words, TEXTS[:20])))
    return found


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("rwkv", 0),  # states are halved between layers
        pytest.param("dory", 0, marks=pytest.mark.slow),  # layers run in a loop
        ("zaya", 2),  # routers are given what the one before had; values tell that it counts
        pytest.param("inkling2_text", 2, marks=pytest.mark.slow),  # so are states of blocks
    ],
)
def test_layers_that_need_more_than_states_are_not_streamed(family, passes, tmp_path, words):
    place = stored(tmp_path / family, random_model(family), words)
    streamed, _ = sh.load_model(place, "float32", "stream", progress=False)
    for measure in (sh.scan, sh.evaluate_loss):
        with pytest.raises(ModelError, match=r"cannot be run one by one: .*without --stream$"):
            measure(streamed, words, TEXTS[:4])
    assert reading_of(streamed).passes == 2 * passes


@pytest.mark.parametrize("texts", [["", *TEXTS[:30], *[""] * 200], [""] * 3])
def test_texts_without_tokens_are_counted_wherever_they_are(folder, texts):
    streamed, whole, tokenizer = both(folder)
    found = []
    for model in (streamed, whole):
        with pytest.warns(UserWarning, match="rejected") if texts[1] else nullcontext():
            try:
                done = sh.scan(model, tokenizer, texts, batch_size=2, max_length=12)
            except sh.StatesError as error:
                found.append(str(error))
                continue
        found.append((done.num_rejected, scan_bytes(done.contents)))
    assert found[0] == found[1]


def test_states_that_find_no_room_are_another_pass(folder, tmp_path, monkeypatch):
    streamed, whole, tokenizer = both(folder)
    whole_scan = sh.scan(whole, tokenizer, MANY, batch_size=2, max_length=12)
    monkeypatch.setattr(budget.BUDGET, "bound", 220_000)
    scanned = sh.scan(streamed, tokenizer, MANY, batch_size=2, max_length=12)
    assert reading_of(streamed).passes == 5
    np.testing.assert_array_equal(scanned.distance, whole_scan.distance)


def test_an_interrupted_streamed_scan_goes_on(folder, tmp_path, monkeypatch):
    streamed, whole, tokenizer = both(folder)
    monkeypatch.setattr(budget.BUDGET, "bound", 40_000)
    monkeypatch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    part = tmp_path / "part.safetensors"

    def broken():
        yield from MANY[:40]
        raise KeyboardInterrupt

    options = {"batch_size": 2, "max_length": 12, "checkpoint": part}
    with pytest.raises(KeyboardInterrupt):
        sh.scan(streamed, tokenizer, broken(), **options)
    assert 0 < sh.Scan.load(part).num_samples < 40
    done = sh.scan(streamed, tokenizer, MANY, **options)
    plain = sh.scan(whole, tokenizer, MANY, batch_size=2, max_length=12)
    assert scan_bytes(done.contents) == scan_bytes(plain.contents)


def test_little_is_read_before_the_first_pass(folder, monkeypatch):
    """A layer of each class, to learn what a model's parts return."""
    streamed, _, tokenizer = both(folder)
    read, loaded = [], LayerWeights.__getitem__

    def counting(self, key):
        read.append(key)
        return loaded(self, key)

    monkeypatch.setattr(LayerWeights, "__getitem__", counting)
    sh.evaluate_loss(streamed, tokenizer, TEXTS[:8])
    matrices = [key for key in read if key.endswith("mlp.down_proj.weight")]
    assert sorted(matrices)[2:] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(6)]
    assert set(matrices[:2]) == {"model.layers.0.mlp.down_proj.weight"}


def test_what_cannot_be_streamed_is_refused(folder, tmp_path, shallower):
    from transformers import BitsAndBytesConfig

    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    for dtype in ("nf4", "int8"):
        with pytest.raises(ModelError, match=f"cannot be both streamed and quantised to {dtype}"):
            sh.load_model(folder, dtype, "stream", progress=False)
    packed = shutil.copytree(folder, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (packed / "config.json").write_text(json.dumps(config))
    expected = "packed is stored quantised, by nf4, and cannot be streamed"
    with pytest.raises(ModelError, match=expected):
        sh.load_model(packed, "float32", "stream", progress=False)
    command = ["eval", folder, "--texts", texts, "--stream", "--device-map", "cpu"]
    assert "--stream beside --device-map cpu" in shallower(*command).error


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, words):
    return stored(tmp_path_factory.mktemp("mixture") / "tiny", random_model("mixtral"), words)


def test_a_mixture_is_joined_as_it_is_read_and_nothing_is_written(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no folder"))
    looked = []
    with monkeypatch.context() as patch:
        patch.setattr(LayerWeights, "__getitem__", lambda _, name: looked.append(name))
        streamed, whole, tokenizer = both(mixture)
    assert looked == []  # no layer is read to load it
    assert_same_scans(streamed, whole, tokenizer, TEXTS[:20])
    stored_size = sum(p.nbytes for layer in find_layers(whole).modules for p in layer.parameters())
    assert reading_of(streamed).bytes_read == stored_size


@pytest.mark.parametrize("family", mostly_slow(["mixtral", "jamba", "dots1"], ["jamba"]))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_lie_in_memory_as_those_of_a_model_that_is_loaded(family, dtype, tmp_path, words):
    streamed, whole, _ = both(stored(tmp_path / "stored", random_model(family), words), dtype)
    for layer, expected in zip(*(find_layers(m).modules for m in (streamed, whole)), strict=True):
        for path, weight in expected.named_parameters():
            place, _, name = path.rpartition(".")
            found = stored_weight(layer.get_submodule(place), name)
            assert (found.dtype, found.data_ptr() % 64) == (weight.dtype, weight.data_ptr() % 64)
            assert torch.equal(found, weight)


@pytest.mark.parametrize("change", ["short", "absent", "pickled"])
def test_layers_that_lack_weights_are_refused_before_they_are_read(
    change, mixture, tmp_path, monkeypatch
):
    place = shutil.copytree(mixture, tmp_path / "changed")
    weights = load_file(place / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    said = r"lacks the weights model\.layers\.1\.mlp\.experts\.down_proj"
    if change == "short":
        del weights[name]
    elif change == "absent":
        weights = {key: one for key, one in weights.items() if ".1.block_sparse_moe" not in key}
        said = r"lacks the weights model\.layers\.1\.mlp"
    if change == "pickled":
        (place / "model.safetensors").unlink()
        torch.save(weights, place / "pytorch_model.bin")
        said = r"pytorch_model\.bin cannot be streamed: expected safetensors, or a GGUF file"
    else:
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=said):
        sh.load_model(place, "float32", "stream", progress=False)


def test_what_is_compared_is_bounded_too(folder, monkeypatch):
    streamed, whole, tokenizer = both(folder)
    monkeypatch.setattr("shallower.memory.streaming.LEAST_KEPT", 1)
    sizes, run = [], Streamed.run

    def counting(self, batches, **options):
        sizes.append(sum(int(batch.attention_mask.sum()) for batch in batches))
        return run(self, batches, **options)

    monkeypatch.setattr(Streamed, "run", counting)
    options = {"batch_size": 2, "max_length": 12, "positions": "all"}
    assert_same_scans(streamed, whole, tokenizer, TEXTS, **options)
    most = reading_of(streamed).of / 4 / (7 * 4 * streamed.config.hidden_size)
    assert len(sizes) > 3
    assert max(sizes) < most + 24  # and a batch, as the next one may be larger
    plan = partial(plan_stream, streamed.config, [folder / "model.safetensors"], torch.float32)
    assert plan(passes=[(1, 3000)]).passes == 1
    assert plan(passes=[(1, 3000)], num_compared=3000).passes > 10


def test_a_bar_counts_the_texts_of_each_layer(folder, monkeypatch, capsys):
    streamed, _, tokenizer = both(folder)
    seen = []

    @contextmanager
    def track(name, total=None, show=None):
        yield lambda steps, note="": seen.append((name, total, steps))

    for module in ("scanning.model", "evaluation.loss"):
        monkeypatch.setattr(f"shallower.{module}.track", track)
    for measure, name, texts, count in (
        (sh.scan, "scan", TEXTS, len(TEXTS)),
        (sh.evaluate_loss, "loss", TEXTS, len(TEXTS)),
        (partial(sh.evaluate_perplexity, context=16), "perplexity", " ".join(TEXTS), None),
    ):
        seen.clear()
        measure(streamed, tokenizer, texts)
        (total,) = {total for _, total, _ in seen}
        assert total == sum(steps for _, _, steps in seen)
        assert count is None or total == 6 * count
        assert {name for name, _, _ in seen} == {name}
        assert len(seen) > 12


def test_a_streamed_model_leaves_no_folder_and_its_tokenizer_names_none(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _model, tokenizer = sh.load_model(folder, "float32", "stream", progress=False)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "offload" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert not list(tmp_path.glob("shallower-*"))
    (broken := tmp_path / "broken").mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError):
        sh.load_model(broken, "float32", "stream", progress=False)
    assert not list(tmp_path.glob("shallower-*"))


def test_the_commands_say_what_was_read(folder, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    common = ["--texts", texts, "--dtype", "float32", "--max-length", "12", "--no-cache"]
    scan = ["scan", folder, *common, "--stream", "--out"]
    done = shallower(*scan, tmp_path / "a", "--json").json
    assert (done["passes"], done["bytes_read"]) == (1, 185_856)
    assert "of layers from disk, in 1 pass\n" in shallower(*scan, tmp_path / "b").out
    plain = shallower("scan", folder, *common, "--out", tmp_path / "c", "--json").json
    assert "passes" not in plain
    assert plain["blocks"] == done["blocks"]
    planned = shallower(*scan, tmp_path / "d", "--dry-run", "--json").json
    assert planned["stream"]["passes"] == 1
    assert planned["stream"]["bytes_read"] == pytest.approx(185_856, rel=0.05)
    said = shallower("eval", folder, *common, "--stream").out
    assert "of layers from disk, in 1 pass\n" in said


@pytest.mark.parametrize("option", mostly_slow(["--against", "--drop"], ["--drop"]))
def test_what_is_compared_is_read_twice_to_the_same_figures(folder, tmp_path, shallower, option):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    common = ["--texts", texts, "--dtype", "float32", "--max-length", "12", "--no-cache"]
    common += [option, folder if option == "--against" else "1:2"]
    streamed = shallower("eval", folder, *common, "--stream", "--json").json
    assert streamed.pop("passes") == 2
    assert 2 * streamed.pop("bytes_read") > 3 * 185_856
    assert streamed == shallower("eval", folder, *common, "--json").json


def test_a_plan_counts_passes_by_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(budget.BUDGET, "bound", 1 << 20)
    config = sh.ModelSource(folder).read_config()
    files = [folder / "model.safetensors"]
    width = config.hidden_size
    passes = [(1, (1 << 20) // (4 * width))]
    plan = plan_stream(config, files, torch.float32, passes=passes)
    assert plan.passes == 4
    assert plan.states_bytes == 1 << 18
    assert plan.bytes_read == pytest.approx(4 * 185_856, rel=0.05)
    assert plan.seconds > 0


def test_layers_are_fetched_ahead_where_the_system_can(folder, monkeypatch):
    streamed, _, _ = both(folder)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append(call[1:3]), raising=False)
    fetch_ahead(streamed.model.layers[1])
    assert sum(size for _, size in asked) == stored_bytes(streamed.model.layers[1])
    monkeypatch.delattr(os, "posix_fadvise")
    fetch_ahead(streamed.model.layers[1])


@pytest.mark.slow
@needs_linux
def test_memory_is_bounded_by_two_layers(folder, tmp_path, words):
    config = LlamaConfig(
        vocab_size=words.vocab_size, hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 2
    assert 32 * layer > 3e9
    stored(tmp_path / "large", model, words)
    del model

    def work(place):
        streamed, tokenizer = sh.load_model(place, "bfloat16", "stream", progress=False)
        sh.scan(streamed, tokenizer, TEXTS[:16], max_length=8, progress=False)
        sh.evaluate_loss(streamed, tokenizer, TEXTS[:16], max_length=8, progress=False)

    work(folder)  # what is imported stays
    assert peak_of(lambda: work(tmp_path / "large")) < 2 * layer + 200e6

"""Models: found, known again, loaded or refused in words; quantised weights kept exact."""

import copy
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import shallower as sh
from conftest import tiny_llama
from shallower.models.architecture import find_layers, input_device, text_config
from shallower.models.identity import identify, stored_dtype
from shallower.models.loading import count_layers, load_model

IDS = torch.tensor([[(7 * i + 5) % 90 + 3 for i in range(12)], list(range(40, 52))])
CAUSAL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def lively(model):
    """Norms and biases unlike those of a fresh model, as a trained model has them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def wide_llama(**options):
    torch.manual_seed(6)
    return lively(LlamaForCausalLM(LlamaConfig(**WIDE, **options)))


def wide_qwen():
    """Has biases in its attention."""
    torch.manual_seed(6)
    return lively(Qwen2ForCausalLM(Qwen2Config(**WIDE)))


@pytest.fixture
def checkpoint(words, tmp_path):
    """The folder of a tiny checkpoint, to be spoilt."""
    folder = tmp_path / "checkpoint"
    tiny_llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(words, tmp_path_factory):
    """The folder of a checkpoint that can be quantised. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    wide_llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# Architecture


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (tiny_llama(3), "model.layers"),
        (GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=9)), "transformer.h"),
        (
            OPTForCausalLM(
                OPTConfig(
                    vocab_size=9,
                    hidden_size=8,
                    ffn_dim=8,
                    num_attention_heads=2,
                    num_hidden_layers=3,
                    word_embed_proj_dim=8,
                )
            ),
            "model.decoder.layers",
        ),
    ],
    ids=["llama", "gpt2", "opt"],
)
def test_layers_are_found_by_structure(model, path):
    found = find_layers(model)
    assert found.path == path
    assert found.modules is model.get_submodule(path)
    assert getattr(found.owner, found.name) is found.modules
    assert len(found) == 3


def test_a_head_that_is_called_decoder_does_not_mislead():
    config = ModernBertDecoderConfig(**CAUSAL, layer_types=["full_attention"] * 2)
    assert find_layers(ModernBertDecoderForCausalLM(config)).path == "model.layers"


def test_layers_are_found_in_the_base_model_too():
    model = tiny_llama(3).model
    assert find_layers(model).path == "layers"
    assert find_layers(model).owner is model


def test_smaller_lists_of_the_same_length_do_not_mislead(llama):
    llama.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    for layer in llama.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    assert find_layers(llama).path == "model.layers"


def test_the_lists_that_are_there_are_named(llama):
    llama.config.num_hidden_layers = 9
    with pytest.raises(sh.ModelError, match=r"no list of 9 decoder layers.*model\.layers \(6\)"):
        find_layers(llama)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
def test_a_module_without_a_config_of_transformers_is_refused(module):
    with pytest.raises(sh.ModelError, match="no transformers config"):
        text_config(module)
    module.config = {"num_hidden_layers": 1}
    with pytest.raises(sh.ModelError, match="no transformers config"):
        find_layers(module)


def test_tokens_go_where_the_first_weights_are(llama):
    assert input_device(find_layers(llama)) == torch.device("cpu")
    assert input_device(find_layers(llama.to("meta"))) == torch.device("cpu")


# Identity


def test_the_identity_tells_what_it_is_of(wide):
    model, _ = load_model(wide, dtype="float32")
    identity = identify(model)
    assert (identity.name, identity.model_type) == ("wide-llama", "llama")
    assert (identity.num_layers, identity.dtype) == (4, "float32")
    assert identity == identify(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "nf4", "int8"])
@pytest.mark.parametrize("build", [wide_llama, wide_qwen])
def test_the_fingerprint_is_the_same_in_every_dtype(words, tmp_path, build, dtype):
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    expected = identify(load_model(tmp_path, dtype="float32")[0])
    identity = identify(load_model(tmp_path, dtype=dtype)[0])
    assert identity.dtype == dtype
    assert identity.fingerprint == expected.fingerprint


def test_the_fingerprint_does_not_change_by_use(wide):
    model, _ = load_model(wide, dtype="nf4")
    before = identify(model)
    logits_of(model)
    model.train()
    assert identify(model) == before


def test_the_fingerprint_is_the_same_where_weights_lie_on_disk(wide, tmp_path):
    places = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places += [f"model.layers.{i}" for i in range(4)]
    spread = AutoModelForCausalLM.from_pretrained(
        wide,
        device_map=dict.fromkeys(places, "cpu") | {"model.layers.2": "disk"},
        offload_folder=tmp_path,
    )
    expected = identify(load_model(wide, dtype="float32")[0])
    assert identify(spread).fingerprint == expected.fingerprint


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_the_fingerprint_tells_other_norms(llama, layer):
    before = identify(llama).fingerprint
    with torch.no_grad():
        llama.model.layers[layer].post_attention_layernorm.weight[7] += 0.1
    assert identify(llama).fingerprint != before


def test_the_fingerprint_tells_swapped_layers():
    model = lively(tiny_llama())
    before = identify(model).fingerprint
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    assert identify(model).fingerprint != before


def test_the_fingerprint_tells_a_cut(llama):
    before = identify(llama)
    sh.drop_layers(llama, [5])
    assert identify(llama).fingerprint != before.fingerprint
    assert identify(llama).num_layers == 5


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_the_dtype_is_that_of_the_weights(llama, dtype, name):
    assert stored_dtype(llama.to(dtype)) == name


# Loading


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_loaded_in_the_dtype_asked_for(checkpoint, words, kind, dtype):
    model, tokenizer = load_model(kind(checkpoint), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    if dtype == "float32":
        assert torch.equal(logits_of(model), logits_of(tiny_llama()))


def test_layers_are_counted_by_the_config_alone(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert count_layers(checkpoint) == 6


@pytest.mark.parametrize("dtype", ["fp32", "nf3", "", None, torch.float32, 4])
def test_an_unknown_dtype_is_refused(checkpoint, dtype):
    with pytest.raises(sh.ModelError, match="unknown dtype"):
        load_model(checkpoint, dtype=dtype)


@pytest.mark.parametrize("load", [load_model, count_layers])
@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "some/where", "."])
def test_a_place_without_a_model_is_refused(tmp_path, load, name):
    with pytest.raises(sh.ModelError):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "nowhere.gguf", "no/body"])
def test_a_name_of_nothing_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sh.ModelError):
        load_model(name)


def test_a_file_that_is_no_gguf_by_name_is_refused(checkpoint):
    with pytest.raises(sh.ModelError, match="is a file: expected a folder"):
        load_model(checkpoint / "config.json")


def test_a_folder_without_a_config_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(sh.ModelError, match=r"holds no config\.json"):
        load_model(checkpoint)


def rewritten(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def removed(name):
    return lambda folder: (folder / name).unlink()


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shortened(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_tensor(folder):
    model = tiny_llama()
    weights = model.state_dict()
    del weights["model.layers.3.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=weights)


DAMAGES = {
    "no weights": removed("model.safetensors"),
    "weights cut short": shortened,
    "weights that are none": replaced("model.safetensors", b"junk" * 10),
    "weights that are empty": replaced("model.safetensors", b""),
    "a weight missing": without_a_tensor,
    "more layers in the config": rewritten(num_hidden_layers=7),
    "another vocabulary": rewritten(vocab_size=101),
    "a config that is no JSON": replaced("config.json", b"{"),
    "a config that is a list": replaced("config.json", b"[]"),
    "an unknown family": rewritten(model_type="nonsense"),
    "a size that is a word": rewritten(hidden_size="wide"),
    "a size that is negative": rewritten(hidden_size=-32),
    "heads that do not divide": rewritten(num_attention_heads=5),
    "no key-value heads": rewritten(num_key_value_heads=0),
    "an unknown activation": rewritten(hidden_act="nonsense"),
    "rope that is a word": rewritten(rope_parameters="nonsense"),
    "no tokenizer": removed("tokenizer.json"),
    "a tokenizer that is no JSON": replaced("tokenizer.json", b"{"),
    "a tokenizer that is empty": replaced("tokenizer.json", b"{}"),
    "a tokenizer of nothing known": replaced(
        "tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "Nonsense"}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_words(checkpoint, damage):
    DAMAGES[damage](checkpoint)
    with pytest.raises(sh.ModelError, match="checkpoint"):
        load_model(checkpoint, dtype="float32")


def test_a_missing_weight_is_named(checkpoint):
    without_a_tensor(checkpoint)
    with pytest.raises(sh.ModelError, match=r"lacks.*layers\.3\.mlp\.up_proj"):
        load_model(checkpoint, dtype="float32")


@pytest.mark.parametrize(
    "damage", ["a config that is no JSON", "an unknown family", "a size that is a word"]
)
def test_a_damaged_config_has_no_count_of_layers(checkpoint, damage):
    DAMAGES[damage](checkpoint)
    with pytest.raises(sh.ModelError):
        count_layers(checkpoint)


BERT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
NOT_CAUSAL = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT, num_hidden_layers=2)),
}


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_a_model_that_is_not_causal_is_refused(words, tmp_path, family):
    NOT_CAUSAL[family]().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(sh.ModelError):
        load_model(tmp_path)


def test_a_causal_model_whose_config_does_not_say_so_is_loaded(words, tmp_path):
    model = GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(**CAUSAL)).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path, "float32")[0]), logits_of(model))


@pytest.mark.parametrize("device_map", ["nonsense", {"": "nonsense"}])
def test_a_device_map_that_cannot_be_is_refused(checkpoint, device_map):
    with pytest.raises(sh.ModelError):
        load_model(checkpoint, device_map=device_map)


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantisation_without_bitsandbytes_names_the_extra(checkpoint, monkeypatch, dtype):
    monkeypatch.setattr("shallower.models.quantised.find_spec", lambda _: None)
    with pytest.raises(sh.MissingExtraError, match=r"bitsandbytes.*shallower\[quantised\]"):
        load_model(checkpoint, dtype=dtype)


# GGUF

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BYTES = [*bytes_to_unicode().values(), "<unk>", "<s>", "</s>", "<pad>", "ab"]


def interleaved(weight, heads):
    """The order of rotary rows in GGUF."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def tensors(model):
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            array = interleaved(array, heads) if part in name else array
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        yield name, np.ascontiguousarray(array)


def write_gguf(path, architecture="llama", model=None, left_out="nothing", merges=("a b",)):
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_block_count(4)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BYTES)
    writer.add_token_types([1] * 256 + [3] * 4 + [1])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for name, array in tensors(model or wide_llama()):
        if left_out not in name:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("by", ["path", "string", "folder and name"])
def test_a_gguf_file_is_loaded_dequantised(gguf_file, by):
    if by == "folder and name":
        model, tokenizer = load_model(gguf_file.parent, "float32", gguf_file=gguf_file.name)
    else:
        model, tokenizer = load_model(gguf_file if by == "path" else str(gguf_file), "float32")
    assert torch.equal(logits_of(model), logits_of(wide_llama()))
    assert tokenizer.decode(tokenizer("héllo ab")["input_ids"]) == "héllo ab"
    assert identify(model).name == "tiny.gguf"


def test_the_layers_of_a_gguf_file_are_counted(gguf_file):
    assert count_layers(gguf_file) == 4
    assert count_layers(gguf_file.parent, gguf_file=gguf_file.name) == 4


def test_a_cut_gguf_model_becomes_a_plain_checkpoint(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file, "float32")
    sh.drop_layers(model, [1, 2])
    sh.save_model(model, tokenizer, tmp_path / "cut")
    reloaded, again = load_model(tmp_path / "cut", "float32")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert again("héllo ab")["input_ids"] == tokenizer("héllo ab")["input_ids"]
    assert "quantization_config" not in json.loads((tmp_path / "cut" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_quantised_gguf_model_is_the_quantised_plain_model(
    gguf_file, wide, tmp_path, monkeypatch, dtype
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model, _ = load_model(gguf_file, dtype)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert stored_dtype(model) == dtype
    assert identify(model).name == "tiny.gguf"
    assert identify(model).fingerprint == identify(load_model(gguf_file, "float32")[0]).fingerprint
    plain, _ = load_model(wide, dtype)
    torch.testing.assert_close(logits_of(model), logits_of(plain), atol=0.1, rtol=0)
    sh.drop_layers(model, [1])
    sh.save_model(model, None, tmp_path / "cut")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(logits_of(reloaded), logits_of(model))


@pytest.mark.parametrize("part", [0, 3, 20, 0.001, 0.01, 0.1, 0.5, 0.9, -1])
def test_a_gguf_file_cut_short_is_refused(gguf_file, tmp_path, part):
    content = gguf_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(sh.ModelError, match=r"broken\.gguf"):
        load_model(broken, "float32")


@pytest.mark.parametrize("content", [b"", b"not a gguf at all" * 99, b"GGUF" + b"\xff" * 999])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(sh.ModelError, match=r"broken\.gguf"):
        load_model(file)
    with pytest.raises(sh.ModelError, match=r"broken\.gguf"):
        count_layers(file)


@pytest.fixture
def logged():
    """What transformers says of loading, beside errors."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_weights_that_are_missing_are_told_once(checkpoint, logged):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    whole = dict(weights)
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = torch.zeros(3, 32)
    save_file(weights, path, {"format": "pt"})
    words = r"lacks the weights model.norm.weight, lm_head.weight of shape \(100, 32\) \(stored is"
    with pytest.raises(sh.ModelError, match=words):
        load_model(checkpoint)
    assert not any("LOAD REPORT" in message for message in logged)
    save_file({**whole, "stray": torch.zeros(1)}, path, {"format": "pt"})
    load_model(checkpoint)
    (report,) = (message for message in logged if "LOAD REPORT" in message)
    assert "stray" in report


@pytest.mark.parametrize("architecture", ["bert", "clip", "t5", "mamba", "nonsense"])
def test_a_gguf_file_of_another_family_is_refused(tmp_path, architecture):
    file = write_gguf(tmp_path / "foreign.gguf", architecture)
    with pytest.raises(sh.ModelError, match=r"foreign\.gguf"):
        load_model(file, "float32")


@pytest.mark.parametrize("left_out", ["blk.2.ffn_up", "blk.0.attn_norm", "token_embd", "blk.3"])
def test_a_gguf_file_without_a_weight_is_refused(tmp_path, left_out):
    file = write_gguf(tmp_path / "lacking.gguf", left_out=left_out)
    with pytest.raises(sh.ModelError, match="lacks"):
        load_model(file, "float32")
    with pytest.raises(sh.ModelError):
        load_model(file, "nf4")


def test_a_gguf_file_with_a_broken_tokenizer_is_refused(tmp_path):
    file = write_gguf(tmp_path / "broken.gguf", merges=("x y",))
    with pytest.raises(sh.ModelError, match=r"broken\.gguf"):
        load_model(file, "float32")


def test_a_gguf_file_that_is_not_in_the_folder_is_refused(gguf_file):
    with pytest.raises(sh.ModelError, match=r"no file other\.gguf"):
        load_model(gguf_file.parent, gguf_file="other.gguf")


def test_a_gguf_file_without_the_package_names_the_extra(gguf_file, monkeypatch):
    monkeypatch.setattr("shallower.models.loading.find_spec", lambda _: None)
    with pytest.raises(sh.MissingExtraError, match=r"gguf.*shallower\[gguf\]"):
        load_model(gguf_file)


# Quantised weights


def stored(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def stock(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, wide):
    return load_model(wide, request.param)[0]


def test_quantised_weights_are_small_and_near(wide):
    plain, _ = load_model(wide, "float32")
    expected = logits_of(plain)
    for dtype, size, error in (("nf4", 0.7, 0.5), ("int8", 1.2, 0.1)):
        model, _ = load_model(wide, dtype)
        layers = find_layers(model).modules
        held = sum(p.numel() * p.element_size() for p in layers.parameters())
        assert held < size * sum(p.numel() for p in find_layers(plain).modules.parameters())
        off = (logits_of(model).float() - expected).abs().mean() / expected.abs().mean()
        assert off < error


def test_a_forward_does_not_change_what_would_be_stored(quantised):
    before = stored(quantised)
    first = logits_of(quantised)
    assert_same_state(stored(quantised), before)
    assert torch.equal(logits_of(quantised), first)
    assert_same_state(stored(quantised), before)


@pytest.mark.parametrize("forward_first", [True, False])
def test_a_cut_quantised_model_comes_back_exactly(quantised, tmp_path, forward_first):
    if forward_first:
        logits_of(quantised)
    sh.drop_layers(quantised, [1, 2])
    expected = logits_of(quantised) if forward_first else None
    sh.save_model(quantised, None, tmp_path / "cut")
    reloaded = stock(tmp_path / "cut")
    assert stored_dtype(reloaded) == stored_dtype(quantised)
    assert torch.equal(logits_of(reloaded), logits_of(quantised))
    assert forward_first is False or torch.equal(logits_of(reloaded), expected)
    assert_same_state(stored(stock(tmp_path / "cut")), stored(quantised))


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_quantised_model_with_biases_comes_back_exactly(words, tmp_path, dtype):
    wide_qwen().save_pretrained(tmp_path / "whole")
    words.save_pretrained(tmp_path / "whole")
    model, _ = load_model(tmp_path / "whole", dtype)
    before = stored(model)
    logits_of(model)
    assert_same_state(stored(model), before)
    sh.drop_layers(model, [1])
    sh.save_model(model, None, tmp_path / "cut")
    assert torch.equal(logits_of(stock(tmp_path / "cut")), logits_of(model))


def test_a_quantised_model_saved_twice_is_stored_the_same(quantised, tmp_path):
    logits_of(quantised)
    sh.save_model(quantised, None, tmp_path / "one")
    logits_of(quantised)
    sh.save_model(quantised, None, tmp_path / "two")
    assert_same_state(stored(stock(tmp_path / "one")), stored(stock(tmp_path / "two")))


def test_a_cut_of_a_quantised_model_is_the_model_with_its_layers_skipped(quantised):
    layers = find_layers(quantised).modules
    handles = [
        layers[i].register_forward_hook(lambda _module, args, _output: args[0]) for i in (1, 2)
    ]
    expected = logits_of(quantised)
    for handle in handles:
        handle.remove()
    with sh.without_layers(quantised, [1, 2]):
        assert torch.equal(logits_of(quantised), expected)
    sh.drop_layers(quantised, [1, 2])
    assert torch.equal(logits_of(quantised), expected)


def test_a_quantised_checkpoint_can_be_loaded_cut_and_saved_again(quantised, words, tmp_path):
    sh.save_model(quantised, words, tmp_path / "whole")
    again, _ = load_model(tmp_path / "whole", dtype=stored_dtype(quantised))
    expected = logits_of(again)
    assert torch.equal(expected, logits_of(quantised))
    sh.drop_layers(again, [3])
    sh.save_model(again, None, tmp_path / "cut")
    assert torch.equal(logits_of(stock(tmp_path / "cut")), logits_of(again))


def by_transformers(wide, double=True):
    return AutoModelForCausalLM.from_pretrained(
        wide,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    ).eval()


def assert_saved_exactly_or_refused(model, path, expected):
    """``expected`` is the state dict of the model before its first forward."""
    try:
        sh.save_model(model, None, path)
    except sh.ModelError:
        assert not path.exists()
    else:
        assert_same_state(stored(stock(path)), expected)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("state_dict_between", [True, False])
def test_a_model_that_transformers_loaded_is_saved_exactly_or_refused(
    wide, tmp_path, double, state_dict_between
):
    expected = stored(by_transformers(wide, double))
    model = by_transformers(wide, double)
    logits_of(model)
    if state_dict_between:
        model.state_dict()
    assert_saved_exactly_or_refused(model, tmp_path / "saved", expected)


def test_a_model_that_transformers_loaded_is_saved_exactly_before_its_first_forward(wide, tmp_path):
    model = by_transformers(wide)
    expected = stored(by_transformers(wide))
    sh.save_model(model, None, tmp_path / "saved")
    assert_same_state(stored(stock(tmp_path / "saved")), expected)


def test_a_copy_of_a_quantised_model_is_saved_exactly_or_refused(quantised, tmp_path):
    expected = stored(quantised)
    logits_of(quantised)
    for number, model in enumerate((copy.deepcopy(quantised), quantised)):
        logits_of(model)
        assert_saved_exactly_or_refused(model, tmp_path / str(number), expected)


def test_a_quantised_model_moved_in_place_is_saved_exactly_or_refused(quantised, tmp_path):
    expected = stored(quantised)
    logits_of(quantised)
    quantised.to("cpu")
    logits_of(quantised)
    assert_saved_exactly_or_refused(quantised, tmp_path / "saved", expected)

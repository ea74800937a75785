"""Loading checkpoints and GGUF files, and refusing damaged ones."""

import json
import logging
import re
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import shallower as sh
from shallower.models.identity import identify, stored_dtype
from shallower.models.loading import load_model
from shallower.models.source import ModelSource
from tests.conftest import tiny_llama
from tests.cutting.tiny_models import logits_of
from tests.hub import hub as hub
from tests.models.checkpoints import CAUSAL, wide_llama
from tests.models.gguf_files import write_gguf


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


def test_loading_says_what_begins_which_dtype_auto_is_and_nothing_of_others(checkpoint, capfd):
    load_model(checkpoint)
    chosen, began, *more, ended = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"dtype (float32|bfloat16): (this CPU|on CUDA).*", chosen)
    assert (began, more) == (f"load {checkpoint.name} …", [])
    assert ended.startswith(f"load {checkpoint.name} done, 0:00:")
    ModelSource(checkpoint, "float32").load()
    assert "dtype" not in capfd.readouterr().err
    load_model(checkpoint, progress=False)
    assert capfd.readouterr() == ("", "")


def test_transformers_own_bars_are_as_they_were_afterwards(checkpoint, capfd):
    from transformers import AutoModelForCausalLM

    load_model(checkpoint, progress=False)
    capfd.readouterr()
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize("load", [load_model, lambda path: ModelSource(path).count_layers()])
@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "some/where", "."])
def test_a_place_without_a_model_is_refused(tmp_path, load, name):
    with pytest.raises(sh.ModelError):
        load(tmp_path / name)


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
    "a weight missing": without_a_tensor,
    "more layers in the config": rewritten(num_hidden_layers=7),
    "another vocabulary": rewritten(vocab_size=101),
    "a config that is no JSON": replaced("config.json", b"{"),
    "an unknown family": rewritten(model_type="nonsense"),
    "a size that is a word": rewritten(hidden_size="wide"),
    "no tokenizer": removed("tokenizer.json"),
    "a tokenizer of nothing known": replaced(
        "tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "Nonsense"}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_words(checkpoint, damage):
    DAMAGES[damage](checkpoint)
    with pytest.raises(sh.ModelError, match="checkpoint"):
        load_model(checkpoint, dtype="float32")


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
    weights = {key: value.clone() for key, value in load_file(path).items()}  # not of the file
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


@pytest.mark.parametrize("where", ["a card", "the CPU"])
def test_a_model_that_does_not_fit_is_told_with_ways_out(checkpoint, monkeypatch, where):
    def out_of_memory(*_args, **_options):
        if where == "the CPU":
            torch.empty(1 << 60)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", out_of_memory)
    ways = r"not enough memory to load .*--stream.*--dtype nf4.*--device-map"
    with pytest.raises(sh.ModelError, match=ways):
        load_model(checkpoint)


# In our own words
@pytest.mark.parametrize("load", [load_model, lambda place: ModelSource(place).read_config()])
def test_a_hub_that_cannot_be_reached_is_named_at_once(monkeypatch, load):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("shallower.texts.hub.getproxies", dict)
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)  # between tries of huggingface_hub
    with pytest.raises(sh.ModelError, match=r"127.0.0.1:9 cannot be reached.*; connect to the hub"):
        load("owner/name")
    assert not asked


@pytest.mark.parametrize("load", [load_model, lambda name: ModelSource(name).read_config()])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such", "the hub has no such model that you may read: check the name, or log in"),
        ("me/gated", "the model is gated: ask for access on its page of the hub, and log in"),
        ("me/refused", "the hub refuses your token: log in"),
        ("me/down", "the hub answers with status 503: try again later"),
        ("me/hanging", "the hub breaks the connection off: try again later"),
    ],
)
def test_why_the_hub_gives_no_model(hub, load, name, reason):
    hub.failing |= {
        "me/gated": (403, "GatedRepo"), "me/refused": 403, "me/down": 503, "me/hanging": 0,
    }  # fmt: skip
    with pytest.raises(sh.ModelError, match=rf"cannot load {name}, which .*: {reason}") as found:
        load(name)
    assert "http" not in str(found.value)


def test_an_address_is_no_model():
    with pytest.raises(sh.ModelError, match=r"is an address: expected .* a hub id as OWNER/NAME"):
        load_model("https://huggingface.co/owner/name")


def test_code_of_a_model_is_refused_in_one_sentence(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(sh.ModelError, match="code of its own") as found:
        ModelSource(checkpoint).read_config()
    assert "http" not in str(found.value)


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
    assert ModelSource(gguf_file).count_layers() == 4
    assert ModelSource(gguf_file.parent, gguf_file=gguf_file.name).count_layers() == 4


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
    reason = "the file is cut off or damaged" if part in (0.5, 0.9, -1) else ""
    with pytest.raises(sh.ModelError, match=rf"broken\.gguf.*{reason}"):
        load_model(broken, "float32")


@pytest.mark.parametrize("architecture", ["bert", "clip", "t5", "mamba", "nonsense"])
def test_a_gguf_file_of_another_family_is_refused(tmp_path, architecture):
    file = write_gguf(tmp_path / "foreign.gguf", architecture)
    with pytest.raises(sh.ModelError, match=r"foreign\.gguf"):
        load_model(file, "float32")


def test_a_gguf_file_with_a_broken_tokenizer_is_refused(tmp_path):
    file = write_gguf(tmp_path / "broken.gguf", merges=("x y",))
    with pytest.raises(sh.ModelError, match=r"broken\.gguf"):
        load_model(file, "float32")


def test_a_gguf_file_without_the_package_names_the_extra(gguf_file, monkeypatch):
    monkeypatch.setattr("shallower.models.place.find_spec", lambda _: None)
    with pytest.raises(sh.MissingExtraError, match=r"gguf.*shallower\[gguf\]"):
        load_model(gguf_file)

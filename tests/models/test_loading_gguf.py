"""Loading GGUF files."""

import tempfile

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

import shallower as sh
from shallower.models.identity import identify, stored_dtype
from shallower.models.loading import load_model
from shallower.models.source import ModelSource
from tests.cutting.tiny_models import logits_of
from tests.models.checkpoints import wide_llama
from tests.models.gguf_files import write_gguf


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

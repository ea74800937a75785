"""GGUF files are read faster, and nothing else changes."""

from contextlib import nullcontext

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter, quants
from transformers import modeling_gguf_pytorch_utils

import shallower as sh
from shallower.models import loading
from shallower.models.gguf_reading import faster_gguf
from shallower.models.loading import load_model
from shallower.studies import demo
from tests.models.gguf_files import write_gguf, written

VALUES = {
    "strings": ["", "a", "zwei ä", "三", "\x00", "x" * 1000],
    "one": ["only"],
    "bytes": [0, 255],
    "integers": [-1, 0, 1 << 30, 7],
    "floats": [0.5, -1.0],
    "flags": [True, False],
}


def write_metadata(path, endianess=GGUFEndian.LITTLE):
    writer = GGUFWriter(path, "llama", endianess=endianess)
    for name, values in VALUES.items():
        writer.add_array(f"test.{name}", values)
    writer.add_string("test.string", "text")
    writer.add_uint32("test.number", 7)
    writer.add_tensor("weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    return written(writer, path)


def described(reader):
    """All that a reader tells of a file."""
    fields = {
        name: (
            field.offset,
            field.types,
            [bytes(field.parts[place]) for place in field.data],
            field.contents(),
        )
        for name, field in reader.fields.items()
    }
    tensors = [
        (tensor.name, tensor.tensor_type, tensor.data_offset, tensor.data.tolist())
        for tensor in reader.tensors
    ]
    return fields, tensors, reader.alignment, reader.data_offset


@pytest.mark.parametrize("endianess", GGUFEndian)
def test_a_file_is_read_as_by_gguf(tmp_path, endianess):
    path = write_metadata(tmp_path / "file.gguf", endianess)
    with faster_gguf():
        found = described(gguf.GGUFReader(path))
    assert found == described(GGUFReader(path))


def test_a_file_cut_short_is_refused_wherever_gguf_refuses_it(tmp_path):
    path = write_metadata(tmp_path / "file.gguf")
    whole = path.read_bytes()
    for size in range(24, len(whole), 61):
        short = tmp_path / f"{size}.gguf"
        short.write_bytes(whole[:size])
        try:
            expected = described(GGUFReader(short))
        except Exception:
            with faster_gguf(), pytest.raises(Exception):  # noqa: B017, PT011 - bare ones
                described(gguf.GGUFReader(short))
        else:
            with faster_gguf():
                assert described(gguf.GGUFReader(short)) == expected


QUANTISED = [kind for kind in GGMLQuantizationType if kind in quants._type_traits]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1,), (5,), (48,), (2, 12), (96,)])
def test_rows_are_dequantised_to_the_same_bits(kind, shape):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(7)
    data = generator.integers(0, 256, (*shape, 2 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, kind)
        with faster_gguf():
            found = gguf.dequantize(data, kind)
    assert found.shape == expected.shape == (*shape, 2 * block)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_weights_stay_as_they_are(dtype):
    data = np.arange(24, dtype=dtype).reshape(6, 4)
    kind = {np.float32: GGMLQuantizationType.F32, np.float16: GGMLQuantizationType.F16}[dtype]
    with faster_gguf():
        assert np.array_equal(gguf.dequantize(data, kind), data.astype(np.float32))
        assert np.array_equal(gguf.dequantize(data[0], kind), data[0].astype(np.float32))


def test_a_file_is_parsed_once_and_the_table_of_names_made_once(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    counted = {"parsed": 0, "tables": 0}
    parse, table = GGUFReader.__init__, gguf.TensorNameMap.__init__

    def counting(name, function):
        def call(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(GGUFReader, "__init__", counting("parsed", parse))
    monkeypatch.setattr(gguf.TensorNameMap, "__init__", counting("tables", table))
    load_model(path, "float32")
    assert counted == {"parsed": 1, "tables": 1}


def test_the_package_is_as_before_afterwards(tmp_path):
    before = vars(gguf).copy(), modeling_gguf_pytorch_utils.tqdm
    load_model(write_gguf(tmp_path / "tiny.gguf"), "float32")
    (tmp_path / "none.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(sh.ModelError):
        load_model(tmp_path / "none.gguf", "float32")
    assert (vars(gguf), modeling_gguf_pytorch_utils.tqdm) == before


def test_the_bar_of_transformers_is_not_shown(tmp_path, capfd):
    load_model(write_gguf(tmp_path / "tiny.gguf"), "float32", progress=False)
    assert capfd.readouterr().err == ""


def loaded(path, monkeypatch, *, faster):
    with monkeypatch.context() as patched:
        if not faster:
            patched.setattr(loading, "faster_gguf", nullcontext)
        return load_model(path, "float32")


def assert_same(one, other, texts):
    (model, tokenizer), (stock, stock_tokenizer) = one, other
    weights, expected = model.state_dict(), stock.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8)), name
    assert model.config.to_dict() == stock.config.to_dict()
    assert tokenizer.backend_tokenizer.to_str() == stock_tokenizer.backend_tokenizer.to_str()
    assert tokenizer.init_kwargs == stock_tokenizer.init_kwargs
    assert tokenizer(texts)["input_ids"] == stock_tokenizer(texts)["input_ids"]


def test_model_and_tokenizer_are_those_of_transformers(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    both = [loaded(path, monkeypatch, faster=faster) for faster in (True, False)]
    assert_same(*both, ["héllo ab", "", "a b"])


@pytest.mark.slow
def test_a_real_quantised_model_is_that_of_transformers(smol, passages, monkeypatch):
    stock = loaded(demo.model_path(), monkeypatch, faster=False)
    assert_same(smol, stock, [text for part in passages for text in part])

"""The place of a model, what it says without torch, and how it is loaded where nothing is named."""

import inspect

import pytest
import torch
from transformers import AutoConfig

import shallower as sh
from shallower import cli, processes
from shallower.models import dtypes
from shallower.models.dtypes import CPU_FEATURES, choose_device_map, choose_dtype, cpu_features
from shallower.models.identity import stored_dtype
from shallower.models.loading import layers_of, load_model
from shallower.models.place import check_place
from shallower.models.source import ModelSource
from shallower.settings.stages import EvalSettings
from tests import families
from tests.conftest import mostly_slow


@pytest.fixture
def machine(monkeypatch):
    """Make this machine another one."""

    def set_up(*, cuda=False, features=(), mkldnn=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
        monkeypatch.setattr(dtypes, "cpu_features", lambda: frozenset(features))

    return set_up


@pytest.mark.parametrize("feature", CPU_FEATURES)
def test_cpus_that_multiply_bfloat16_use_it(machine, feature):
    machine(features=["avx2", feature])
    assert choose_dtype(None) == ("bfloat16", f"this CPU multiplies it, by {feature}")


@pytest.mark.parametrize("features", [(), ("avx2", "fma"), ("avx512f", "avx512bw"), ("asimd",)])
def test_other_cpus_use_float32(machine, features):
    machine(features=features)
    assert choose_dtype(None) == ("float32", "this CPU has no instructions for bfloat16")


def test_a_torch_without_its_library_for_cpus_uses_float32(machine):
    machine(features=["avx512_bf16"], mkldnn=False)
    assert choose_dtype(None)[0] == "float32"


@pytest.mark.parametrize(
    ("device_map", "dtype"),
    [
        ("auto", "bfloat16"),
        ("cuda:1", "bfloat16"),
        ({"": 0}, "bfloat16"),
        ({"model.layers.0": "cpu", "lm_head": 0}, "bfloat16"),
        ("cpu", "float32"),
        ({"": "cpu"}, "float32"),
        ({"model": "cpu", "lm_head": "disk"}, "float32"),
    ],
)
def test_cuda_uses_bfloat16_if_the_model_goes_there(machine, device_map, dtype):
    machine(cuda=True)
    assert choose_dtype(choose_device_map(device_map))[0] == dtype


def test_every_gpu_is_used_unless_devices_are_named(machine):
    machine(cuda=True)
    assert choose_device_map(None) == "auto"
    assert choose_device_map("cpu") == "cpu"
    machine(cuda=False)
    assert choose_device_map(None) is None


CPUINFO = "processor\t: 0\nmodel name\t: no avx512_bf16\n{key}\t: one two\n"


@pytest.mark.parametrize("key", ["flags", "Features"])
def test_without_torchs_word_the_kernels_is_taken(monkeypatch, tmp_path, key):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(processes, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_features() == frozenset()
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(key=key))
    assert cpu_features() == {"one", "two"}


def test_torchs_words_are_the_kernels(monkeypatch):
    found = {"sve_bf16": True, "avx512_bf16": False, "amx_bf16": True, "cpu_name": "EPYC", "l1": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_features() == {"svebf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("features", "dtype"), [(["avx512_bf16"], "bfloat16"), (["avx2"], "float32")]
)
def test_a_loaded_model_has_the_dtype_that_was_chosen(machine, checkpoint, features, dtype):
    machine(features=features)
    model, _ = load_model(checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert stored_dtype(model) == dtype
    source = ModelSource(checkpoint).resolved()
    assert source.dtype == dtype
    assert stored_dtype(source.load()[0]) == dtype


def test_a_source_says_what_a_model_is_without_loading_it(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    source = ModelSource(checkpoint)
    assert source.count_layers() == 6
    assert str(ModelSource("folder", gguf_file="model.gguf")) == "folder/model.gguf"


@pytest.mark.parametrize("path", ["", " "])
def test_a_source_refuses_an_empty_name(path):
    with pytest.raises(
        sh.ModelError, match=r"empty name: name a folder, a hub id or a \.gguf file"
    ):
        sh.ModelSource(path)


DEFAULTS = {"dtype": "auto", "device_map": None, "gguf_file": None, "trust_remote_code": False}


def test_functions_and_commands_have_the_same_defaults():
    defaults = {
        function: {name: p.default for name, p in inspect.signature(function).parameters.items()}
        for function in (load_model, ModelSource, sh.evaluate_loss)
    } | {
        name: {one.name: one.default for one in cli.parser(name).params}
        for name in ("scan", "eval", "patch", "run")
    }
    for name in ("max_length", "batch_size"):
        assert defaults[sh.evaluate_loss][name] == getattr(EvalSettings(), name)
    for name, value in DEFAULTS.items():
        for function in {*defaults} - {sh.evaluate_loss}:
            assert defaults[function][name] == value, name


QUICK = ("bart", "dory", "gemma3", "gpt2", "llama", "longcat_flash")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow(families.families(), QUICK))
def test_layers_are_counted_as_transformers_counts_them(name, tmp_path):
    families.small_config(name).save_pretrained(tmp_path)
    count = check_place(tmp_path)
    assert count in (None, layers_of(AutoConfig.from_pretrained(tmp_path)))
    if name == "llama":
        assert count == AutoConfig.from_pretrained(tmp_path).num_hidden_layers

"""What a result depends on: any change of it is seen, and nothing is read twice."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from shallower.errors import ProcessesError
from shallower.models.source import ModelSource
from shallower.store import inputs
from shallower.store.inputs import file_inputs, made_by, model_inputs, texts_inputs
from shallower.store.store import Store
from shallower.texts.sources import Texts
from tests.conftest import write_jsonl

OLD = time.time() - 1000


@pytest.fixture
def cache(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def model(tmp_path):
    """A folder as of a model, whose content nobody loads."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in (
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "x" * 100),
        ("modeling_own.py", "pass"),
    ):
        (folder / name).write_text(content)
    return folder


def settled(path):
    """Wait until a change of the file can be told from the last one by its time."""
    while time.time() - path.stat().st_ctime < inputs.RACY_SECONDS:
        time.sleep(0.01)


# Models.
def test_every_file_of_a_folder_counts(model, cache):
    source = ModelSource(model, "float32")
    expected = model_inputs(source, cache)
    assert model_inputs(source, cache) == expected is not None
    for path in list(model.iterdir()):
        kept = path.read_text()
        path.write_text(kept.replace("x", "y") + " ")
        assert model_inputs(source, cache) != expected, path
        path.write_text(kept)
        assert model_inputs(source, cache) == expected
    (model / "generation_config.json").write_text("{}")
    assert model_inputs(source, cache) != expected


def test_files_in_folders_and_hidden_ones_count(model, cache):
    (model / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    inner = [
        model / "1_Pooling" / "config.json",
        model / "additional_chat_templates" / "tool.jinja",
        model / ".model-00002.safetensors",
    ]
    for path in inner:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    files, _ = inputs.model_files(ModelSource(model))
    assert {*inner} <= {*files}
    assert files[0].parent == model
    for stat in (False, True):
        for path in inner:
            expected = model_inputs(ModelSource(model), cache, stat=stat)
            path.write_text("{ }")
            assert model_inputs(ModelSource(model), cache, stat=stat) not in (expected, None), path
            path.write_text("{}")


def test_files_of_one_name_all_count(tmp_path, cache):
    """As of two folders of tasks."""
    files = [tmp_path / folder / "task.yaml" for folder in "ab"]
    for path in files:
        path.parent.mkdir()
        path.write_text("a")
    expected = inputs.hash_of_files(files, cache)
    for path in files:
        path.write_text("b")
        assert inputs.hash_of_files(files, cache) != expected
        path.write_text("a")


def test_a_copy_is_the_same_model_and_another_name_is_another(model, cache, tmp_path):
    expected = model_inputs(ModelSource(model, "float32"), cache)
    copied = tmp_path / "elsewhere" / "model"
    shutil.copytree(model, copied)
    assert model_inputs(ModelSource(copied, "float32"), cache) == expected
    renamed = shutil.copytree(model, tmp_path / "renamed")  # its name stands in the results
    assert model_inputs(ModelSource(renamed, "float32"), cache) != expected


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"device_map": "cpu"}, {"trust_remote_code": True}],
    ids=lambda options: next(iter(options)),
)
def test_how_a_model_is_loaded_counts(model, cache, options):
    plain = {"dtype": "float32"}
    assert model_inputs(ModelSource(model, **plain), cache) != model_inputs(
        ModelSource(model, **{**plain, **options}), cache
    )


def test_a_model_is_hashed_once(model, cache, monkeypatch):
    for path in model.iterdir():
        settled(path)
    source = ModelSource(model)
    expected = model_inputs(source, cache)
    monkeypatch.setattr(inputs, "sha256_of", lambda path: pytest.fail(f"{path} is hashed again"))
    assert model_inputs(source, cache) == expected


def test_a_change_with_the_size_and_time_of_the_old_file_is_seen(model, cache):
    path = model / "model.safetensors"
    os.utime(path, (OLD, OLD))
    settled(path)
    expected = model_inputs(ModelSource(model), cache)
    path.write_text("y" * 100)
    os.utime(path, (OLD, OLD))
    assert model_inputs(ModelSource(model), cache) != expected


def test_by_place_and_time_weights_are_not_read(model, cache):
    source, path = ModelSource(model), model / "model.safetensors"
    settled(path)
    expected = model_inputs(source, cache, stat=True)
    path.chmod(0o200)
    os.utime(path)
    settled(path)
    assert model_inputs(source, cache, stat=True) not in (expected, None)
    (model / "config.json").write_text("{ }")
    assert model_inputs(source, cache, stat=True) != expected


def test_a_gguf_file_is_known_by_itself(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    expected = model_inputs(ModelSource(path), cache)
    (tmp_path / "other.gguf").write_bytes(b"other")
    assert model_inputs(ModelSource(path), cache) == expected is not None
    inside = model_inputs(ModelSource(tmp_path, gguf_file="tiny.gguf"), cache)
    assert inside["model"]["sha256"] == expected["model"]["sha256"]
    path.write_bytes(b"GGUP")
    assert model_inputs(ModelSource(path), cache) != expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", "{}"),
        ("config.json", '{"auto_map": {"AutoModelForCausalLM": "other/repo--modeling.Own"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "sub/model.safetensors"}}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["other/repo--own.Own", null]}}'),
        ("config.json", "{"),
    ],
)
def test_a_model_that_is_made_of_more_than_its_folder_is_not_known(model, cache, name, content):
    (model / name).write_text(content)
    assert model_inputs(ModelSource(model), cache) is None


def test_what_is_not_there_is_not_known(cache, tmp_path):
    assert model_inputs(ModelSource(tmp_path / "none"), cache) is None
    assert model_inputs(ModelSource("no-one/no-model"), cache) is None
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/model"):
        assert model_inputs(ModelSource(name), cache) is None
        assert file_inputs(name) is None


def test_a_repository_is_known_by_its_commit(cache, tmp_path, monkeypatch):
    import huggingface_hub

    for commit in ("1" * 40, "2" * 40):
        folder = tmp_path / "models--some--one" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

        def fetched(name, wanted, local_files_only, folder=folder):
            assert (name, wanted, local_files_only) == ("some/one", "config.json", True)
            return str(folder / wanted)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
        found = model_inputs(ModelSource("some/one"), cache)
        assert found["model"] == {"names": ["some/one"], "commit": commit, "gguf_file": None}


def test_a_hub_that_cannot_be_reached_is_not_waited_for(cache, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)  # between tries of huggingface_hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("shallower.texts.hub.getproxies", dict)
    assert model_inputs(ModelSource("no-one/no-model"), cache) is None
    assert waited == []


# Texts.
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_texts_are_known_by_what_is_read(tmp_path, cache, suffix):
    texts = ["a b", "c", "d e f"]
    path = tmp_path / f"texts.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, texts)
    else:
        path.write_text("\n".join(texts) + "\n")
    expected = texts_inputs(texts, cache)
    assert texts_inputs(Texts(str(path)), cache) == expected
    assert texts_inputs(Texts(str(path), 2), cache) == texts_inputs(texts[:2], cache) != expected
    assert texts_inputs(["a", " bc", "d e f"], cache) != expected
    settled(path)
    assert texts_inputs(Texts(str(path)), cache) == expected
    assert texts_inputs(Texts(str(path)), cache) == expected  # of the file that was hashed
    with path.open("a") as file:
        file.write('{"text": "g"}\n' if suffix == "jsonl" else "g\n")
    assert texts_inputs(Texts(str(path)), cache) == texts_inputs([*texts, "g"], cache)


def test_texts_that_are_broken_are_not_known(tmp_path, cache):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    assert texts_inputs(Texts(str(path)), cache) is None
    assert texts_inputs(Texts(str(path), 1), cache) == texts_inputs(["a"], cache)
    assert texts_inputs(["a", 3], cache) is None


def test_a_whole_dataset_of_the_hub_is_not_read_for_a_key(cache, monkeypatch):
    texts = Texts("some/dataset:train")
    monkeypatch.setattr(texts, "_hub", lambda: pytest.fail("read"))
    assert texts_inputs(texts, cache) is None
    some = Texts("some/dataset:train", 2)
    monkeypatch.setattr(some, "_hub", lambda: iter(["a", "b", "c"]))
    assert texts_inputs(some, cache) == texts_inputs(["a", "b"], cache)


# The rest.
def test_a_cache_that_is_off_asks_for_nothing(model, monkeypatch):
    monkeypatch.setattr(inputs, "hash_of_files", None)
    assert model_inputs(ModelSource(model), Store(None)) is None
    assert texts_inputs(["a"], Store(None)) is None


def test_what_is_known_of_a_file_does_not_depend_on_its_age(tmp_path):
    path = tmp_path / "states.npy"
    path.write_bytes(b"x")
    new = file_inputs(path)
    assert new is not None
    settled(path)
    assert file_inputs(path) == new
    os.utime(path, (OLD, OLD))
    old = file_inputs(path)
    assert old not in (new, None)
    settled(path)
    assert file_inputs(path) == old
    assert file_inputs(tmp_path / "none") is None


def test_a_file_that_goes_on_changing_is_not_known_by_its_time(tmp_path, monkeypatch):
    path = tmp_path / "states.npy"
    path.write_bytes(b"x")
    clock = SimpleNamespace(time=lambda: path.stat().st_mtime, sleep=lambda _: None)
    monkeypatch.setattr(inputs, "time", clock)
    assert file_inputs(path) is None


def test_the_code_and_the_versions_count():
    assert {"shallower", "torch", "transformers", "code"} <= made_by().keys()


def test_keys_load_no_torch(model, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from shallower.store.inputs import *\nfrom shallower.store.store import Store\n"
        "cache = Store(Path(sys.argv[2]))\n"
        "assert model_inputs(ModelSource(sys.argv[1]), cache)\n"
        "assert texts_inputs(['a'], cache)\n"
        "print(*({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# The machine.
@pytest.mark.parametrize(
    ("models", "seen", "counts"),
    [
        ([], "", False),
        (["Model: A100", "Model: A100"], "1", False),
        (["Model: A100", "Model: A100"], "", True),
        (["Model: A100", "Model: L4"], "1", True),
    ],
)
def test_which_of_like_cards_are_seen_does_not_count(monkeypatch, models, seen, counts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    nodes = [f"nvidia{index}" for index in range(len(models))]
    assert inputs._visible(models, nodes) == ({"CUDA_VISIBLE_DEVICES": seen} if counts else {})


def in_float64(torch):
    return contextmanager(lambda: (yield torch.set_default_dtype(torch.float64)))()


@pytest.mark.parametrize(
    "changed",
    [
        lambda torch: torch.autocast("cpu", torch.bfloat16),
        lambda torch: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        in_float64,
    ],
)
def test_what_is_set_of_torch_counts(changed):
    expected = inputs.computed()
    torch = pytest.importorskip("torch")
    assert inputs.computed() == expected
    try:
        with changed(torch):
            assert inputs.computed() != expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_threads_that_are_asked_for_count(model, cache, monkeypatch):
    expected = model_inputs(ModelSource(model), cache)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert model_inputs(ModelSource(model), cache) != expected


def test_like_machines_work_together_whichever_cards_they_were_given():
    here = inputs.machine()
    variables = {**here["variables"], "CUDA_VISIBLE_DEVICES": "7"}
    inputs.check_machine({**here, "variables": variables})
    for other in (
        {"cpu": "another"},
        {"gpus": ["Model: X"]},
        {"variables": {"SHALLOWER_TIER": "x"}},
    ):
        with pytest.raises(ProcessesError, match="the processors here are not those"):
            inputs.check_machine({**here, **other})

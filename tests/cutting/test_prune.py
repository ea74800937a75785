"""The one door: which way a cut is made, and that a plan is never forgotten on it."""

import inspect
import re
from dataclasses import fields

import pytest

import shallower as sh
from shallower.cutting.prune import plan_prune
from shallower.cutting.request import Request
from shallower.models import loading
from shallower.storage import RECORD
from tests.conftest import tiny_llama
from tests.folders import tree
from tests.models.gguf_files import write_gguf

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, words):
    """A folder with ``tiny``, a checkpoint, and ``files/tiny.gguf``."""
    folder = tmp_path_factory.mktemp("door")
    tiny_llama(initializer_range=0.2).save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    (folder / "files").mkdir()
    write_gguf(folder / "files" / "tiny.gguf")
    return folder


@pytest.fixture(scope="module")
def plans(place, words):
    """Plans of a scan for the checkpoint, and for a model of 4 layers."""
    model, tokenizer = sh.load_model(place / "tiny", dtype="float32")
    four = tiny_llama(num_layers=4)
    return sh.scan(model, tokenizer, TEXTS).plan(2), sh.scan(four, words, TEXTS).plan(2)


def test_what_names_the_layers_can_be_many_things(place, plans, tmp_path):
    plan = plans[0]
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "shallower_plan.json")
    block = plan.blocks[0]
    named = [plan, tmp_path / "plan.json", str(tmp_path), plan.blocks, [block.layers], block.layers]
    for number, what in enumerate(named):
        done = sh.prune(place / "tiny", what, tmp_path / str(number))
        assert done.blocks == plan.blocks
        assert sh.Plan.load(tmp_path / str(number) / "shallower_plan.json") == done
        assert (done == plan) == (number < 4)  # blocks of a plan know what chose them
        assert tree(tmp_path / str(number)).keys() == tree(tmp_path / "0").keys()
    with pytest.raises(sh.PlanError, match="cannot read the plan 12:20"):
        sh.prune(place / "tiny", "12:20", tmp_path / "cut")
    with pytest.raises(sh.PlanError, match=r"the plan is for 4 layers, .*tiny has 6"):
        sh.prune(place / "tiny", plans[1], tmp_path / "cut")


WAYS = [
    ("tiny", "cut", {}, "disk"),
    ("tiny", "cut", {"dtype": "float32"}, "disk"),
    ("tiny", "cut", {"max_shard_size": "30KB"}, "disk"),
    ("tiny", "cut", {"dtype": "bfloat16"}, "memory"),
    ("files/tiny.gguf", "cut", {}, "memory"),
    ("files", "cut", {"gguf_file": "tiny.gguf"}, "memory"),
    ("files/tiny.gguf", "cut.gguf", {}, "gguf"),
    ("files", "cut.gguf", {"gguf_file": "tiny.gguf"}, "gguf"),
    ("files/tiny.gguf", "cut.gguf", {"gguf_file": "tiny.gguf"}, "gguf"),
    ("files/tiny.gguf", "cut", {"as_gguf": True}, "gguf"),
]


@pytest.mark.parametrize(("source", "out", "options", "way"), WAYS)
def test_the_door_chooses_the_way(place, tmp_path, monkeypatch, source, out, options, way):
    planned = plan_prune(place / source, [1], tmp_path / out, **options)
    assert planned.way == way
    assert planned.loads_model == (way == "memory")
    assert list(tmp_path.iterdir()) == []
    if way != "memory":
        monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert sh.prune(place / source, [1], tmp_path / out, **options).dropped == (1,)
    there = {path for path in tmp_path.rglob("*") if path.is_file() and path.name != RECORD}
    if way == "memory":
        assert all(any(file.match(path.name) for path in planned.files) for file in there)
    else:
        assert there == set(planned.files)
        assert planned.num_bytes == sum(
            file.stat().st_size
            for file in there
            if file.name.startswith("model") or file.suffix == ".gguf"
        )


@pytest.mark.parametrize(("source", "out", "options", "way"), [WAYS[0], WAYS[3], WAYS[4], WAYS[6]])
def test_a_cut_is_verified(place, tmp_path, source, out, options, way):
    planned = plan_prune(place / source, [1], tmp_path / out, verify=True, **options)
    assert planned.loads_model
    assert 0 <= planned.run().difference <= 0.1


REFUSED = [
    ("tiny", "cut.gguf", {}, sh.ModelError, r"tiny is not a \.gguf file"),
    ("tiny", "cut", {"as_gguf": True}, sh.ModelError, r"tiny is not a \.gguf file"),
    ("files", "cut", {}, sh.ModelError, "holds no config.json"),
    ("none", "cut", {}, sh.ModelError, "none"),
    ("files/tiny.gguf", "cut.gguf", {"dtype": "nf4"}, sh.ModelError, "dtype='nf4'.*does not go"),
    ("files/tiny.gguf", "cut.gguf", {"device_map": "cpu"}, sh.ModelError, "--device-map cpu does"),
    (
        "files/tiny.gguf",
        "cut",
        {"as_gguf": True, "trust_remote_code": True},
        sh.ModelError,
        "trust_remote_code=True or --trust-remote-code does not go",
    ),
    ("files/tiny.gguf", "cut", {"max_shard_size": 9}, sh.OutputError, "max_shard_size or --max"),
    ("tiny", "cut", {"max_shard_size": 9, "dtype": "float16"}, sh.OutputError, "leave out dtype"),
    ("tiny", "cut", {"dtype": "float8"}, sh.ModelError, "unknown dtype 'float8'"),
    ("tiny", "tiny", {"overwrite": True}, sh.OutputError, "which is read: choose another place"),
]


@pytest.mark.parametrize(("source", "out", "options", "error", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(
    place, tmp_path, monkeypatch, source, out, options, error, message
):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    out = place / "tiny" if out == "tiny" else tmp_path / out
    before = tree(place)
    with pytest.raises(error, match=message):
        sh.prune(place / source, [1], out, **options)
    assert tree(place) == before
    assert list(tmp_path.iterdir()) == []


def test_the_door_has_three_places_and_the_words_of_the_command(shallower):
    parameters = inspect.signature(sh.prune).parameters
    by_place = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_place == ["source", "what", "out"]
    shown = shallower("prune", "--help-all").out
    for name in set(parameters) - {*by_place, "progress"}:
        option = {"experts": "drop_experts"}.get(name, name).replace("_", "-")
        assert re.search(rf"--{option}\b", shown), name
    asked = {one.name for one in fields(Request)}
    assert set(parameters) - {"what", "experts", "progress"} <= asked

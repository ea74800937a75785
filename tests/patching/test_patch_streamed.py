"""A model whose layers wait on disk is patched in closed form as one in memory, byte for byte."""

import copy

import pytest
from safetensors.torch import load_file

import shallower as sh
from shallower.models.architecture import find_layers
from shallower.models.offload import changed_weights, reading_of
from shallower.patching import least_squares
from shallower.patching.solver import Solver
from tests.conftest import mostly_slow, write_jsonl
from tests.documents import documents
from tests.examples import sentences
from tests.families import random_model
from tests.memory.test_streaming import FAMILIES, both, stored

TEXTS = sentences(120, seed=1)

quietly = pytest.mark.filterwarnings("ignore:the layers wait on disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, learned, words):
    return stored(tmp_path_factory.mktemp("stream") / "learned", copy.deepcopy(learned), words)


@pytest.fixture
def without_steps(monkeypatch):
    monkeypatch.setattr(Solver, "_descend", lambda *_args: ())


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@quietly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_patch_is_saved_with_the_same_bytes(folder, tmp_path, dtype, without_steps):
    streamed, whole, tokenizer = both(folder, dtype)
    for name, model in (("a", streamed), ("b", whole)):
        done = sh.patch(model, tokenizer, [2, 3, 5], texts=TEXTS, progress=False)
        sh.save_patched(model, tokenizer, tmp_path / name, done=done)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert done.patched < done.cut
    changed = [sorted(changed_weights(layer)) for layer in find_layers(streamed).modules]
    solved = ["mlp.down_proj.weight", "self_attn.o_proj.weight"]
    assert changed == [[], solved, solved, [], []]
    assert reading_of(streamed).passes <= 6


def test_a_streamed_patch_says_that_it_takes_no_steps(folder):
    streamed, _, tokenizer = both(folder)
    with pytest.warns(UserWarning, match="leaves out the steps"):
        done = sh.patch(streamed, tokenizer, [3], texts=TEXTS, progress=False)
    assert not done.descent


@quietly
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["gemma3_text", "gpt2"]))
def test_every_kind_of_layer_is_patched_to_the_same_bytes(family, tmp_path, words, without_steps):
    streamed, whole, tokenizer = both(stored(tmp_path / family, random_model(family), words))
    results = []
    for name, model in (("a", streamed), ("b", whole)):
        try:
            done = sh.patch(model, tokenizer, [3, 4], texts=documents(60), progress=False)
            results.append(done)
            sh.save_patched(model, tokenizer, tmp_path / name, done=done)
        except sh.PatchError as error:
            results.append(str(error))
            plan = sh.drop_layers(model, [3, 4])
            sh.save_model(model, tokenizer, tmp_path / name, plan=plan)
    assert results[0] == results[1]
    assert files(tmp_path / "a") == files(tmp_path / "b")


@quietly
def test_a_streamed_patch_goes_on_from_the_matrices_it_solved(folder, tmp_path, monkeypatch):
    streamed, _, tokenizer = both(folder)
    options = {"texts": TEXTS, "progress": False, "checkpoint": tmp_path / "kept"}
    (tmp_path / "kept").mkdir()
    first = sh.patch(streamed, tokenizer, [2, 3, 5], **options)
    solved = {
        f"{index}.{name}": weight
        for index, layer in enumerate(find_layers(streamed).modules)
        for name, weight in changed_weights(layer).items()
    }
    again, _, tokenizer = both(folder)
    monkeypatch.setattr(Solver, "_fit", lambda *_args: pytest.fail("it was solved before"))
    assert sh.patch(again, tokenizer, [2, 3, 5], **options) == first
    for name, weight in solved.items():
        index, _, path = name.partition(".")
        assert (changed_weights(find_layers(again).modules[int(index)])[path] == weight).all()


def test_a_model_in_pieces_is_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shallower.cutting.saving.PIECE", 1)
    streamed, whole, tokenizer = both(folder)
    for name, model in (("a", streamed), ("b", whole)):
        plan = sh.drop_layers(model, [2, 3])
        sh.save_model(model, tokenizer, tmp_path / name, plan=plan)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 5
    parts = [load_file(file) for file in (tmp_path / "a").glob("model-*.safetensors")]
    joined = {name: weight for part in parts for name, weight in part.items()}
    expected = load_file(tmp_path / "b" / "model.safetensors")
    assert joined.keys() == expected.keys()
    assert all((joined[name] == weight).all() for name, weight in expected.items())


@quietly
def test_a_streamed_model_is_as_before_where_a_patch_does_not_help(folder, monkeypatch):
    monkeypatch.setattr(least_squares, "RIDGES", (1e12,))
    streamed, whole, tokenizer = both(folder)
    with pytest.raises(sh.PatchError, match="does not help"):
        sh.patch(streamed, tokenizer, [range(2, 6)], texts=TEXTS, progress=False)
    assert not any(map(changed_weights, find_layers(streamed).modules))
    assert sh.evaluate_loss(streamed, tokenizer, TEXTS) == sh.evaluate_loss(whole, tokenizer, TEXTS)


@pytest.mark.filterwarnings("default:the layers wait on disk")
def test_the_command_streams_a_patch(folder, tmp_path, shallower, without_steps):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    common = ["--drop", "2,3", "--texts", texts, "--eval-texts", texts, "--dtype", "float32"]
    found = []
    for name, more in (("a", ["--stream"]), ("b", [])):
        done = shallower("patch", folder, *common, *more, "--out", tmp_path / name, "--json")
        found.append({**done.json, "written": ""})
        assert ("leaves out the steps" in done.err) == (name == "a")
    assert found[0] == found[1]
    assert files(tmp_path / "a") == files(tmp_path / "b")

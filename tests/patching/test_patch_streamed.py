"""A model whose layers are streamed from disk is patched as one in memory, byte for byte."""

import copy
import tempfile

import pytest
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from shallower import storage
from shallower.models import prefetch
from shallower.models.architecture import find_layers
from shallower.models.offload import changed_weights
from shallower.patching import checkpoint, descent
from shallower.patching.descent import Descent, MovingMatrix
from shallower.patching.solver import Solver
from tests.conftest import mostly_slow
from tests.documents import documents
from tests.examples import sentences
from tests.families import random_model
from tests.memory.test_streaming import FAMILIES, both, stored
from tests.patching.test_descent import batches_of, gone
from tests.peaks import needs_linux, peak_of, resident

TEXTS = sentences(32, seed=1)
pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, learned_six, words):
    return stored(tmp_path_factory.mktemp("stream") / "learned", copy.deepcopy(learned_six), words)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], ["bfloat16"]))
def test_a_streamed_patch_is_saved_with_the_same_bytes(folder, tmp_path, dtype):
    streamed, whole, tokenizer = both(folder, dtype)
    for name, model in (("a", streamed), ("b", whole)):
        done = sh.patch(model, tokenizer, [2, 4], texts=TEXTS, progress=False)
        sh.save_patched(model, tokenizer, tmp_path / name, done=done)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert done.patched < done.cut
    assert done.descent
    changed = [len(changed_weights(layer)) for layer in find_layers(streamed).modules]
    assert changed == [0, 7, 7, 7]  # all matrices from the first that was solved on


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["gpt2"]))
def test_every_kind_of_layer_is_patched_to_the_same_bytes(family, tmp_path, words):
    streamed, whole, tokenizer = both(stored(tmp_path / family, random_model(family), words))
    results = []
    for name, model in (("a", streamed), ("b", whole)):
        try:
            done = sh.patch(model, tokenizer, [3, 4], texts=documents(24), progress=False)
            results.append(done)
            sh.save_patched(model, tokenizer, tmp_path / name, done=done)
        except sh.PatchError as error:
            results.append(str(error))
            plan = sh.drop_layers(model, [3, 4])
            sh.save_model(model, tokenizer, tmp_path / name, plan=plan)
    assert results[0] == results[1]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_streamed_patch_goes_on_from_what_it_solved_and_the_steps_it_took(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    streamed, whole, tokenizer = both(folder)
    options = {"texts": TEXTS, "progress": False}
    expected = sh.patch(whole, tokenizer, [2, 4], **options)
    assert expected.descent  # so that steps that were lost would be missed
    options["checkpoint"] = tmp_path / "kept"
    step, left = Descent._step, [2]

    def stepping(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        step(*args)

    monkeypatch.setattr(Descent, "_step", stepping)
    with pytest.raises(KeyboardInterrupt):
        sh.patch(streamed, tokenizer, [2, 4], **options)
    assert not any(map(changed_weights, find_layers(streamed).modules))
    left[0] = 2  # of four
    monkeypatch.setattr(Solver, "_fit", lambda *_args: pytest.fail("it was solved before"))
    assert sh.patch(streamed, tokenizer, [2, 4], **options) == expected
    for one, other in zip(*(find_layers(m).modules for m in (streamed, whole)), strict=True):
        for name, weight in changed_weights(one).items():
            assert (weight == other.get_parameter(name)).all()


def test_a_streamed_patch_reads_layers_forwards_and_backwards(folder, tmp_path, monkeypatch):
    streamed, _, tokenizer = both(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    step, fetched = Descent._step, []

    def stepping(*args):
        fetched.clear()
        step(*args)

    layers = [*find_layers(streamed).modules]
    fetch = prefetch.fetch_ahead
    monkeypatch.setattr(Descent, "_step", stepping)
    monkeypatch.setattr(
        prefetch, "fetch_ahead", lambda one: fetched.append(layers.index(one)) or fetch(one)
    )
    monkeypatch.setattr(Descent, "put", lambda *_args: fetched.append("put"))
    sh.patch(streamed, tokenizer, [2, 4], texts=TEXTS, progress=False)
    assert fetched[: fetched.index("put")] == [3, 5, 3, 1]
    assert list(tmp_path.iterdir()) == []  # files of matrices have no names


@needs_linux
@pytest.mark.slow
def test_the_steps_of_layers_on_disk_hold_two_of_them(tmp_path, words, monkeypatch):
    monkeypatch.setattr(descent, "STEP_TOKENS", 1)
    monkeypatch.setattr(descent, "STEPS", 2)
    sizes = {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, num_hidden_layers=8))
    streamed, whole, tokenizer = both(stored(tmp_path / "wide", model, words))
    layer = sum(p.nbytes for p in whole.model.layers[0].parameters())
    batches, step, held = batches_of(tokenizer, TEXTS[:8]), MovingMatrix.step, []
    monkeypatch.setattr(
        MovingMatrix, "step", lambda *args: held.append(resident("RssAnon")) or step(*args)
    )
    peaks = []
    for model in (streamed, whole):
        held.clear()
        before = resident("RssAnon")
        peak_of(lambda model=model: gone(model, batches, layers=range(1, 8)))
        peaks.append((max(held) - before) / layer)
    assert peaks[0] < 5  # the weights and gradients of one, the step of a matrix, and the logits
    assert peaks[1] > 4 * 7


def test_a_folder_of_temporary_files_without_room_is_said(folder, tmp_path, monkeypatch):
    streamed, _, tokenizer = both(folder)
    options = {"texts": TEXTS, "progress": False}
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(
        sh.OutputError, match=r"of temporary files, and 0.0 MB are free in .*TMPDIR"
    ):
        sh.patch(streamed, tokenizer, [2, 3], **options)
    assert not any(map(changed_weights, find_layers(streamed).modules))


def test_a_second_patch_that_fails_leaves_the_first(folder, monkeypatch):
    streamed, _, tokenizer = both(folder)
    sh.patch(streamed, tokenizer, [3], texts=TEXTS, progress=False)
    modules = find_layers(streamed).modules
    first = [{k: w.clone() for k, w in changed_weights(one).items()} for one in modules]
    monkeypatch.setattr(Solver, "_loss", lambda *_args, **_options: 1.0)
    with pytest.raises(sh.PatchError, match="does not help"):
        sh.patch(streamed, tokenizer, [4], texts=TEXTS, progress=False)
    for before, module in zip(first, modules, strict=True):
        after = changed_weights(module)
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)


def test_a_streamed_cut_is_saved_the_same(folder, tmp_path):
    streamed, whole, tokenizer = both(folder)
    for name, model in (("a", streamed), ("b", whole)):
        plan = sh.drop_layers(model, [2, 3])
        sh.save_model(model, tokenizer, tmp_path / name, plan=plan)
    parts = [load_file(file) for file in (tmp_path / "a").glob("model*.safetensors")]
    joined = {name: weight for part in parts for name, weight in part.items()}
    expected = load_file(tmp_path / "b" / "model.safetensors")
    assert joined.keys() == expected.keys()
    assert all((joined[name] == weight).all() for name, weight in expected.items())

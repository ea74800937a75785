"""A run of a GGUF file that is not patched: a smaller GGUF file, in its own types."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

import shallower as sh
from shallower.models.source import ModelSource
from shallower.reporting.results import Run
from shallower.settings.studies import RunSettings
from shallower.studies.run import RunStudy
from tests.cutting.gguf_files import write
from tests.healing.cuts import documents
from tests.models.gguf_files import write_family

TEXTS, REPORT = documents(60, 5), documents(12, 1)
TAKEN = {"eval_texts": REPORT, "max_length": 16, "top": 1, "prompts": (), "n": 2, "patch": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of four layers whose matrices are Q8_0, and all else float32."""
    return write_family(tmp_path_factory.mktemp("gguf") / "small.gguf", "llama")


@pytest.fixture(scope="module")
def done(source, kept, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return sh.run(ModelSource(source, "float32"), texts=TEXTS, **TAKEN, out=out)


def tensors(path):
    """Types and bytes of all tensors of a file, by name."""
    found = GGUFReader(path).tensors
    return {one.name: (one.tensor_type, np.asarray(one.data).tobytes()) for one in found}


def test_every_tensor_that_stays_keeps_its_type_and_bytes(source, done):
    assert done.checkpoint == done.out / "checkpoint" / "checkpoint.gguf"
    assert {one.name for one in (done.out / "checkpoint").iterdir()} == {
        ".shallower.json", "README.md", "checkpoint.gguf", "mergekit.yaml", "prune_layers.txt",
        "shallower_plan.json",
    }  # fmt: skip
    assert Run.load(done.out).checkpoint == done.checkpoint
    before, after = tensors(source), tensors(done.checkpoint)
    assert GGMLQuantizationType.Q8_0 in {kind for kind, _ in after.values()}
    kept = [layer for layer in range(4) if layer not in done.recommended.plan.dropped]
    for name, tensor in before.items():
        block, layer, rest = (*name.split(".", 2), "")[:3]
        if block != "blk":
            assert after.pop(name) == tensor
        elif int(layer) in kept:
            assert after.pop(f"blk.{kept.index(int(layer))}.{rest}") == tensor
    assert after == {}


def test_the_file_is_that_of_prune_and_is_what_was_measured(source, done, tmp_path):
    best = done.recommended
    assert best.verified.after == "none"
    assert (best.state, best.patched, best.unpatched) == ("cut", None, None)
    sh.prune(source, best.plan, tmp_path / "cut.gguf")
    assert (tmp_path / "cut.gguf").read_bytes() == done.checkpoint.read_bytes()
    assert done.difference == 0
    loss = sh.evaluate_loss(*sh.load_model(done.checkpoint, "float32"), REPORT, max_length=16)
    assert loss.nats == pytest.approx(best.cut.nats, abs=1e-6)
    card = (done.out / "checkpoint" / "README.md").read_text()
    assert f"| held-out loss | {best.whole} → {best.cut} nats a token, " in card
    assert "shallower run small.gguf" in card
    assert "--no-patch" in card
    assert "AutoModelForCausalLM.from_pretrained(\".\", gguf_file='checkpoint.gguf')" in card


def test_of_the_proposals_the_one_that_loses_least_as_it_is_cut_wins(done):
    best, *others = done.recommended.verified.candidates
    assert others
    assert all(best.score <= one.score for one in others if not one.lost_early)


@pytest.mark.usefixtures("warm")
def test_a_checkpoint_that_has_changed_is_not_taken_for_that_of_the_run(source, done, tmp_path):
    shutil.copytree(done.out, tmp_path / "out")
    again = sh.run(ModelSource(source, "float32"), texts=TEXTS, **TAKEN, out=tmp_path / "out")
    assert again.recommended == done.recommended
    file = again.checkpoint
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(ModelSource(source, "float32"), texts=TEXTS, **TAKEN, out=tmp_path / "out")


@pytest.mark.usefixtures("warm")
def test_a_run_that_was_killed_before_it_saved_goes_on(source, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done.out, out)
    shutil.rmtree(out / "checkpoint")
    (out / ".checkpoint.0.partial").mkdir()
    results = json.loads((out / "results.json").read_text())
    for name in ("ended", "checkpoint"):
        del results["marks"][name]
    (out / "results.json").write_text(json.dumps(results))
    again = sh.run(ModelSource(source, "float32"), texts=TEXTS, **TAKEN, out=out)
    assert again.recommended.plan == done.recommended.plan
    assert again.checkpoint.read_bytes() == done.checkpoint.read_bytes()
    assert not (out / ".checkpoint.0.partial").exists()


def test_a_choice_without_a_patch_is_not_taken_for_one_with_it(source, tmp_path):
    def study(**options):
        settings = {name: one for name, one in TAKEN.items() if name != "eval_texts"}
        return RunStudy(
            models=(ModelSource(source, "float32"),),
            texts=TEXTS,
            eval_texts=REPORT,
            settings=RunSettings(**{**settings, **options}),
            out=tmp_path / "out",
        )

    bare, patched = study(), study(patch=True)
    assert bare.units()[1:] == ["n = 2, recommended, cut"]
    assert bare.gguf == source
    assert patched.gguf is None
    assert study(plan_only=True).gguf is None


# What is refused.
def test_what_needs_a_patch_is_refused_without_one():
    for options in ({"heal": True}, {"answers": True}):
        with pytest.raises(sh.RecipeError, match="only a patched cut is healed; leave out one"):
            sh.RunSettings(patch=False, **options)
    assert sh.RunSettings(patch=False, answers=False).to_words() == ["--no-patch", "--no-answers"]


def test_a_family_whose_layers_have_a_rhythm_is_refused_before_all_work(tmp_path):
    path = write(tmp_path / "even.gguf", 8, "smollm3")
    with pytest.raises(sh.ModelError, match="one layer in 4 of another kind") as refused:
        sh.run(path, texts=TEXTS, **TAKEN, out=tmp_path / "out")
    assert "leave out patch=False (--no-patch)" in str(refused.value)
    assert not (tmp_path / "out").exists()

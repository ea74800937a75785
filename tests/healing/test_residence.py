"""One model at a time: what a healing holds while it loads the next, measures and writes."""

import gc
import weakref

import pytest
from transformers import PreTrainedModel

import shallower as sh
from shallower.healing import heal as healing
from shallower.healing import job as jobs
from tests.healing.cuts import HELD_OUT, MANY, QUICK, TEXTS, documents


@pytest.fixture
def alive(monkeypatch):
    """The models that are alive at every load and when the result is written, in order."""
    loaded, found = [], []
    load = jobs.ModelSource.load

    def note(event):
        gc.collect()
        models = [model for known in loaded if (model := known()) is not None]
        found.append((event, len(models)))

    def load_watched(source, progress=None):
        note(f"load {str(source.path).rsplit('/', 1)[-1].rsplit('.', 1)[-1]}")
        model, tokenizer = load(source)
        assert isinstance(model, PreTrainedModel)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def writing(write):
        def write_watched(*args, **options):
            note("write")
            return write(*args, **options)

        return write_watched

    monkeypatch.setattr(jobs.ModelSource, "load", load_watched)
    for name in ("write_adapters", "write_merged"):
        monkeypatch.setattr(healing, name, writing(getattr(healing, name)))
    return found


def test_the_uncut_model_is_measured_in_the_place_of_the_cut(both, tmp_path, alive):
    whole, cut = both
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=QUICK, eval_texts=HELD_OUT, original=whole)
    assert alive == [("load cut", 0), ("load whole", 0), ("load cut", 0), ("write", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_patched_cut_takes_the_place_of_the_uncut_model(patchable, tmp_path, alive, merge):
    whole, cut = patchable
    sh.heal(
        cut, documents(MANY, 5), tmp_path / "out", recipe=QUICK, eval_texts=HELD_OUT,
        original=whole, from_patch=True, merge=merge,
    )  # fmt: skip
    assert alive[:3] == [("load whole", 0), ("load patched", 0), ("write", 0)]


def test_a_student_has_its_teacher_beside_it(both, tmp_path, alive):
    whole, cut = both
    recipe = sh.Recipe(
        steps=2, rank=4, max_length=16, dtype="float32", objective="kd", learning_rate=1e-3
    )
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, original=whole)
    assert alive == [("load cut", 0), ("load whole", 1), ("write", 0)]

"""A patch that was cut short goes on from the matrices it solved and the steps it took."""

import copy
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch

import shallower as sh
from shallower.errors import PatchError
from shallower.patching import checkpoint, descent
from shallower.patching.descent import Descent
from shallower.patching.patch import patch
from shallower.patching.saving import patch_to_folder
from shallower.patching.solver import Solver
from shallower.processes import partial_folder
from tests.conftest import mostly_slow
from tests.examples import sentences
from tests.folders import tree

TEXTS = sentences(24, seed=1)
BLOCKS = [range(2, 3), range(4, 5)]


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(descent, "STEP_TOKENS", 200)
        patched.setattr(descent, "STEPS", 6)
        patched.setattr(descent, "PASSES", 3)
        patched.setattr(checkpoint, "SECONDS", 0)
        patched.setattr(checkpoint, "SHARE", float("inf"))
        yield


@pytest.fixture(scope="module")
def learned(learned_six):
    return learned_six


@pytest.fixture(scope="module")
def made(learned, words, tmp_path_factory):
    """What is said of a model that was patched once, and the folder that keeps its work."""
    model, kept = copy.deepcopy(learned), tmp_path_factory.mktemp("made") / "kept"
    return patch(model, words, BLOCKS, texts=TEXTS, checkpoint=kept), kept


@pytest.fixture
def kept(made, tmp_path):
    """The folder of a patch that was made, to go on in."""
    return shutil.copytree(made[1], tmp_path / "kept")


@pytest.fixture
def counted(monkeypatch):
    """Work that was done: the layers solved and the steps taken; which of them is the last."""
    done, last = [], {}
    for owner, name, what in ((Solver, "_fit", "fit"), (Descent, "_step", "step")):
        work = getattr(owner, name)

        def counting(*args, work=work, what=what):
            if last.get(what) == done.count(what):
                raise KeyboardInterrupt
            found = work(*args)
            done.append(what)
            return found

        monkeypatch.setattr(owner, name, counting)
    return done, last


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same_weights(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("dtype", mostly_slow([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_it_ends_the_same_wherever_it_was_cut_short(
    learned, words, tmp_path, counted, capfd, dtype
):
    """A patch says where it goes on, where progress is shown."""
    done, last = counted
    whole = copy.deepcopy(learned).to(dtype)
    expected = patch(whole, words, BLOCKS, texts=TEXTS)
    assert expected.descent  # so that steps that were lost would be missed
    assert done == 2 * ["fit"] + 6 * ["step"]
    kept = tmp_path / "kept"
    done.clear()
    resumed = []
    for limit in ({"fit": 1}, {"step": 2}, {"step": 4}, {}):
        last.clear()
        last.update(limit)
        model = copy.deepcopy(learned).to(dtype)
        if limit:
            before = weights_of(model)
            with pytest.raises(KeyboardInterrupt):
                patch(model, words, BLOCKS, texts=TEXTS, checkpoint=kept)
            assert_same_weights(model, before)
            resumed += [line for line in capfd.readouterr().err.splitlines() if "resuming" in line]
        else:
            again = patch(model, words, BLOCKS, texts=TEXTS, checkpoint=kept, progress=False)
            assert again == expected
            assert "resuming" not in capfd.readouterr().err
            assert_same_weights(model, whole.state_dict())
    assert (done.count("fit"), done.count("step")) == (2, 6)  # nothing twice
    assert resumed == [
        "resuming: solved 1 of 2 layers before a block",
        "resuming: 2 of 6 steps of the patch were taken",
    ]


def test_of_another_patch_nothing_is_read(learned, words, kept, counted):
    done, _ = counted
    for layers, texts in (([range(3, 5)], TEXTS), (BLOCKS, TEXTS[:16])):
        done.clear()
        model, plain = copy.deepcopy(learned), copy.deepcopy(learned)
        found = patch(model, words, layers, texts=texts, checkpoint=kept)
        assert done.count("fit") == len(found.fits)
        assert found == patch(plain, words, layers, texts=texts)
        assert_same_weights(model, plain.state_dict())


def test_of_another_model_with_the_same_norms_nothing_is_read(learned, words, kept, counted):
    """As a model and what a healing makes of it, whose identities are the same."""
    done, _ = counted
    other = copy.deepcopy(learned)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    expected = patch(copy.deepcopy(other), words, BLOCKS, texts=TEXTS)
    done.clear()
    assert patch(other, words, BLOCKS, texts=TEXTS, checkpoint=kept) == expected
    assert done == 2 * ["fit"] + 6 * ["step"]


def test_what_is_damaged_is_made_anew(learned, words, made, kept, counted):
    done, _ = counted
    expected = made[0]
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert patch(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, checkpoint=kept) == expected
    assert done.count("fit") == len(expected.fits)


def test_what_cannot_be_kept_stops_nothing(learned, words, made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    kept = tmp_path / "file" / "kept"
    assert patch(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, checkpoint=kept) == made[0]


def test_a_folder_is_whole_or_goes_on(learned, words, tmp_path, counted):
    done, last = counted
    patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=tmp_path / "whole")
    done.clear()
    last["step"] = 3
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=out)
    assert not out.exists()
    last.clear()
    inside = partial_folder(out) / "folder"  # as if it had been killed while it saved, too
    (inside / ".checkpoint.0123.partial").mkdir()
    (inside / ".checkpoint.0123.partial" / "model.safetensors").write_bytes(b"half")
    (inside / "left.txt").write_text("of an earlier one")
    patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=out)
    assert done.count("step") == 6
    assert tree(out) == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_patch_that_does_not_help_leaves_nothing(learned, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Solver, "_loss", lambda *_args, **_options: 1.0)
    with pytest.raises(PatchError, match="does not help"):
        patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_end_loses_no_work(learned, words, tmp_path, counted, monkeypatch):
    done, _ = counted
    out = tmp_path / "out"
    with monkeypatch.context() as full:

        def no_room(*_args, **_options):
            raise sh.OutputError("no space left on device")

        full.setattr("shallower.patching.saving.save_patched", no_room)
        with pytest.raises(sh.OutputError, match="no space"):
            patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=out)
    done.clear()
    patch_to_folder(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, out=out)
    assert done == []
    assert (out / "model.safetensors").is_file()


def test_what_is_kept_leaves_room_for_the_result(learned, words, tmp_path, counted, monkeypatch):
    """Of a disk with room for the checkpoint alone nothing is taken before it."""
    size = sum(weight.nbytes for weight in learned.parameters())
    temporary = tempfile.gettempdir()
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda at: SimpleNamespace(free=size + 1000 if str(at) != temporary else 1e9),
    )
    patch(copy.deepcopy(learned), words, BLOCKS, texts=TEXTS, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()

"""What a healing leaves where it cannot end, and what the next one makes of it."""

import json
import resource
import shutil
from dataclasses import replace

import pytest

import shallower as sh
from shallower.healing import training
from tests.forks import Fork
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS

RECIPE = replace(QUICK, steps=4, eval_every=2)


@pytest.fixture(scope="module")
def whole(cut, tmp_path_factory):
    """Adapters of a healing that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    sh.heal(cut, TEXTS, out, recipe=RECIPE, eval_texts=HELD_OUT)
    return out


def heal_in_files_of(limit, cut, out):
    """Heal where no file can grow to more bytes; for a process of its own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    training.SECONDS_BETWEEN_CHECKPOINTS = 0
    try:
        sh.heal(cut, TEXTS, out, recipe=RECIPE, eval_texts=HELD_OUT)
    except sh.OutputError as error:
        print(f"refused: {error}", flush=True)
        raise SystemExit(2) from error


def same_healing(out, whole):
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = (json.loads((path / "healing.json").read_text()) for path in (out, whole))
    del one["tokens_per_second"], other["tokens_per_second"]
    assert one == other


def test_an_incomplete_checkpoint_is_not_resumed_from(cut, whole, tmp_path, monkeypatch, capfd):
    """Killed in the middle of a save, at every file of a checkpoint in turn."""
    from shallower.healing import trainer_checkpoints

    work = tmp_path / ".out.partial" / "folder" / "training"

    def interrupted(checkpoint):
        mark(checkpoint)
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    mark = trainer_checkpoints.mark_complete
    monkeypatch.setattr(trainer_checkpoints, "mark_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=RECIPE, eval_texts=HELD_OUT)
    monkeypatch.setattr(trainer_checkpoints, "mark_complete", mark)
    assert [path.name for path in work.iterdir()] == ["checkpoint-2"]
    later = work / "checkpoint-3"
    files = sorted(file.name for file in (work / "checkpoint-2").iterdir())
    assert "complete" in files
    for name in files[:3]:
        shutil.copytree(work / "checkpoint-2", later, dirs_exist_ok=True)
        (later / "complete").unlink()
        (later / name).write_bytes(b"")
        (later / "complete").unlink(missing_ok=True)
    assert "resuming:" not in capfd.readouterr().err
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=RECIPE, eval_texts=HELD_OUT)
    assert "resuming: 2 of 4 steps were taken\n" in capfd.readouterr().err
    same_healing(tmp_path / "out", whole)


def test_a_full_disk_leaves_nothing_half_written(cut, whole, tmp_path, monkeypatch):
    """Files of at most so many bytes: the adapters, the optimiser's state, or the record fail."""
    out, said = tmp_path / "healed" / "out", tmp_path / "said"
    for folder in (out.parent, said):
        folder.mkdir()
    for limit in (2_000, 10_000, 40_000):
        fork = Fork(heal_in_files_of, limit, cut, out, folder=said, name=str(limit))
        assert fork.ended() == 2, fork.err
        assert fork.out.startswith("refused: cannot write")
        assert "enforce fail" not in fork.out, "torch's sentence"
        assert "iostream" not in fork.out, "torch's sentence"
        assert not list(out.parent.glob(".out.partial/folder/training/*/complete"))
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    sh.heal(cut, TEXTS, out, recipe=RECIPE, eval_texts=HELD_OUT)
    same_healing(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_another_job_starts_anew(cut, tmp_path, monkeypatch):
    from shallower.healing import heal as healing

    monkeypatch.setattr(healing, "write_adapters", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=replace(QUICK, steps=2))
    assert (tmp_path / ".out.partial" / "folder" / "training" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    began = []
    train = healing.train

    def watched(training, *args):
        began.append(list(training.folder.glob("*")))
        return train(training, *args)

    monkeypatch.setattr(healing, "train", watched)
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=replace(QUICK, steps=2, seed=7))
    assert began == [[]]

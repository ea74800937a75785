"""What a healing leaves where it cannot end, and what the next one makes of it."""

import json
import resource
import shutil
from dataclasses import replace

import pytest

import shallower as sh
from shallower.healing import training
from tests.forks import Fork
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, kill_after_two_steps

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
    work = tmp_path / ".out.partial" / "folder" / "training"
    options = {"recipe": RECIPE, "eval_texts": HELD_OUT}
    kill_after_two_steps(monkeypatch, cut, tmp_path / "out", **options)
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
    sh.heal(cut, TEXTS, tmp_path / "out", **options)
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

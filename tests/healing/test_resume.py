"""What a healing leaves where it cannot end, and what the next one makes of it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import shallower as sh
from shallower.values.recipe import Recipe
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS

HARNESS = """
import glob, json, os, resource, sys
import torch
import shallower as sh
import shallower.healing.heal, shallower.healing.training as training, peft, matplotlib.figure
import transformers.models.llama.modeling_llama
torch.set_num_threads(1)
training.SECONDS_BETWEEN_CHECKPOINTS = 0.0
cut, texts, held_out, out, recipe, limits = json.load(sys.stdin)
recipe = sh.Recipe(**recipe)

def attempt(out, limit=None):
    child = os.fork()
    if not child:
        status = 0
        try:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sh.heal(cut, texts, out, recipe=recipe, eval_texts=held_out)
        except sh.OutputError as error:
            print(f"refused: {error}", flush=True)
            status = 2
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    parent, name = os.path.split(out)
    return status, glob.glob(f"{parent}/.{name}.partial/folder/training/*/complete")

attempt(out + "-whole")
print(json.dumps([attempt(out, limit) for limit in (*limits, None)]), flush=True)
"""


def run_harness(cut, out, recipe, limits):
    """How attempts ended whose files could grow to so many bytes, with the marks of checkpoints."""
    given = [
        str(cut), TEXTS, HELD_OUT, str(out),
        {name: getattr(recipe, name) for name in Recipe.__slots__}, limits,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps(given), capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *said, last = done.stdout.splitlines()
    return json.loads(last), said


def same_healing(out, whole):
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = (json.loads((path / "healing.json").read_text()) for path in (out, whole))
    del one["tokens_per_second"], other["tokens_per_second"]
    assert one == other


def test_an_incomplete_checkpoint_is_not_resumed_from(cut, tmp_path, monkeypatch):
    """Killed in the middle of a save, at every file of a checkpoint in turn."""
    from shallower.healing import trainer_checkpoints

    recipe = replace(QUICK, steps=4, eval_every=2)
    sh.heal(cut, TEXTS, tmp_path / "whole", recipe=recipe, eval_texts=HELD_OUT)
    work = tmp_path / ".out.partial" / "folder" / "training"

    def interrupted(checkpoint):
        mark(checkpoint)
        if checkpoint.name == "checkpoint-2":
            raise KeyboardInterrupt

    mark = trainer_checkpoints.mark_complete
    monkeypatch.setattr(trainer_checkpoints, "mark_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT)
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
    sh.heal(cut, TEXTS, tmp_path / "out", recipe=recipe, eval_texts=HELD_OUT)
    same_healing(tmp_path / "out", tmp_path / "whole")


def test_a_full_disk_leaves_nothing_half_written(cut, tmp_path):
    """Files of at most so many bytes: the adapters, the optimiser's state, or the record fail."""
    recipe = replace(QUICK, steps=4, eval_every=2)
    ends, said = run_harness(cut, tmp_path / "out", recipe, [2_000, 10_000, 40_000])
    assert ends == [[2, []], [2, []], [2, []], [0, []]]
    assert all(line.startswith("refused: cannot write") for line in said)
    same_healing(tmp_path / "out", tmp_path / "out-whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-whole"]


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

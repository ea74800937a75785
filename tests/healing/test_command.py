"""The commands `heal` and `merge`."""

import json
import sys

import pytest

import shallower as sh
from tests.commands import in_a_process
from tests.conftest import tiny_llama, write_jsonl
from tests.healing.cuts import HELD_OUT, TEXTS


# The command line
def test_the_command_heals_and_merges(shallower, cut, folder, no_rehearsal):
    texts, held_out = (
        write_jsonl(folder / "t.jsonl", TEXTS),
        write_jsonl(folder / "e.jsonl", HELD_OUT),
    )
    options = ("--dtype", "float32", "--max-length", 16, "--batch-size", 8, "--steps", 2)
    options = (*options, "--rank", 4, "--learning-rate", 0.01, "--eval-every", 1)
    data = ("--texts", texts, "--eval-texts", held_out)
    done = shallower("heal", cut, *data, "--out", "adapters", *options)
    assert done.status == 0, done.err
    assert "preset small: rank 4, peak rate 0.01, 2 steps of 16 sequences of 16 tokens" in done.out
    assert "wrote adapters" in done.out
    merged = shallower("merge", "adapters", "--out", "merged", "--json").json
    assert merged["merge"]["difference"] < 1e-5
    at_once = shallower("heal", cut, *data, "--out", "once", *options, "--merge", "--json").json
    assert at_once["written"] == "once"
    one, other = (folder / name / "model.safetensors" for name in ("merged", "once"))
    assert one.read_bytes() == other.read_bytes()
    dry = shallower("heal", cut, *data, "--out", "dry", "--dry-run", "--json", *options).json
    assert (dry["preset"], dry["rank"], dry["global_batch"]) == ("small", 4, 16)
    assert not (folder / "dry").exists()
    assert "exists already" in shallower("heal", cut, *data, "--out", "once").error
    assert "unknown preset" in shallower("heal", cut, *data, "--out", "x", "--preset", "y").error


LIGHTLY = """
import json, sys
sys.modules["torch"] = None
import shallower.cli
for sys.argv[1:] in json.loads(sys.argv[1]):
    try:
        shallower.cli.main()
    except SystemExit as ended:
        print(ended.code, flush=True)
        print("END", file=sys.stderr, flush=True)
"""
"""Commands one after the other, where torch cannot be imported."""


def test_a_wrong_option_is_refused_before_anything_heavy_is_imported(tmp_path, cut):
    wrong = [
        (("--steps", 0), "steps must be an integer of at least 1"),
        (("--preset", "gpt-5"), "unknown preset 'gpt-5'"),
        (("--from-patch",), "a patch needs the uncut model"),
        (("--objective", "kd"), "name it (original, --original)"),
        (("--objective", "mse"), "'mse' is not one of 'lm', 'kd'"),
        (("--texts", "nowhere.jsonl"), "nowhere.jsonl"),
    ]
    texts = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    command = ("heal", cut, "--texts", texts, "--out", tmp_path / "out")
    commands = json.dumps([[*map(str, (*command, *options))] for options, _ in wrong])
    done = in_a_process(sys.executable, "-c", LIGHTLY, commands)
    assert done.out.split() == ["2"] * len(wrong)
    said = done.err.split("END")
    for (options, message), each in zip(wrong, said[:-1], strict=True):
        assert message in each, options


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_another_original_is_refused_before_it_is_loaded(
    shallower, both, folder, monkeypatch, more
):
    _, cut = both
    other = tiny_llama(6)
    other.model.norm.weight.data.mul_(2)
    sh.save_model(other, None, folder / "other")
    texts = write_jsonl(folder / "t.jsonl", TEXTS)
    common = ("heal", cut, "--texts", texts, "--objective", "kd", "--out", "kd", *more)

    def load(*_args, **_options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("shallower.models.loading.load_weights", load)
    for original, why in ((cut, "the plan is for 6 layers"), (folder / "other", "another model")):
        told = shallower(*common, "--original", original)
        assert (told.status, why in told.err) == (2, True), told.err


def test_of_several_processes_one_prints_the_dry_run(
    shallower, cut, folder, monkeypatch, no_rehearsal
):
    texts = write_jsonl(folder / "t.jsonl", TEXTS)
    options = ("--texts", texts, "--out", "x", "--max-length", 16, "--dry-run", "--json")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert shallower("heal", cut, *options).json["memory"]["micro_batch"] == 2
    monkeypatch.setenv("RANK", "1")
    done = shallower("heal", cut, *options)
    assert (done.status, done.out, done.err) == (0, "", "")

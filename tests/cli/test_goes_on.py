"""A command that was cut short says where it goes on when it is called again."""

import re
import shutil

import pytest

from shallower.scanning import model as scanning
from shallower.studies.compare_rows import _Choosing
from shallower.studies.recommending import Recommending
from tests.conftest import edited, mostly_slow, tiny_llama


@pytest.fixture
def asked(tiny, texts):
    """A model, and texts to choose by and to report on."""
    files = ("--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl")
    return (tiny, *files, "--max-texts", 12, "--max-length", 16, "--out", "out")


@pytest.fixture
def cut_short(shallower, monkeypatch, cache_folder):
    """Interrupt a command at the call of a function behind the first few, and begin it again."""

    def call(command, owner, name, calls):
        work, made = getattr(owner, name), []

        def interrupting(*args, **options):
            if len(made) == calls:
                raise KeyboardInterrupt
            made.append(name)
            return work(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupting)
            first = shallower(*command)
        assert first.status == 130
        assert "resuming:" not in first.err
        assert first.err.endswith("interrupted: the same command goes on from what is done\n")
        again = shallower(*command)
        assert again.status == 0, again.err
        (said,) = [line for line in again.err.splitlines() if line.startswith("resuming")]
        return said

    return call


def test_a_scan_says_how_many_texts_were_scanned(cut_short, monkeypatch, tiny, jsonl):
    monkeypatch.setattr(scanning, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    command = ("scan", tiny, "--texts", jsonl, "--batch-size", 1, "--out", "out")
    said = cut_short(command, scanning, "_save", 1)
    assert said.startswith("resuming: 16 ")
    assert said.endswith(" texts were scanned")


@pytest.mark.parametrize(
    "options", mostly_slow([[], ["--no-cache"], ["--stream"]], [[], ["--stream"]])
)
@pytest.mark.usefixtures("undrawn")
def test_a_scan_does_not_go_on_with_other_weights(
    shallower, monkeypatch, folder, tiny, jsonl, options
):
    """The files of the model are changed between the kill and the same command."""
    shutil.copytree(tiny, folder / "model")
    monkeypatch.setattr(scanning, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    few = ("--max-texts", 5, "--batch-size", 1)
    command = ("scan", "model", "--texts", jsonl, *few, "--out", "out", *options)
    with monkeypatch.context() as patch:
        patch.setattr(scanning.ScanBuilder, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shallower(*command)
    edited(tiny_llama()).save_pretrained(folder / "model")
    said = shallower(*command).error
    assert "cannot go on from out/scan.partial.safetensors" in said
    assert "with other weights" in said
    assert [path.name for path in (folder / "out").iterdir()] == ["scan.partial.safetensors"]
    assert shallower(*command, "--overwrite").status == 0
    assert shallower(*command[: -1 - len(options)], "new", *options).status == 0
    of = [(folder / name / "scan.safetensors").read_bytes() for name in ("out", "new")]
    assert of[0] == of[1]


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_says_how_many_trials_are_known(cut_short, asked):
    command = ("compare", *asked, "--n", "1,2", "--criteria", "greedy,deepest")
    said = cut_short(command, _Choosing, "_choice", 3)
    assert re.fullmatch(r"resuming: \d+ trials of cuts are cached", said)


@pytest.mark.filterwarnings("default:the cut is not patched")
@pytest.mark.usefixtures("undrawn")
def test_a_run_says_how_far_it_came(cut_short, asked):
    command = ("run", *asked, "--n", 2, "--top", 1, "--no-speech")
    said = cut_short(command, Recommending, "_saved_now", 0)
    assert said.startswith("resuming: the layers are chosen")

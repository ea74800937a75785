"""``--push``: refused early, shown by a dry run, and the address at the end."""

import os
from pathlib import Path

import pytest

from tests.commands import SHALLOWER, in_a_process
from tests.hub import TOKEN
from tests.hub import hub as hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def test_a_cut_is_pushed_with_its_card_by_the_program_itself(hub, tiny, tmp_path):
    """In a process of its own, as a user sets it up: by environment variables alone."""
    path = os.environ.get("PYTHONPATH", "")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "SHALLOWER_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(
            str(Path(one).resolve()) for one in path.split(os.pathsep) if one
        ),
    }  # fmt: skip
    command = [SHALLOWER, "prune", tiny, "--drop", "1", "--out", "cut", "--push", "me/cut"]
    done = in_a_process(*command, "--private", cwd=tmp_path, env=environment)
    assert done.status == 0, done.err
    assert done.out.splitlines()[-2:] == ["wrote cut", f"pushed to {hub.url}/me/cut"]
    assert TOKEN not in done.out + done.err
    there = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    assert hub.repos == {"me/cut": there}
    assert {"README.md", "config.json", "model.safetensors", "shallower_plan.json"} <= set(there)
    assert b"--push" not in there["README.md"]
    assert hub.private == {"me/cut": True}


def test_the_same_command_pushes_what_is_there_already(hub, tiny, shallower):
    hub.failing["/commit/"] = 500
    command = ("prune", tiny, "--drop", "1", "--out", "cut", "--push", "me/cut")
    done = shallower(*command)
    assert done.status == 2
    assert "wrote cut" in done.out
    assert "cut is whole, and 'hf upload me/cut cut' goes on" in done.err
    assert TOKEN not in done.out + done.err
    hub.failing.clear()
    done = shallower(*command, "--json")
    assert done.json["pushed"] == f"{hub.url}/me/cut"
    assert "cut is already there, made from the same inputs" in done.err
    assert "model.safetensors" in hub.repos["me/cut"]


def test_a_dry_run_asks_the_hub_and_shows_the_place(hub, tiny, shallower):
    command = ("prune", tiny, "--drop", "1", "--out", "cut", "--push", "lab/cut", "--dry-run")
    assert "push: lab/cut\n" in shallower(*command).out
    assert shallower(*command, "--private", "--json").json["push"] == (
        "lab/cut, private if it is created"
    )
    assert hub.requests
    assert hub.repos == {}


@pytest.mark.parametrize("command", ["prune model --drop 1", "run model --texts texts --n 1"])
def test_a_push_is_refused_before_anything_is_read(hub, shallower, command):
    for repository, said in (("you/cut", "me is not you"), ("cut", "expected USER/NAME")):
        done = shallower(*command.split(), "--out", "out", "--push", repository)
        assert done.error.startswith(f"cannot push to {repository}: {said}")
    assert "--private goes with --push" in shallower(*command.split(), "--out=o", "--private").error


def test_other_weights_there_are_refused_before_the_cut(hub, tiny, shallower, tmp_path):
    hub.repos["me/cut"] = {"model-00001-of-00002.safetensors": b""}
    done = shallower("prune", tiny, "--drop", "1", "--out", "cut", "--push", "me/cut")
    assert "it has model-00001-of-00002.safetensors, which would stay" in done.error
    assert not (tmp_path / "cut").exists()


def test_what_makes_no_folder_of_a_model_is_not_pushed(hub, tiny, shallower):
    done = shallower("prune", "m.gguf", "--drop", "1", "--out", "cut.gguf", "--push", "me/cut")
    assert "--push takes a folder: make --out one by --as-gguf" in done.error
    done = shallower(
        "run", tiny, "--texts", "x", "--n", "1", "--out", "o", "--plan-only", "--push", "me/cut"
    )
    assert "--push does not go with --plan-only" in done.error


@pytest.mark.filterwarnings("default:the cut is not patched")
def test_a_run_is_pushed_once_its_model_is_saved(hub, tiny, jsonl, shallower, undrawn):
    command = ("run", tiny, "--texts", jsonl, "--n", "1", "--no-speech", "--out", "out")
    done = shallower(*command, "--push", "me/smaller")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == f"pushed to {hub.url}/me/smaller"
    assert {"README.md", "model.safetensors"} <= hub.repos["me/smaller"].keys()
    again = shallower(*command, "--push", "me/again")
    assert "is already there" in again.err
    assert hub.repos["me/again"] == hub.repos["me/smaller"]

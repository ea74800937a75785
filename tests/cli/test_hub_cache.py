"""A hub id whose model lies in the hub's cache: every command takes it from there."""

import json

import pytest
from huggingface_hub import constants

from tests.hub import COMMIT
from tests.hub import hub as hub


@pytest.fixture
def cached(hub, tiny, shallower, folder, monkeypatch):
    """``me/tiny``, downloaded by one command; what follows is without a net."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    hub.repos["me/tiny"] = {path.name: path.read_bytes() for path in tiny.iterdir()}
    assert shallower("prune", "me/tiny", "--drop", "1", "--out", "cut", "--verify").status == 0
    hub.repos["me/cut"] = {path.name: path.read_bytes() for path in (folder / "cut").iterdir()}
    return hub


def without_net(hub, monkeypatch):
    hub.requests.clear()
    hub.failing["."] = 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_without_a_net_the_cache_is_enough(cached, shallower, monkeypatch, jsonl):
    without_net(cached, monkeypatch)
    for command in (
        "scan me/tiny --texts {texts} --out scanned",
        "scan me/tiny --texts {texts} --out streamed --stream",
        "prune me/tiny --drop 1 --out again --verify",
        "eval me/tiny --texts {texts} --drop 1",
    ):
        done = shallower(*command.format(texts=jsonl).split())
        assert done.status == 0, done.err
    assert cached.requests == []
    said = shallower("prune", "me/other", "--drop", "1", "--out", "other").error
    assert said.startswith("cannot load me/other, which is no folder here (HF_HUB_OFFLINE is set: ")


def test_the_hub_is_asked_once_for_what_it_has_not(cached, shallower, jsonl):
    done = shallower("scan", "me/other", "--texts", jsonl, "--out", "scanned")
    assert done.status == 2
    assert done.err.count("ask the hub for me/other") == 1


def test_a_cut_on_the_hub_is_made_again_from_there(cached, shallower, folder):
    """Neither the cut nor its source lies here: the record names the source and its commit."""
    record = json.loads((folder / "cut" / "shallower_record.json").read_text())
    read = record["read"]["model"]
    assert (read["name"], read["commit"]) == ("me/tiny", COMMIT)
    (folder / "cut").rename(folder / "elsewhere")
    done = shallower("reproduce", "me/cut", "--json")
    assert (done.status, done.json["differences"]) == (0, [])
    cached.repos["me/other"] = {"shallower_record.json": b"{}"}
    assert "it is of another tool" in shallower("reproduce", "me/other").error

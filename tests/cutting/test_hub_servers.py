"""Servers that send something else than the hub, or make us wait."""

import logging
import threading

import pytest

import shallower as sh
from shallower import ModelError
from shallower.texts.quiet import hushed
from tests.cutting.checkpoints import DROPPED
from tests.cutting.test_hub_ranges import assert_same, cache, local, nothing_left, remote
from tests.hub import hub as hub

__all__ = ["cache", "hub", "local", "remote"]


def spoilt(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_server_that_sends_other_weights_is_found_out_where_that_can_be(remote, tmp_path):
    """It states the right hash of each file; only files that came whole can be held against it."""
    stays = "model-00001-of-00012.safetensors"
    remote.spoil = lambda name, status, headers, data: (
        (status, headers, spoilt(data, len(data) - 1))
        if name == stays and len(data) > 1000
        else (status, headers, data)
    )
    with pytest.raises(ModelError, match=f"sends another {stays} of me/tiny than it states"):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert nothing_left(tmp_path)


def test_a_server_that_is_not_the_hub_is_named(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("shallower.texts.hub.HUB", "https://huggingface.co")
    with pytest.warns(UserWarning, match=f"comes from {remote.url} .HF_ENDPOINT. and not from"):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")


def test_what_the_hub_makes_us_wait_for_is_said(remote, local, tmp_path, capfd):
    answers = iter([(500, {}, b""), (429, {"Retry-After": "7"}, b"")])

    def spoil(_name, *answer):
        return next(answers, answer)

    remote.spoil = spoil
    sh.prune("me/tiny", DROPPED, tmp_path / "cut", progress=False)
    assert_same(tmp_path / "cut", local)
    said = capfd.readouterr().err
    assert f"{remote.url} answers with status 500: asking again in 1 s\n" in said
    assert f"{remote.url} answers with status 429: asking again in 8 s\n" in said
    remote.spoil = lambda *_: (429, {"Retry-After": "3600"}, b"")
    with pytest.raises(ModelError, match="may come in 3601 s: try again then"):
        sh.prune("me/tiny", DROPPED, tmp_path / "again", progress=False)


def test_a_wait_is_said_where_no_reason_was_heard_in_its_thread(capfd):
    client = logging.getLogger("huggingface_hub.utils._http")
    with hushed():
        client.warning("'HTTP Error 500' thrown while requesting GET https://hub.example/one")
        other = threading.Thread(target=client.warning, args=["Retrying in 2.0s [Retry 1/5]."])
        other.start()
        other.join()
        client.warning("Retrying in 1.0s [Retry 1/5].")
    assert capfd.readouterr().err.splitlines() == [
        "the hub does not answer: asking again in 2 s",
        "https://hub.example answers with status 500: asking again in 1 s",
    ]

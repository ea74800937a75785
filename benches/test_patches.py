"""The operators that `patches.py` compares, against their formulas; scripts in miniature."""

import json
import sys

import numpy as np
import pytest
import torch

import objectives
import patches
import shallower as sh
import width
from patches import judged, linear
from peer_checks import START, STOP, check, tiny
from peer_operators import collect
from shallower.judgement.judges.judge import LossJudge
from shallower.models.layerwise import Layerwise
from tests.conftest import word_tokenizer, write_jsonl
from tests.examples import learned_llama, sentences


def test_operators():
    check()


def test_a_cut_with_an_operator():
    """Its losses are those of a forward in which hooks put it between the layers."""
    model, texts, batches = tiny()
    layerwise, layers = Layerwise(model), model.model.layers
    matrix = collect(layerwise, batches, START, STOP).ghosted()
    stays = [layer for layer in range(len(layers)) if not START <= layer < STOP]
    found = judged(layerwise, LossJudge(batches), stays, at=START - 1, operator=linear(matrix))
    small = matrix.float()
    hooks = [
        layers[START - 1].register_forward_hook(lambda _m, _a, out: (out.float() @ small).double())
    ]
    hooks += [
        layers[i].register_forward_hook(lambda _m, args, _out: args[0]) for i in range(START, STOP)
    ]
    expected = []
    for ids in texts:
        with torch.no_grad():
            odds = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1).numpy()
        expected.append(-sum(odds[place, token] for place, token in enumerate(ids[1:])))
    for hook in hooks:
        hook.remove()
    assert np.allclose(found.sums, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that has learned, its texts, and a patched cut of it."""
    place, words = tmp_path_factory.mktemp("miniature"), word_tokenizer()
    model = learned_llama(words, num_layers=8)
    model.config.max_position_embeddings = patches.LENGTH  # the windows' length; rotary positions
    model.save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    write_jsonl(place / "fit.jsonl", sentences(400, seed=1))
    write_jsonl(place / "report.jsonl", sentences(24, seed=2))
    (place / "long.txt").write_text(" ".join(sentences(60, seed=3)))
    done = sh.patch(model, words, [range(3, 5)], texts=sentences(400, seed=1), progress=False)
    sh.save_patched(model, words, place / "patched", done=done)
    return place


def run(monkeypatch, script, place, *more):
    """The rows that a script writes of the tiny model."""
    arguments = [
        "--model", place / "model", "--dtype", "float32", "--texts", place / "fit.jsonl",
        "--eval-texts", place / "report.jsonl", "--json", place / "rows.json", *more,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()
    return json.loads((place / "rows.json").read_text())["rows"]


def test_patches_in_miniature(monkeypatch, folder):
    """Every method has its rows, and a patch that was saved has those of the one that was made."""
    rows = run(
        monkeypatch, patches, folder, "--tokens", 4000, "--cuts", "3:5", "--windows",
        folder / "long.txt", "--folder", f"3:5={folder / 'patched'}",
    )  # fmt: skip
    assert {row["texts"] for row in rows} == {"report", "long"}
    found = {row["method"]: row for row in rows if row["texts"] == "report"}
    assert set(found) == {*patches.METHODS, "patched"}
    for row in found.values():
        back = (row["cut_loss"] - row["loss"]) / (row["cut_loss"] - row["whole"])
        assert abs(row["recovered"] - back) < 1e-9
        assert row["stock"] == (row["added_parameters"] == 0)
    assert found["refit"]["recovered"] > 0.3
    assert abs(found["patched"]["recovered"] - found["refit"]["recovered"]) < 0.05
    assert found["ghosted"]["added_parameters"] == 32 * 32


def test_objectives_in_miniature(monkeypatch, folder):
    names = ["lm", "kd"]
    rows = run(
        monkeypatch, objectives, folder, "--drop", "3:5", "--tokens", 4000, "--steps", 4,
        "--max-length", 16, "--rank", 4, "--held-out", 24, "--recipes",
        ",".join(names), "--work", folder / "objectives",
    )  # fmt: skip
    assert [row["recipe"] for row in rows] == names
    assert rows[0]["steps"] == 4
    patched = json.loads((folder / "rows.json").read_text())["patched"]
    for row in rows:
        for kind in ("choose", "report"):
            less = row[kind]["loss"] - patched[kind]["loss"]
            assert abs(row[kind]["less"]["mean"] - less) < 1e-9


def test_width_in_miniature(monkeypatch, folder):
    """All three ways leave about as many parameters, and steps bring each of them back."""
    monkeypatch.setattr(width, "CHOSEN", {1: [4], 2: [3, 4], 3: [2, 3, 4]})
    monkeypatch.setattr(width, "GRAIN", 1)
    rows = run(monkeypatch, width, folder, "--tokens", 4000, "--layers", 3)
    ways = {row["way"]: row for row in rows if "losses" in row}
    assert sorted(ways) == ["a", "b", "c"]
    assert ways["a"]["dropped"] == [2, 3, 4]
    assert ways["b"]["dropped"] == []
    most = ways["a"]["parameters"]
    for row in ways.values():
        assert 0.97 * most < row["parameters"] <= most
        assert row["losses"]["report"]["loss"] <= row["losses"]["report"]["solved"]
    less = {row["way"]: row for row in rows if "nats" in row}
    for way in "bc":
        nats = ways[way]["losses"]["report"]["loss"] - ways["a"]["losses"]["report"]["loss"]
        assert abs(less[f"{way} less a"]["nats"] - nats) < 1e-9
    assert len(rows[-1]["tried"]) == 2
    assert rows[-1]["times"]["a"]["decode"][0] == 1

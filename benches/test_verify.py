"""`verify.py` in miniature: its rows are of models that are really cut."""

import json
import sys

import pytest

import shallower as sh
import verify
from tests.conftest import word_tokenizer, write_jsonl
from tests.examples import learned_llama, sentences


def test_in_miniature(monkeypatch, tmp_path):
    words = word_tokenizer()
    model = learned_llama(words, num_layers=6)
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "fit.jsonl", sentences(60, seed=1))
    held_out = sentences(12, seed=2)
    write_jsonl(tmp_path / "report.jsonl", held_out)
    arguments = [
        "verify", "--model", tmp_path / "model", "--dtype", "float32", "--n", "2", "--count", 12,
        "--texts", tmp_path / "fit.jsonl", "--eval-texts", tmp_path / "report.jsonl",
        "--max-texts", 40, "--out", tmp_path / "rows.json",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(SystemExit):
        verify.main()
    done = json.loads((tmp_path / "rows.json").read_text())
    assert done["limits"] == dict.fromkeys(("none", "patch"), 5 * 4 * 13 / 4)
    assert [row["after"] for row in done["rows"]] == ["none", "patch"]
    for row in done["rows"]:
        for dropped, loss in (("dropped", "loss"), ("of_rival", "loss_of_rival")):
            layers = row[dropped] if dropped == "dropped" else row["none"][dropped]
            with sh.without_layers(model, layers):
                nats = sh.evaluate_loss(model, words, held_out).nats
            assert row["none"][loss] == pytest.approx(nats, abs=1e-4)
        for way in ("none", "patch"):
            one = row[way]
            assert one["more"] == pytest.approx(one["loss"] - one["loss_of_rival"], abs=1e-9)


def test_what_does_not_hold_is_said():
    row = {"n": 4, "after": "none", "layer_forwards": 90, "none": {"more": 0.03, "paired": 0.02}}
    assert [*verify.failures([row], {"none": 100})] == ["n = 4, none: +0.0300 ± 0.0200"]
    row["none"]["more"] = 0.02
    assert [*verify.failures([row], {"none": 100})] == []
    assert [*verify.failures([row], {"none": 80})] == ["none: 90 layer-forwards of at most 80"]

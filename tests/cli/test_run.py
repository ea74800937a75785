"""The commands `eval` and `run`."""

import json
import re

import pytest

import shallower as sh
from shallower import Plan
from tests.conftest import write_jsonl
from tests.documents import documents
from tests.folders import tree


# Evaluating.
def test_eval_measures_before_and_after_a_cut(shallower, folder, tiny, texts):
    held_out = documents(8, seed=1)
    model, tokenizer = sh.load_model(tiny)
    whole = sh.evaluate_loss(model, tokenizer, held_out)
    with sh.without_layers(model, [1, 3, 4]):
        cut = sh.evaluate_loss(model, tokenizer, held_out)
    command = ["eval", tiny, "--texts", texts / "held_out.jsonl"]
    dtype = str(model.dtype).removeprefix("torch.")
    assert shallower(*command, "--json").json == {"base": whole.to_json(), "dtype": dtype}
    assert shallower(*command, "--drop", "1,3:5", "--json").json == {
        "base": whole.to_json(),
        "cut": cut.to_json(),
        "difference": cut.minus(whole).to_json(),
        "dtype": dtype,
        "drop": [sh.Block(1, 2).to_json(), sh.Block(3, 5).to_json()],
    }
    shown = shallower(*command, "--drop", "1,3:5").out.splitlines()
    assert shown[0].startswith(f"all layers: {whole} nats a token, ")
    assert shown[1].startswith(f"  {whole.normalized:.4f} of ln vocabulary")
    assert shown[2].startswith(f"without [1, 2) [3, 5): {cut} nats a token")
    assert f"{whole.num_tokens:,} tokens of 8 texts" in shown[0]
    assert shown[4].startswith(f"difference: {cut.minus(whole)} nats a token, paired by text")
    assert ("tie" in shown[4]) == cut.minus(whole).tied
    assert tree(folder) == {}


@pytest.mark.filterwarnings("default:.*samples rejected")
def test_eval_carries_out_a_plan_and_counts_the_rejected(shallower, folder, tiny, plans):
    source = write_jsonl(folder / "gap.jsonl", ["w1 w2 w3", "w1", "w4 w5"])
    done = shallower("eval", tiny, "--texts", source, "--plan", plans / "tiny", "--json")
    (name,) = done.json.keys() - {"base", "drop", "dtype", "difference"}
    assert name == "cut"
    block = Plan.load(plans / "tiny" / "shallower_plan.json").blocks[0]
    assert done.json["drop"] == [sh.Block(block.start, block.stop).to_json() | block.to_json()]
    assert done.json["base"]["num_rejected"] == 1
    done = shallower("eval", tiny, "--texts", source, "--no-cache")
    assert "1 text rejected" in done.out
    assert "warning: 1 of 3 samples rejected: sample 1: " in done.err


# The whole way.
@pytest.mark.usefixtures("terse")
@pytest.mark.filterwarnings("default:the cut is not patched")
def test_run_leaves_everything_and_says_so(shallower, folder, tiny, texts, request):
    (folder / "asked.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    command = ["run", tiny, "--texts", texts / "texts.jsonl", "--speech", "asked.jsonl"]
    command += ["--eval-texts", texts / "held_out.jsonl", "--out", "out", "--top", "2", "--n", "2"]
    done = shallower(*command)
    assert done.status == 0
    assert "UserWarning" not in done.err
    assert {path.name for path in (folder / "out").iterdir()} == {
        "scan.safetensors",
        "heat_map.png",
        "shallower_plan.json",
        "shallower_record.json",
        "results.json",
        "checkpoint",
        "report.html",
        "gain.json",
        "report.md",
        "report.json",
        "figures",
    }
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    blocks = " ".join(map(str, plan.blocks))
    for part in (
        "6 layers, 16 samples",
        "likeliest token agrees, %",
        "whole: ",
        "cut: ",
        "2 layers less, as requested",
        "stock reload: logits differ by at most",
        f"Drop layers {blocks}: 33 % of layers",
        "wrote out/checkpoint",
        "page: out/report.html",
        "to upload it: hf upload USER/NAME out/checkpoint",
    ):
        assert part in done.out
    begun = [re.sub(r" (…|0/\d+)$", "", line) for line in done.err.splitlines()
             if re.search(r" (…|0/\d+)$", line)]  # fmt: skip
    assert begun == ["run", "page"]  # the steps of a run are told in its lines
    assert len(done.err.splitlines()) <= 70
    results = json.loads((folder / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["recommended"]["dropped"] == list(plan.dropped)
    assert results["whole"]["num_texts"] == 8
    model, _ = sh.load_model(folder / "out" / "checkpoint")
    assert model.config.num_hidden_layers == 4

    before = tree(folder)
    known = shallower(*command)
    assert (known.status, known.out) == (0, done.out)
    assert "already there" in known.err
    refused = shallower(*command[:-1], "3")
    assert "exists already" in refused.error
    assert tree(folder) == before

    request.getfixturevalue("undrawn")
    again = shallower(*command[:-1], "3", "--overwrite", "--json")
    assert again.status == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    places = {"out": "out", "checkpoint": "out/checkpoint", "page": "out/report.html"}
    assert again.json == {**results, **places, "not_saved": {}}
    assert results[
        "command"
    ] == "shallower run tiny --texts texts.jsonl --speech asked.jsonl " + " ".join(
        ["--eval-texts held_out.jsonl --out out --top 2 --n 3"]
    )
    for path in ("report.html", "report.md", "report.json", "results.json"):
        assert str(tiny.parent) not in (folder / "out" / path).read_text()
    (folder / "out" / "report.html").unlink()
    told = shallower("report", "out")
    assert told.out == "page: out/report.html\n"
    assert shallower("report", "out", "--out", "b.html", "--json").json == {"page": "b.html"}
    assert len(Plan.load(folder / "out" / "shallower_plan.json").dropped) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "2", "--judge", "speech", "--stream"], "leave out --stream, or the judge speech"),
        (["--target-latency", "fast"], "'fast' is no share: expected one as 0.8x"),
        (["--target-latency", "0.8x", "--forecast-device", "tpu"], "unknown device 'tpu'"),
        (["--out", "small.gguf"], "a GGUF file, by --no-patch, is checkpoint/checkpoint.gguf in"),
    ],
)
def test_a_wish_that_cannot_be_is_one_sentence(shallower, folder, tiny, texts, options, message):
    done = shallower("run", tiny, "--texts", texts / "texts.jsonl", "--out", "out", *options)
    assert message in done.error
    assert not (folder / "out").exists()

"""The commands `scan --experts` and `plan --experts`."""

import json

import pytest

import shallower as sh
from shallower.forecasts import work
from shallower.forecasts.speed import Work
from shallower.models.source import ModelSource
from tests.cutting.mixtures import mixture, unchosen

NUM_LAYERS = 3


def small():
    return mixture("mixtral", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("mixtures") / "mixtral"
    small().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scanned(mixtral, jsonl, tmp_path_factory):
    place = tmp_path_factory.mktemp("scans") / "scan.safetensors"
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    sh.scan(*sh.load_model(mixtral, "float32"), texts, experts=True).save(place)
    return place


UNSEEN = (1, 4)
"""Experts that the texts of a narrow domain never call, of every layer."""


@pytest.fixture(scope="module")
def narrow(words, jsonl, tmp_path_factory):
    place = tmp_path_factory.mktemp("narrow") / "scan.safetensors"
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    model = small()
    said = "6 of 18 experts received no token from these texts, and go first"
    with (
        unchosen(model, dict.fromkeys(range(NUM_LAYERS), UNSEEN)),
        pytest.warns(UserWarning, match=said),
    ):
        sh.scan(model, words, texts, experts=True).save(place)
    return place


def test_scan_gathers_statistics_of_experts(shallower, mixtral, jsonl, folder, scanned):
    options = ("--texts", jsonl, "--dtype", "float32", "--out", "out", "--experts")
    done = shallower("scan", mixtral, *options)
    assert done.status == 0
    unrouted = sh.Scan.load(scanned).experts.unrouted
    count = sum(map(len, unrouted.values()))
    told = f"experts: 6 in each of {NUM_LAYERS} layers, {count} of which received no token"
    assert told in done.out
    assert (folder / "out" / "scan.safetensors").read_bytes() == scanned.read_bytes()

    found = shallower("scan", mixtral, *options, "--json").json["experts"]
    assert (found["num_experts"], found["layers"]) == (6, [*range(NUM_LAYERS)])
    assert found["unrouted"] == {str(layer): list(some) for layer, some in unrouted.items()}


def test_a_dry_run_counts_the_second_run_of_the_experts(shallower, mixtral, jsonl, monkeypatch):
    each = Work(layers=1.0)
    monkeypatch.setattr(work, "measure_speed", lambda *_args, **_options: each)
    monkeypatch.setattr(work, "worked", lambda: 0.0)
    options = ("--texts", jsonl, "--out", "out", "--max-length", 32, "--dry-run", "--json")
    found, plain = (
        shallower("scan", mixtral, *options, *more).json for more in (["--experts"], [])
    )
    assert found["experts"] is True
    assert "experts" not in plain
    assert found["memory"]["peak_bytes"] > 1.1 * plain["memory"]["peak_bytes"]
    lines, tokenizer = jsonl.read_text().splitlines(), ModelSource(mixtral).load_tokenizer()
    lengths = (len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in lines)
    assert plain["time"]["seconds"] == NUM_LAYERS * sum(min(32, length) for length in lengths)
    assert found["time"]["seconds"] == 2 * plain["time"]["seconds"]


def test_plan_chooses_experts(shallower, scanned, folder):
    done = shallower("plan", scanned, "--experts", 2, "--out", "out")
    assert done.status == 0
    plan = sh.Plan.load(folder / "out" / "shallower_plan.json")
    assert plan == sh.Scan.load(scanned).plan(experts=2)
    assert f"experts: 2 of 6 go of {NUM_LAYERS} layers, by reap: mean g‖f‖" in done.out
    assert f"plan: 0 of {NUM_LAYERS} layers" in done.out
    assert "Distance is not loss" not in done.out


def test_plan_names_experts_without_tokens(shallower, scanned):
    found = sh.Scan.load(scanned).experts
    done = shallower("plan", scanned, "--experts", 1, "--criterion", "frequency")
    said = [line for line in done.out.splitlines() if "from these texts" in line]
    assert len(said) == bool(found.unrouted)
    as_json = shallower("plan", scanned, "--experts", 1, "--criterion", "ean", "--json").json
    assert as_json["unrouted"] == {str(k): list(v) for k, v in found.unrouted.items()}
    for layer, one in as_json["scores"].items():
        assert one["drop"] == as_json["experts"]["drop"][layer]
        assert max(one["scores"]) <= one["next"]


@pytest.mark.parametrize(
    ("options", "fate"),
    [
        (("--experts", 1), "3 of them go, 3 stay"),
        (("--experts", 3), "6 of them go, 0 stay"),
        (("--experts", 3, "--criterion", "man"), "6 of them go, 0 stay"),
        (("--experts", 2, "--n", 1), "4 of them go, 0 stay"),
    ],
)
def test_plan_says_what_becomes_of_them(shallower, narrow, options, fate):
    """And lets none go that the texts call while one is left that they do not."""
    done = shallower("plan", narrow, *options)
    assert fate in " ".join(done.out.split())
    found = shallower("plan", narrow, *options, "--json").json
    for gone in found["experts"]["drop"].values():
        assert {*gone} <= {*UNSEEN} or {*UNSEEN} <= {*gone}
    assert found["unrouted"] == {layer: [*UNSEEN] for layer in found["experts"]["drop"]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name a number of layers (--n), or of experts"),
        (("--experts", 2, "--max-blocks", 2), "name their number (n, --n)"),
        (("--n", 2, "--criterion", "ean"), "name their number (experts, --experts)"),
    ],
)
def test_what_cannot_be_planned_is_refused(shallower, scanned, options, said):
    done = shallower("plan", scanned, *options)
    assert done.status == 2
    assert said in done.error


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_a_config_refuses_is_not_loaded(shallower, tiny, mixtral, texts, dry):
    files = ("--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl")
    compare = ("compare", "--unit", "experts", *files, *dry)
    for command, said in (
        (("scan", tiny, *files[:2], "--out", "out", "--experts", *dry), "counts no routed experts"),
        ((*compare, tiny, "--n", 1), "counts no routed experts"),
        ((*compare, mixtral, "--n", 6), "cannot drop 6 of 6 experts a layer: expected 1 to 5"),
    ):
        done = shallower(*command)
        assert done.status == 2
        assert said in done.error
        assert "load" not in done.err
    if dry:
        told = shallower(*compare, mixtral, "--n", 1, "--criteria", "reap,layers").out
        assert "time: at least" in told


def test_experts_of_a_scan_without_them_are_refused(shallower, scans):
    done = shallower("plan", scans / "tiny", "--experts", 2)
    assert done.status == 2
    assert "the scan holds no statistics of experts" in done.error

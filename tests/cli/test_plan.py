"""The command `plan`."""

import re

import pytest

from shallower import Plan, Scan
from tests.folders import tree


# Planning.
def test_plan_shows_and_saves_the_best_block(shallower, folder, scans):
    done = shallower("plan", scans / "tiny", "--n", 2, "--out", "out")
    assert done.status == 0
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    assert plan == Scan.load(scans / "tiny" / "scan.safetensors").plan(2)
    assert "plan: 2 of 6 layers" in done.out
    assert str(plan.blocks[0]) in done.out
    assert f"angular distance {plan.blocks[0].score:.4f}" in done.out
    assert "wrote out/shallower_plan.json" in done.out.splitlines()


def test_plan_is_made_again_where_the_same_is_there(shallower, folder, scans):
    words = ("plan", scans / "tiny", "--out", "out")
    place = folder / "out" / "shallower_plan.json"
    assert shallower(*words, "--n", 2).status == 0
    before = place.read_bytes(), place.stat().st_mtime_ns
    for more in ([], ["--dry-run"], ["--overwrite"]):
        done = shallower(*words, "--n", 2, *more)
        assert done.status == 0
        said = "out/shallower_plan.json is already there, made from the same inputs"
        assert done.out.splitlines()[-1] == said
    assert shallower(*words, "--n", 2, "--json").json["drop"]
    for more in ([], ["--dry-run"]):
        refused = shallower(*words, "--n", 3, *more)
        assert "out/shallower_plan.json exists already" in refused.error
    assert (place.read_bytes(), place.stat().st_mtime_ns) == before


def test_plan_without_out_writes_nothing(shallower, folder, scans):
    file = scans / "tiny" / "scan.safetensors"
    done = shallower("plan", file, "--n", 3, "--json")
    assert done.json == Scan.load(file).plan(3).to_json()
    assert tree(folder) == {}


def test_plan_by_another_metric_or_strategy(shallower, scans):
    scanned = Scan.load(scans / "tiny" / "scan.safetensors")
    by_cosine = shallower("plan", scans / "tiny", "--n", 2, "--metric", "cosine", "--json").json
    assert by_cosine == scanned.plan(2, "cosine").to_json()
    deepest = shallower("plan", scans / "tiny", "--n", 2, "--strategy", "deepest", "--json").json
    assert deepest["strategy"] == "deepest"
    assert deepest["survivors"] == [0, 1, 2, 5]
    assert deepest["model"] == by_cosine["model"]


def test_plan_merges_scans_in_whatever_order(shallower, scans):
    both = [scans / "tiny", scans / "more" / "scan.safetensors"]
    one = shallower("plan", *both, "--n", 2, "--json").json
    other = shallower("plan", *reversed(both), "--n", 2, "--json").json
    merged = Scan.merge(Scan.load(scans / name / "scan.safetensors") for name in ("tiny", "more"))
    assert merged.num_samples == 32
    assert one == merged.plan(2).to_json()
    assert one["drop"] == other["drop"]
    assert len(one["texts"]) == 2


def test_plan_of_several_blocks_between_protected_layers(shallower, scans):
    options = ("--max-blocks", 2, "--protect-first", 1, "--protect-last", 1)
    done = shallower("plan", scans / "tiny", "--n", 3, *options, "--json")
    scanned = Scan.load(scans / "tiny" / "scan.safetensors")
    assert done.json == scanned.best_plan(3, 2, protect_first=1, protect_last=1).to_json()
    assert shallower("plan", scans / "tiny", "--n", 3, *options).out.count("drop") == len(
        scanned.best_plan(3, 2, protect_first=1, protect_last=1).blocks
    )


@pytest.mark.parametrize("metric", ["angular", "cosine"])
def test_plan_lists_the_best_blocks(shallower, scans, metric):
    arguments = ("plan", scans / "tiny", "--n", 2, "--metric", metric, "--top", 3)
    best = Scan.load(scans / "tiny" / "scan.safetensors").best_blocks(2, 3, metric)
    assert shallower(*arguments, "--json").json["top"] == [block.to_json() for block in best]
    shown = " ".join(shallower(*arguments).out.split())
    for block in best:
        assert f"{block} {block.score:.4f} ± {block.stderr:.4f}" in shown
    assert "share" not in shown


def test_plan_says_how_sure_it_is(shallower, scans):
    scanned = Scan.load(scans / "kept" / "scan.safetensors")
    sure = scanned.bootstrap(200, 7)[2]
    arguments = ("plan", scans / "kept", "--n", 2, "--bootstrap", 200, "--seed", 7)
    assert shallower(*arguments, "--json").json["bootstrap"] == {
        "num_resamples": 200,
        "seed": 7,
        "share": sure.probability,
        "probability": sure.probability,
        "distribution": sure.distribution.tolist(),
    }
    done = shallower(*arguments, "--top", 5)
    block = scanned.best_block(2)
    share = f"{sure.probability:.3f}"
    assert f"{block} is the best block in a share of {share} of 200 resamples" in done.out
    assert re.search(r" share *$", done.out, re.MULTILINE)
    assert "probability" not in done.out
    for share in sure.distribution:
        assert re.search(rf" {share:.3f} *$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bootstrap", 10), "--keep-samples"),
        (("--bootstrap", 10, "--max-blocks", 2), "leave out --max-blocks"),
        (("--strategy", "deepest", "--top", 2), "leave out"),
        (("--protect-first", 3, "--protect-last", 2), "protected"),
        (("--max-blocks", 0), "max-blocks"),
        (("--bootstrap", -1), "bootstrap"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(shallower, folder, scans, options, said):
    done = shallower("plan", scans / "tiny", "--n", 2, *options, "--out", "out")
    assert done.status == 2
    assert said in done.err
    assert tree(folder) == {}


def test_scans_that_do_not_merge_are_one_sentence(shallower, scans):
    for other, said in (("tiny", "texts"), ("twin", "different models")):
        message = shallower("plan", scans / "tiny", scans / other, "--n", 2).error
        assert said in message
        assert "ModelIdentity(" not in message

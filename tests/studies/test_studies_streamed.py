"""Curves and comparisons of a model whose layers are streamed: the same values as in memory."""

import copy
import json

import pytest

import shallower as sh
from shallower.models.offload import reading_of
from shallower.patching import descent
from shallower.values.files import COMPARISON_FILE, COMPARISON_TABLE
from tests.conftest import mostly_slow, tiny_llama, write_jsonl
from tests.documents import documents
from tests.examples import sentences
from tests.families import random_model
from tests.memory.test_streaming import FAMILIES, both, stored

TEXTS, REPORT = documents(20), documents(6, seed=1)
CURVE = {"n": [1, 2], "patch_tokens": 512, "max_length": 12, "top": 2, "cache": False}
FEW = ["angular", "greedy", "mask_regression", "weights", "deepest"]
COMPARED = {"n": [1, 2], "max_length": 12, "cache": False, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    return stored(tmp_path_factory.mktemp("stream") / "tiny", tiny_llama(5), words)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(descent, "STEP_TOKENS", 256)
    monkeypatch.setattr(descent, "STEPS", 2)


LEFT = (
    "seconds",
    "choice_seconds",
    "command",
    "job",
    "name",
    "model",
    "versions",
    "layer_forwards",
)
"""What names a study, and what it took: a model on disk is checked layer by layer."""


def plain(value, left=LEFT):
    """JSON values without those."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in left}
    return [plain(part) for part in value] if isinstance(value, list) else value


def rows(file):
    """The table of a study without the columns of time and names."""
    head, *lines = (line.split(",") for line in file.read_text().splitlines())
    left = [place for place, name in enumerate(head) if name in LEFT]
    return [[one for place, one in enumerate(line) if place not in left] for line in lines]


def curves(place, out, *, texts=TEXTS, **options):
    streamed, whole, tokenizer = both(place)
    found = []
    for name, model in (("a", streamed), ("b", whole)):
        options = {**CURVE, "progress": False, "eval_texts": REPORT, **options}
        sh.curve(model, tokenizer, texts, out=out / name, **options)
        found.append(plain(json.loads((out / name / COMPARISON_FILE).read_text())))
    assert found[0] == found[1]
    assert rows(out / "a" / COMPARISON_TABLE) == rows(out / "b" / COMPARISON_TABLE)
    return streamed, found[0]


def compared(place, out, **options):
    streamed, whole, tokenizer = both(place)
    found = []
    for name, model in (("a", streamed), ("b", whole)):
        done = sh.compare(
            model, tokenizer, TEXTS, REPORT, out=out / name, **{**COMPARED, **options}
        )
        found.append(plain(done.to_json()))
    assert found[0] == found[1]
    assert rows(out / "a" / COMPARISON_TABLE) == rows(out / "b" / COMPARISON_TABLE)
    return streamed, done


def test_a_streamed_curve_has_the_same_points(folder, tmp_path):
    streamed, curve = curves(folder, tmp_path, patch="quick", criteria=["deepest"])
    assert [row["state"] for row in curve["rows"]] == ["cut", "cut", "patched", "patched"]
    assert not any(row["failed"] for row in curve["rows"])
    assert all(p.is_meta for p in streamed.model.layers.parameters())


@pytest.mark.slow
def test_a_streamed_curve_of_full_patches_has_the_same_points(learned, words, tmp_path):
    place = stored(tmp_path / "learned", copy.deepcopy(learned), words)
    texts = {"texts": sentences(80, seed=1), "eval_texts": sentences(16, seed=2)}
    _, curve = curves(place, tmp_path, criteria=["angular", "deepest"], **texts)
    patched = [row for row in curve["rows"] if row["state"] == "patched"]
    assert len(patched) == 4
    assert not all(row["failed"] for row in patched)


@pytest.mark.slow
def test_a_streamed_curve_of_what_is_verified_has_the_same_points(folder, tmp_path):
    criteria = ["recommended", "best_plan", "one_shot"]
    curves(folder, tmp_path, patch="quick", criteria=criteria)


@pytest.mark.parametrize("judge", mostly_slow(["loss", "kl"], ["kl"]))
def test_a_streamed_comparison_has_the_same_rows(folder, tmp_path, judge):
    _, done = compared(folder, tmp_path, criteria=["angular", "deepest"], judge=judge)
    assert len(done.rows) == 8


@pytest.mark.slow
def test_every_criterion_but_taylor_has_the_same_rows_streamed(folder, tmp_path):
    _, done = compared(
        folder, tmp_path, criteria=[name for name in sh.criteria if name != "taylor"]
    )
    assert done.skipped == {}


def test_only_what_needs_gradients_is_skipped(folder, words):
    streamed, _, tokenizer = both(folder)
    options = {**COMPARED, "n": [1], "criteria": ["taylor", "deepest"]}
    done = sh.compare(streamed, tokenizer, TEXTS, REPORT, **options)
    assert list(done.skipped) == ["taylor"]
    assert "leave out taylor (--criteria)" in done.skipped["taylor"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # losses that hardly differ
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_gives_the_same_figures(family, tmp_path, words):
    place = stored(tmp_path / family, random_model(family), words)
    curves(place, tmp_path / "curve", criteria=["angular", "deepest"], n=[1])
    compared(place, tmp_path / "comparison", criteria=["angular", "deepest"])


@pytest.mark.slow
def test_more_cuts_are_no_more_passes(folder, tmp_path):
    """Of those that cost nothing to choose: as they are, and after a quick patch."""
    passes = {"curve": [], "comparison": []}
    for n in ([1], [1, 2, 3]):
        streamed, _, tokenizer = both(folder)
        options = {"patch": "quick", "criteria": ["deepest"], "n": n, "eval_texts": REPORT}
        sh.curve(streamed, tokenizer, TEXTS, out=tmp_path / f"{len(n)}", **{**CURVE, **options})
        passes["curve"].append(reading_of(streamed).bytes_read)
        streamed, _, tokenizer = both(folder)
        options = {**COMPARED, "n": n, "criteria": ["deepest", "random"]}
        sh.compare(streamed, tokenizer, TEXTS, REPORT, **options)
        passes["comparison"].append(reading_of(streamed).bytes_read)
    for few, many in passes.values():  # a layer that all cuts drop is not read
        assert few <= many < few + reading_of(streamed).of


COMMANDS = {
    "curve": ["--patch-tokens", "512", "--criteria", "angular,greedy,weights", "--top", "2"],
    "compare": ["--criteria", ",".join([*FEW, "exhaustive", "reachable"])],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_says_what_a_command_reads_at_least(folder, tmp_path, shallower, command):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    report = write_jsonl(tmp_path / "report.jsonl", REPORT)
    common = [command, folder, "--texts", texts, "--eval-texts", report, "--dtype", "float32"]
    common += ["--n", "1,2", "--max-length", "12", "--no-cache", *COMMANDS[command], "--json"]
    streamed = [*common, "--stream", "--out", tmp_path / "a"]
    planned = shallower(*streamed, "--dry-run").json
    assert ("temporary" in planned) == (command == "curve")
    done = shallower(*streamed)
    assert planned["stream"]["passes"] <= done.json["passes"] <= 4 * planned["stream"]["passes"]
    assert planned["stream"]["bytes_read"] <= done.json["bytes_read"] * 1.05
    assert f"of layers from disk, in {done.json['passes']} passes" in done.err
    whole = shallower(*common, "--out", tmp_path / "b").json
    assert "passes" not in whole
    left = ("passes", "bytes_read", "out", "page")
    one, other = (
        plain({key: value for key, value in found.items() if key not in left})
        for found in (done.json, whole)
    )
    assert one == other


def test_what_reads_all_layers_at_every_step_is_refused(folder, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    report = write_jsonl(tmp_path / "report.jsonl", REPORT)
    common = ["curve", folder, "--texts", texts, "--eval-texts", report, "--stream"]
    common += ["--n", "1", "--out", tmp_path / "out"]
    for more, way_out in (
        (["--states", "cut,healed"], "leave out the state healed (states, --states)"),
        (["--tasks", "arc_easy"], "leave out tasks (tasks, --tasks)"),
    ):
        for mode in ([], ["--dry-run"]):
            assert way_out in shallower(*common, *more, *mode).error
    for command in (common, ["compare", *common[1:]]):
        clash = shallower(*command, "--device-map", "cpu").error
        assert "--stream beside --device-map cpu" in clash
    assert not (tmp_path / "out").exists()


def test_the_command_that_makes_a_study_again_streams(folder, tmp_path):
    streamed, whole, tokenizer = both(folder)
    options = {**CURVE, "criteria": ["deepest"], "n": [1], "states": ["cut"]}
    for name, model in (("a", streamed), ("b", whole)):
        sh.curve(model, tokenizer, TEXTS, eval_texts=REPORT, out=tmp_path / name, **options)
        command = json.loads((tmp_path / name / COMPARISON_FILE).read_text())["command"]
        assert command.startswith("shallower curve MODEL --stream") == (name == "a")

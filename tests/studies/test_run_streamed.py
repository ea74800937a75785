"""A run of a model whose layers are streamed: the same plan and checkpoint as in memory."""

import json

import pytest
from safetensors.torch import load_file

import shallower as sh
from shallower.models.offload import reading_of
from shallower.values.files import PLAN_FILE, SCAN_FILE
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import documents
from tests.families import random_model
from tests.memory.test_streaming import FAMILIES, both, stored

TEXTS = documents(150)

quietly = pytest.mark.filterwarnings("ignore:no speech is measured")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    return stored(tmp_path_factory.mktemp("stream") / "tiny", tiny_llama(6), words)


def alike(one, other):
    """Results without what names the run and the time."""
    left = {"out", "page", "checkpoint", "marks", "seconds", "command", "loaded"}

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if key not in left}
        return [plain(part) for part in value] if isinstance(value, list) else value

    return plain(one) == plain(other)


def ran(place, out, *more):
    streamed, whole, tokenizer = both(place)
    results = []
    for name, model in (("a", streamed), ("b", whole)):
        options = {"n": 2, "max_length": 12, "top": 2, "cache": False, "progress": False}
        options |= {"prompts": ()} if model is whole else {}
        done = sh.run(model, tokenizer, TEXTS, out=out / name, **options)
        results.append(json.loads((out / name / "results.json").read_text()))
    assert alike(*results)
    first, second = (load_file(out / name / "checkpoint/model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)
    for name in (PLAN_FILE, SCAN_FILE):
        assert (out / "a" / name).read_bytes() == (out / "b" / name).read_bytes()
    return streamed, done


@quietly
@pytest.mark.slow
def test_a_streamed_run_makes_the_same_model(folder, tmp_path):
    streamed, done = ran(folder, tmp_path)
    assert done.recommended.patched is not None
    assert done.difference == 0
    assert reading_of(streamed).passes < 60


@quietly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the cut is not patched")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_is_run_to_the_same_model(family, tmp_path, words):
    ran(stored(tmp_path / family, random_model(family), words), tmp_path)


def test_a_training_of_a_streamed_model_is_refused(folder, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    common = ["--texts", texts, "--n", "1", "--out", tmp_path / "out", "--stream", "--heal"]
    for more in ([], ["--dry-run"]):
        done = shallower("run", folder, *common, *more)
        assert "leave out heal (--heal), and heal OUT/checkpoint" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_says_what_is_read_at_least(folder, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    common = ["--texts", texts, "--n", "1", "--top", "2", "--dtype", "float32", "--plan-only"]
    command = ["run", folder, *common, "--max-length", "12", "--no-cache", "--stream"]
    planned = shallower(*command, "--out", tmp_path / "a", "--dry-run", "--json").json["stream"]
    streamed, _, tokenizer = both(folder)
    options = {"n": 1, "top": 2, "plan_only": True, "max_length": 12, "prompts": ()}
    sh.run(streamed, tokenizer, TEXTS, out=tmp_path / "a", cache=False, **options)
    reading = reading_of(streamed)
    assert planned["passes"] <= reading.passes <= 4 * planned["passes"]
    assert planned["bytes_read"] == pytest.approx(planned["passes"] * reading.of, rel=0.05)


def test_a_dry_run_of_a_patch_says_what_is_read(folder, tmp_path, shallower):
    texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    command = ["patch", folder, "--drop", "2,4", "--texts", texts, "--stream", "--no-cache"]
    planned = shallower(*command, "--out", tmp_path / "a", "--dry-run", "--json").json["stream"]
    streamed, _, tokenizer = both(folder)
    sh.patch(streamed, tokenizer, [2, 4], texts=TEXTS)
    assert planned["passes"] == reading_of(streamed).passes + 1  # and one to save it

"""Checkpoints, texts, scans and plans for the command line."""

import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import shallower as sh
from shallower import Scan
from tests.conftest import tiny_llama, write_jsonl
from tests.documents import documents
from tests.studies.conftest import answer_shortly
from tests.studies.conftest import trained as trained


@pytest.fixture(scope="session")
def models(tmp_path_factory, words):
    """Checkpoints: ``tiny``, ``twin`` of its shape with other norms, and ``deeper``."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (
        ("tiny", tiny_llama()),
        ("twin", tiny_llama(seed=1)),
        ("deeper", tiny_llama(num_layers=8)),
    ):
        if name == "twin":
            for layer in model.model.layers:
                torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny(models):
    return models / "tiny"


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """The same 24 documents as ``texts.jsonl``, ``.txt`` and ``.parquet``; ``held_out.jsonl``."""
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "texts.jsonl", documents(24))
    (folder / "texts.txt").write_text("\n".join(documents(24)) + "\n")
    pq.write_table(pa.table({"text": documents(24)}), folder / "texts.parquet")
    write_jsonl(folder / "held_out.jsonl", documents(8, seed=1))
    return folder


@pytest.fixture(scope="session")
def jsonl(texts):
    return texts / "texts.jsonl"


@pytest.fixture(scope="session")
def scans(tmp_path_factory, models, texts):
    """Scans made in Python: ``tiny`` of the texts, ``more`` of the held-out ones, ``deeper``;
    ``kept`` is ``tiny`` with its samples."""
    folder = tmp_path_factory.mktemp("scans")
    for name, model, source in (
        ("tiny", "tiny", documents(24)),
        ("more", "tiny", documents(8, seed=1)),
        ("twin", "twin", documents(24)),
        ("deeper", "deeper", documents(24)),
    ):
        scanned = sh.scan(*sh.load_model(models / model), source, metrics=("angular", "cosine"))
        scanned.save(folder / name / "scan.safetensors")
    kept = sh.scan(*sh.load_model(models / "tiny"), documents(24), keep_samples=True)
    kept.save(folder / "kept" / "scan.safetensors")
    return folder


@pytest.fixture(scope="session")
def plans(tmp_path_factory, scans):
    folder = tmp_path_factory.mktemp("plans")
    for name in ("tiny", "twin", "deeper"):
        plan = Scan.load(scans / name / "scan.safetensors").plan(2)
        plan.save(folder / name / "shallower_plan.json")
    return folder


@pytest.fixture
def terse(monkeypatch):
    """Models answer the prompts of a study with few tokens."""
    answer_shortly(monkeypatch)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages are written without figures, and a heat map is a file of a few bytes."""
    from shallower.reporting import report
    from shallower.reporting.charts import heat_map

    monkeypatch.setattr(report, "find_spec", lambda _: None)
    warnings.filterwarnings("ignore", "the page has no figures")  # for this test, as pytest resets
    monkeypatch.setattr(heat_map, "save_heat_map", lambda _, path, *_title: path.write_text("map"))


@pytest.fixture
def layers_run():
    """What decoder layers run on, (B, T), but probes of a few tokens."""
    seen = []

    def note(module, args, _output):
        if type(module).__name__ == "LlamaDecoderLayer" and args[0].shape[1] > 3:
            seen.append(tuple(args[0].shape[:2]))

    handle = register_module_forward_hook(note)
    yield seen
    handle.remove()

"""The command `scan`, and files of states."""

import contextlib
import os
import pty
import re
import sys
import threading

import numpy as np
import pytest

import shallower as sh
from shallower import Scan
from shallower.reporting.charts import drawing
from shallower.texts.sources import Texts
from tests.conftest import write_jsonl
from tests.folders import tree
from tests.scanning.state_files import keep


# Scanning.
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "parquet"])
def test_scan_reads_every_format_to_the_same_bytes(shallower, folder, tiny, texts, scans, suffix):
    done = shallower("scan", tiny, "--texts", texts / f"texts.{suffix}", "--out", "out")
    assert done.status == 0
    assert {path.name for path in (folder / "out").iterdir()} == {
        "scan.safetensors",
        "heat_map.png",
    }
    expected = (scans / "tiny" / "scan.safetensors").read_bytes()
    assert (folder / "out" / "scan.safetensors").read_bytes() == expected
    assert (folder / "out" / "heat_map.png").read_bytes().startswith(b"\x89PNG")


def test_scan_prints_the_best_block_of_every_size(shallower, tiny, jsonl, scans):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out")
    assert "6 layers, 24 samples" in done.out
    assert "wrote out/scan.safetensors" in done.out.splitlines()
    assert "wrote out/heat_map.png" in done.out.splitlines()
    scanned = Scan.load(scans / "tiny" / "scan.safetensors")
    for n in range(1, 6):
        block = scanned.best_block(n)
        row = rf"{n} \W+{re.escape(str(block))} \W+{block.score:.4f} ± {block.stderr:.4f}"
        assert re.search(row, done.out), n


def test_scan_prints_json_for_machines(shallower, tiny, jsonl, scans):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--json")
    scanned = Scan.load(scans / "tiny" / "scan.safetensors")
    blocks = [scanned.best_block(n) for n in range(1, 6)]
    assert done.json == {
        "samples": 24,
        "num_layers": 6,
        "dtype": scanned.model.dtype,
        "positions": "last",
        "num_samples": 24,
        "num_sequences": 24,
        "num_rejected": 0,
        "rejections": [],
        "blocks": [{"n": len(block), **block.to_json()} for block in blocks],
        "written": ["out/scan.safetensors", "out/heat_map.png"],
    }


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_a_rejected_text_is_a_warning_on_standard_error(shallower, folder, tiny):
    source = write_jsonl(folder / "gap.jsonl", ["w1 w2", "", "w3"])
    done = shallower("scan", tiny, "--texts", source, "--out", "out", "--json")
    assert done.status == 0
    assert done.json["num_rejected"] == 1
    assert done.json["rejections"] == ["sample 1: empty text"]
    assert "warning: 1 of 3 samples rejected: sample 1: empty text" in done.err.splitlines()
    shown = shallower("scan", tiny, "--texts", source, "--out", "again").out
    assert "6 layers, 2 samples, 1 rejected" in shown
    assert "rejected sample 1: empty text" in shown.splitlines()


@pytest.mark.filterwarnings("default:drawing the heat map needs")
def test_without_matplotlib_the_heat_map_is_left_out_with_a_warning(
    shallower, folder, tiny, jsonl, monkeypatch
):
    monkeypatch.setattr(drawing, "find_spec", lambda _: None)
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--json")
    assert done.status == 0
    assert done.json["written"] == ["out/scan.safetensors"]
    assert "pip install 'shallower[figures]'" in done.err
    assert [path.name for path in (folder / "out").iterdir()] == ["scan.safetensors"]


def test_a_scan_in_the_place_of_a_killed_one_of_other_texts_says_what_to_do(
    shallower, folder, tiny, jsonl, scans
):
    partial = folder / "out" / "scan.partial.safetensors"
    partial.parent.mkdir()
    partial.write_bytes((scans / "more" / "scan.safetensors").read_bytes())
    before = tree(folder)
    message = shallower("scan", tiny, "--texts", jsonl, "--out", "out").error
    assert "out/scan.partial.safetensors" in message
    assert "ModelIdentity(" not in message
    assert tree(folder) == before
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--overwrite")
    assert done.status == 0
    assert Scan.load(folder / "out" / "scan.safetensors").num_samples == 24


def test_json_is_alone_on_standard_output_while_a_terminal_shows_progress(
    shallower, tiny, jsonl, monkeypatch
):
    master, slave = pty.openpty()
    shown = []

    def read():
        with contextlib.suppress(OSError):
            while part := os.read(master, 10_000):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patched:
        patched.setenv("TERM", "xterm")
        patched.setattr(sys, "stderr", terminal)
        done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--json")
    reader.join()
    os.close(master)
    assert done.status == 0
    assert done.json["num_samples"] == 24
    assert "24/24" in re.sub(r"\x1b\[[0-9;]*m", "", b"".join(shown).decode())


# States in files.
def test_analyse_gives_the_scan_of_the_model(shallower, folder, tiny, jsonl):
    assert shallower("scan", tiny, "--texts", jsonl, "--out", "one").status == 0
    kept = keep(folder / "states.safetensors", *sh.load_model(tiny), Texts(jsonl), batch_size=8)
    said = shallower("analyse", kept, "--out", "two", "--dry-run", "--json").json
    assert (said["samples"], said["states"], said["width"]) == (24, 7, 32)
    assert not (folder / "two").exists()
    done = shallower("analyse", kept, "--out", "two")
    assert done.status == 0
    assert "[" in done.out
    one, two = (folder / name / "scan.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert (folder / "two" / "heat_map.png").exists()
    assert shallower("plan", "two", "--n", 2, "--out", "plan").status == 0
    done = shallower("prune", tiny, "--plan", "plan", "--out", "cut")
    assert done.status == 0
    other = ("analyse", kept, "--out", "two", "--metrics", "cosine")
    assert "exists already" in shallower(*other).error
    shown = shallower(
        "analyse", kept, "--out", "two", "--overwrite", "--json", "--metrics", "relative_l2",
        "--keep-samples", "--cka-batch", 8,
    )  # fmt: skip
    assert shown.json["num_samples"] == 24
    again = Scan.load(two)
    assert (again.metrics, again.keeps_samples) == (("relative_l2",), True)
    assert again.cka.shape == (7, 7)


@pytest.mark.usefixtures("undrawn")
def test_metrics_are_called_what_they_are(shallower, folder, plans, scans):
    np.save(folder / "states.npy", np.random.default_rng(0).standard_normal((5, 7, 8), "f"))
    for metrics, head in (
        ("relative_l2,cosine", "relative_l2"),
        ("cosine", "1 - cosine"),
        ("norm_ratio,cosine", "1 - cosine"),
    ):
        done = shallower("analyse", "states.npy", "--metrics", metrics, "--out", metrics)
        assert done.status == 0, done.err
        assert any(line.split("drop")[-1].strip() == head for line in done.out.splitlines())
    planned = shallower("plan", scans / "tiny", "--n", 2, "--metric", "cosine").out
    assert "1 - cosine 0." in planned


@pytest.mark.usefixtures("undrawn")
def test_a_scan_by_no_distance_ends_well(shallower, folder):
    np.save(folder / "states.npy", np.random.default_rng(0).standard_normal((5, 7, 8), "f"))
    for name, options in (("said", []), ("json", ["--json"])):
        done = shallower(
            "analyse", "states.npy", "--metrics", "norm_ratio", "--out", name, *options
        )
        assert done.status == 0, done.err
        if options:
            assert done.json["blocks"] == []
        else:
            assert "norm_ratio is no distance: it chooses no blocks" in done.out


# Stopping when it is sure.
SURE = ["--until", 0.9, "--tolerance", 0.3, "--exact", "--batch-size", 1]


@pytest.mark.usefixtures("undrawn")
def test_a_scan_stops_when_it_is_sure(shallower, folder, tiny, jsonl, monkeypatch):
    monkeypatch.setattr("shallower.scanning.model.JUDGED", 16)
    command = ["scan", tiny, "--texts", jsonl, "--out"]
    done = shallower(*command, "sure", *SURE, "--json").json
    assert done["samples"] == 16
    assert done["settled"] == {"1": 16, "2": 16, "4": 16}
    assert shallower(*command, "sure", *SURE, "--json").json == done
    said = "sure by 0.9 within 0.3, by bets: n = 1 after 16 texts; n = 2 after 16 texts"
    assert said in " ".join(shallower(*command, "sure", *SURE).out.split())
    shallower(*command, "plain", "--batch-size", 1, "--max-texts", 16)
    one, other = (folder / name / "scan.safetensors" for name in ("sure", "plain"))
    assert one.read_bytes() == other.read_bytes()
    assert tree(folder / "sure").keys() == tree(folder / "plain").keys()
    again = shallower(*command, "sure", "--until", 0.9)
    assert again.status == 2
    assert "exists already" in again.err


def test_a_dry_run_says_how_sure_a_scan_is_to_be(shallower, tiny, jsonl):
    command = ["scan", tiny, "--texts", jsonl, "--out", "out", "--until", 0.99, "--dry-run"]
    assert "until: sure by 0.99 within 0.005 for n = 1, 2, 4" in shallower(*command).out

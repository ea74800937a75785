"""What a command refuses before anything heavy is imported, and so within a second or two."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.commands import NO_INTEGER
from tests.conftest import write_jsonl

CODE = """
import contextlib, io, json, os, sys
from shallower.cli import main
folder, commands = json.load(sys.stdin)
os.chdir(folder)
for command in commands:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.suppress(SystemExit):
        main(command)
    heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
    print(json.dumps([error.getvalue(), sorted(heavy)]))
"""
"""All commands in one process: what one of them imports is there for all behind it."""

SCAN = "scan {tiny} --out out --texts "
RUN = "run {tiny} --out out --texts {texts} --eval-texts "
CURVE = "curve {tiny} --out out --texts {texts} --eval-texts "
EVAL = "eval {tiny} --texts "
HEAL = "heal {tiny} --out out --texts "
PATCH = "patch {tiny} --drop 1 --out out --texts "
MODELS = {
    "./none": "there is no model at none",
    "none/of/these": "cannot load none/of/these, which is no folder here",
    "empty.gguf": "empty.gguf is damaged at byte 0",
    "other.gguf": "other.gguf is not a GGUF file",
    "{tiny}/config.json": "config.json is a file: expected a folder, a hub id or a .gguf file",
    "taken": "taken holds no config.json: expected a checkpoint of transformers",
    "damaged": "cannot read damaged/config.json",
    "cut_off": "cut_off/model.safetensors is cut off, or no safetensors: download it again",
    "bare": "bare holds no weights: expected safetensors beside its config",
}
"""Models that cannot be loaded, and why."""

ON_A_MODEL = {
    "scan": "scan {} --texts {{texts}} --out out",
    "eval": "eval {} --texts {{texts}}",
    "against": "eval {{tiny}} --texts {{texts}} --against {}",
    "patch": "patch {} --drop 1 --texts {{texts}} --out out",
    "run": "run {} --texts {{texts}} --n 1 --out out",
    "compare": "compare {} --texts {{texts}} --eval-texts {{held}} --n 1",
    "curve": "curve {} --texts {{texts}} --eval-texts {{held}} --n 1 --out out",
    "original": "heal {{cut}} --texts {{texts}} --out out --original {}",
}
"""Commands that load a model."""

EARLY = [
    (SCAN + "none.jsonl", "no text file none.jsonl"),
    (SCAN + "field.jsonl", "field.jsonl, line 1: no field `text`"),
    (SCAN + "{texts} --metrics taxicab", "taxicab"),
    (SCAN + "{texts} --positions first", "last, last:K, random:K or all"),
    (SCAN + "{texts} --dtype float8", "float8"),
    (SCAN + "{texts} --until 1.0 --tolerance 0", "until = 1.0, which no number of texts reaches"),
    (SCAN + "{texts} --until 0.9 --n 0", "cannot read '0': expected block sizes from 1 on"),
    (SCAN + "{texts} --until 0.9 --n 1,6", "cannot drop n = 6 of 6 layers: expected 1 <= n <= 5"),
    (SCAN + "{texts} --out taken", "taken/scan.safetensors exists already"),
    (EVAL + "{texts} --drop 1 --plan none", "--drop 1 and --plan none both name the layers"),
    (EVAL + "{texts} --speech none.jsonl", "there is no file of prompts none.jsonl"),
    (EVAL + "{texts} --speech --shard 1/2 --out out", "--speech is measured by one process"),
    (RUN + "{texts} --n 1,2", f"'--n': {NO_INTEGER}"),
    (RUN + "{texts} --n 2 --params 9", "n and params are given"),
    (RUN + "{texts} --heal-steps 2", "--heal-steps without --heal"),
    (RUN + "{held} --out taken", "taken/results.json exists already"),
    (RUN + "{held} --out healed --heal", "healed/healed exists already"),
    ("curve {tiny} --out out --texts {texts}", "--eval-texts is missing: name a test set"),
    (CURVE + "{texts} --states mended", "unknown state 'mended'"),
    (CURVE + "{texts} --heal-steps 2", "--heal-steps without --states healed"),
    (PATCH + "{texts} --out taken", "taken exists already"),
    (HEAL + "{texts} --out taken", "taken exists already"),
    (HEAL + "{texts} --dropout 2", "dropout"),
    ("merge taken --out healed", "healed exists already"),
    ("demo --out taken", "taken/results.json exists already"),
    ("plan none --n 2", "no scan file none"),
    ("plan {scan} --n 2 --out taken", "taken/shallower_plan.json exists already"),
    ("report taken", "taken/results.json is not of a run, or is damaged"),
    ("report taken --out there", "there: expected the place of a page, as page.html (out, --out)"),
    ("analyse none.npy --out out", "no states file none.npy"),
    ("prune {tiny} --out out", "by --drop as 12:20, or by --plan"),
    ("prune {tiny} --drop junk --out out", "cannot read 'junk'"),
    ("prune {tiny} --drop 1 --out taken", "taken exists already"),
    (SCAN + "allenai/c4", "id:split"),
    (SCAN + "{texts} --max-text 3", "--max-text"),
    ("plan {scan} --n 2 --strategy best", "--strategy"),
    ("prune {tiny} --drop 1 --plan none --out out", "both name the layers to drop: give one"),
    ("prnue {tiny}", "prnue"),
    (SCAN + "blank.jsonl", "no texts in blank.jsonl: all 2 are blank"),
    (
        "merge other.gguf --out out",
        "damaged (it is no text in UTF-8): name what shallower heal left",
    ),
    ("plan {texts} --n 2", "expected the scan.safetensors that shallower scan or analyse wrote"),
    *((ON_A_MODEL["scan"].format(model), why) for model, why in MODELS.items()),
    *((of.format("empty.gguf"), MODELS["empty.gguf"]) for of in ON_A_MODEL.values()),
    *((ON_A_MODEL[name].format("cut_off"), MODELS["cut_off"]) for name in ("eval", "run", "patch")),
    ("prune empty.gguf --drop 1 --out out", MODELS["empty.gguf"]),
    ("heal {tiny} --texts {texts} --out out", "was not cut: there is no shallower_plan.json"),
    ("heal empty.gguf --texts {texts} --out out", "cut the whole model into a folder"),
    ("eval {tiny} --texts {texts} --drop 6", "no layer 6"),
    (RUN + "{held} --n 6", "cannot drop n = 6 of 6 layers"),
    ("compare {tiny} --texts {texts} --eval-texts {held} --n 6", "cannot drop n = 6 of 6 layers"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, models, texts, scans, plans):
    folder = tmp_path_factory.mktemp("early")
    (folder / "field.jsonl").write_text(json.dumps({"body": "w1 w2"}) + "\n")
    for name in ("taken", "healed/healed"):
        (folder / name).mkdir(parents=True)
    (folder / "healed" / "healed" / "dear").write_text("to someone")
    for name in ("scan.safetensors", "results.json", "shallower_plan.json"):
        (folder / "taken" / name).write_text("dear to someone")
    write_jsonl(folder / "blank.jsonl", ["", " \n"])
    (folder / "empty.gguf").touch()
    (folder / "other.gguf").write_bytes(b"\xff this is none")
    for name in ("damaged", "cut_off", "bare", "cut"):
        shutil.copytree(models / "tiny", folder / name)
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "bare" / "model.safetensors").unlink()
    weights = folder / "cut_off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copy(plans / "tiny" / "shallower_plan.json", folder / "cut")
    names = {
        "tiny": models / "tiny",
        "cut": "cut",
        "texts": texts / "texts.jsonl",
        "held": texts / "held_out.jsonl",
        "scan": scans / "tiny",
    }
    return folder, names


@pytest.fixture(scope="module")
def ended(place):
    """How every command ended: what it said, and what is imported then."""
    folder, names = place
    commands = [shlex.split(command.format(**names)) for command, _ in EARLY]
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps([str(folder), commands]),
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip([command for command, _ in EARLY], results, strict=True))


@pytest.mark.parametrize(("command", "message"), EARLY, ids=[command for command, _ in EARLY])
def test_a_mistake_is_refused_before_anything_heavy_is_imported(place, ended, command, message):
    said, heavy = ended[command]
    (error,) = said.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert heavy == []
    assert not (place[0] / "out").exists()

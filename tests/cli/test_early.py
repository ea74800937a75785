"""What a command refuses before anything heavy is imported, and so within a second or two."""

import json
import shlex
import sys

import pytest

from tests.commands import in_a_process

HEAVY = {"torch", "transformers", "datasets", "matplotlib"}
CODE = (
    "import sys\nfrom shallower.cli import main\n"
    "try:\n    main()\n"
    f"finally:\n    print('loaded', *({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
)

SCAN = "scan {tiny} --out out --texts "
RUN = "run {tiny} --out out --texts {texts} --eval-texts "
EVAL = "eval {tiny} --texts "
HEAL = "heal {tiny} --out out --texts "
PATCH = "patch {tiny} --drop 1 --out out --texts "
EARLY = [
    (SCAN + "none.jsonl", "no text file none.jsonl"),
    (SCAN + "field.jsonl", "field.jsonl, line 1: no field `text`"),
    (SCAN + "empty.txt", "no texts"),
    (SCAN + "{texts} --metrics taxicab", "taxicab"),
    (SCAN + "{texts} --positions first", "last, last:K, random:K or all"),
    (SCAN + "{texts} --dtype float8", "float8"),
    (SCAN + "{texts} --batch-size 0", "--batch-size"),
    (SCAN + "{texts} --keep-states out/states.npy", ".safetensors"),
    (SCAN + "{texts} --out taken", "taken/scan.safetensors exists already"),
    (EVAL + "none.jsonl", "no text file none.jsonl"),
    (EVAL + "field.jsonl", "no field `text`"),
    (EVAL + "{texts} --dtype float8", "float8"),
    (RUN + "field.jsonl", "no field `text`"),
    (RUN + "{texts} --texts field.jsonl", "no field `text`"),
    (RUN + "{texts} --n 0", "cannot read '0'"),
    (RUN + "{texts} --n 1,junk", "cannot read '1,junk'"),
    (RUN + "{texts} --heal-steps 2", "--heal-steps without --heal"),
    (RUN + "{texts} --out taken", "taken/results.json exists already"),
    (RUN + "{texts} --out healed --heal", "healed/healed exists already"),
    (PATCH + "field.jsonl", "no field `text`"),
    (PATCH + "{texts} --out taken", "taken exists already"),
    (PATCH + "{texts} --eval-texts none.txt", "no text file none.txt"),
    (HEAL + "field.jsonl", "no field `text`"),
    (HEAL + "{texts} --out taken", "taken exists already"),
    (HEAL + "{texts} --eval-texts none.txt", "no text file none.txt"),
    (HEAL + "{texts} --dropout 2", "dropout"),
    ("merge taken --out healed", "healed exists already"),
    ("demo --n 0", "cannot read '0'"),
    ("demo --texts none.txt", "no text file none.txt"),
    ("demo --out taken", "taken/results.json exists already"),
    ("plan none --n 2", "no scan file none"),
    ("plan {scan} --n 2 --out taken", "taken/shallower_plan.json exists already"),
    ("analyse none.npy --out out", "no states file none.npy"),
    ("analyse none.npy --out out --metrics taxicab", "taxicab"),
    ("prune {tiny} --out out", "either by --drop or by --plan"),
    ("prune {tiny} --drop junk --out out", "cannot read 'junk'"),
    ("prune {tiny} --drop 1 --out taken", "taken exists already"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, models, texts, scans):
    folder = tmp_path_factory.mktemp("early")
    (folder / "field.jsonl").write_text(json.dumps({"body": "w1 w2"}) + "\n")
    (folder / "empty.txt").write_text("\n")
    for name in ("taken", "healed/healed"):
        (folder / name).mkdir(parents=True)
    (folder / "healed" / "healed" / "dear").write_text("to someone")
    for name in ("scan.safetensors", "results.json", "shallower_plan.json"):
        (folder / "taken" / name).write_text("dear to someone")
    names = {"tiny": models / "tiny", "texts": texts / "texts.jsonl", "scan": scans / "tiny"}
    return folder, names


@pytest.mark.parametrize(("command", "message"), EARLY, ids=[command for command, _ in EARLY])
def test_a_mistake_is_refused_before_anything_heavy_is_imported(place, command, message):
    folder, names = place
    arguments = shlex.split(command.format(**names))
    done = in_a_process(sys.executable, "-c", CODE, *arguments, cwd=folder)
    error, loaded = done.err.splitlines()
    assert done.status == 2
    assert error.startswith("error: ")
    assert message in error
    assert loaded == "loaded"
    assert not (folder / "out").exists()

"""The calls that leave a result, and what their records are found and changed by."""

import json
import shutil
from pathlib import Path

import pytest

import shallower as sh
from shallower.store import records
from shallower.values.provenance import hash_of
from tests.conftest import write_jsonl
from tests.cutting.mixtures import mixture
from tests.documents import documents
from tests.healing.cuts import documents as progressions
from tests.models.gguf_files import write_gguf

HEAL = (
    "heal cut --texts many.jsonl --eval-texts held_out.jsonl --dtype float32 --max-length 16 "
    "--batch-size 8 --steps 8 --rank 2 --learning-rate 0.01 --eval-every 4 --out made"
)
CALLS = {
    "prune": ("prune tiny --drop 2:4 --out made", "model tiny"),
    "prune by a plan": ("prune tiny --plan cut --out made", "model tiny"),
    "prune for states": ("prune tiny --for-states 1,3 --out made", "model tiny"),
    "prune into a GGUF file": ("prune small.gguf --drop 1 --out made.gguf", "model small.gguf"),
    "prune experts": (
        "prune mixture --drop-experts " + ";".join(f"{layer}:1,4" for layer in range(8))
        + " --out made",
        "model mixture",
    ),
    "patch": (
        "patch trained --texts counting.jsonl --drop 2:4 --eval-texts counted.jsonl --out made "
        "--dtype float32 --max-length 16",
        "model trained, texts counting.jsonl, eval_texts counted.jsonl",
    ),
    "heal": (HEAL, "model cut, texts many.jsonl, eval_texts held_out.jsonl"),
    "heal merged": (f"{HEAL} --merge", "model cut, texts many.jsonl, eval_texts held_out.jsonl"),
    "merge": ("merge adapters --out made", "adapters adapters, model cut"),
    "run": (
        "run trained --texts counting.jsonl --eval-texts counted.jsonl --n 1 --top 2 --no-speech "
        "--no-answers --max-length 16 --out made",
        "model trained, texts counting.jsonl, eval_texts counted.jsonl",
    ),
    "run of a GGUF file": (
        "run small.gguf --texts counting.jsonl --eval-texts counted.jsonl --n 1 --top 1 "
        "--no-patch --no-speech --max-length 16 --out made",
        "model small.gguf, texts counting.jsonl, eval_texts counted.jsonl",
    ),
}  # fmt: skip
"""Commands that leave a result, and what ``reproduce`` is told of where things lie."""

QUICK = {"prune", "prune by a plan", "prune for states", "prune into a GGUF file", "patch", "merge"}


def words_of(told):
    """``model tiny`` as an option."""
    pairs = [one.split() for one in told.split(", ")]
    return [f"--{name.replace('_', '-')}={place}" for name, place in pairs]


def result_of(call):
    return call.split("--out ")[1].split()[0]


def record_in(result):
    path = records.record_path(Path(result))
    return path, json.loads(path.read_text())


def edited(result, edit):
    """Forge the record of a result: another value, and the hash of all that fits it."""
    path, record = record_in(result)
    edit(record)
    path.write_text(sealed(record))


def sealed(record):
    """The text of a record with a hash that fits it."""
    fields = {name: value for name, value in record.items() if name != "digest"}
    return json.dumps({**fields, "digest": hash_of(fields)}, indent=2) + "\n"


def hashed(result):
    """Forge a record once more: the hashes are those of the files as they are."""
    record = records.Record.load(record_in(result)[0])
    files = records.files_of(Path(result), records.Store(None))
    texts = {name: records.text_of(record, records.file_in(Path(result), name)) for name in files}
    said = {name: hash_of(text) for name, text in texts.items() if text}
    edited(result, lambda record: record.update(files=files, said=said))


@pytest.fixture(scope="module")
def given(tmp_path_factory, models, texts, trained, words):
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(models / "tiny", folder / "tiny")
    trained.save_pretrained(folder / "trained")
    words.save_pretrained(folder / "trained")
    mixture("mixtral").save_pretrained(folder / "mixture")
    write_gguf(folder / "small.gguf")
    write_jsonl(folder / "many.jsonl", documents(120, seed=2))
    shutil.copy(texts / "held_out.jsonl", folder)
    write_jsonl(folder / "counting.jsonl", progressions(160, 5))
    write_jsonl(folder / "counted.jsonl", progressions(12, 1))
    sh.prune(folder / "tiny", [range(2, 4)], folder / "cut")
    recipe = sh.Recipe(
        steps=1, rank=2, learning_rate=0.01, max_length=16, batch_size=8, dtype="float32"
    )
    sh.heal(folder / "cut", documents(120, seed=2), folder / "adapters", recipe=recipe)
    return folder


@pytest.fixture
def place(given, folder):
    """A copy of it, where commands run."""
    shutil.copytree(given, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def made(shallower, place):
    """Makes a result by the name of its call; gives its place and what reproduces it."""

    def make_one(name):
        call, told = CALLS[name]
        done = shallower(*call.split())
        assert done.status == 0, done.err
        return result_of(call), words_of(told)

    return make_one

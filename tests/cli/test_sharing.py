"""What all works do alike that are shared: by hand, by workers and refused, by one table."""

import json
from dataclasses import dataclass

import pytest

from shallower.scanning import shards
from shallower.sharing.shards import MadeShard
from tests.conftest import write_jsonl
from tests.documents import documents

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("default:.*samples rejected"),
]


@dataclass
class Kind:
    """A command that is shared, what its shard 1/4 says, and an option of another work."""

    options: str
    says: str
    other: str


SMALL = "--texts many.jsonl --max-length 16 "
KINDS = {
    "scan": Kind(
        SMALL + "--batch-size 1", "batches [20, 40) of 80, 20 samples", "--metrics angular"
    ),
    "eval": Kind(
        SMALL + "--batch-size 3",
        "loss, batches [7, 14) of 28, 20 texts",
        "--max-texts 70",
    ),
    "compare": Kind(
        SMALL + "--eval-texts held.jsonl --n 1 --criteria deepest", "1 of 2 parts", "--seed 1"
    ),
    "curve": Kind(
        SMALL + "--eval-texts held.jsonl --n 1 --criteria deepest --states cut",
        "1 of 2 parts",
        "--seed 1",
    ),
}


@pytest.fixture
def asked(folder, tiny):
    """Give the words of a command, on texts in the folder."""
    write_jsonl(folder / "many.jsonl", documents(80))
    write_jsonl(folder / "held.jsonl", documents(8, seed=1))
    return lambda kind: [kind, tiny, *KINDS[kind].options.split(), "--out", "out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_there_is_not_made_again(shallower, folder, asked, kind, monkeypatch):
    of, command = KINDS[kind], [*asked(kind), "--shard", "auto"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    first = shallower(*command)
    assert f"shard 1/4: {of.says}" in first.out, first.err
    (place,) = (folder / "out").iterdir()
    assert place.name.startswith(f"{kind}.1-of-4.")
    before = place.stat().st_mtime_ns
    monkeypatch.setattr("shallower.models.source.ModelSource.load", lambda *_, **__: 1 / 0)
    again = shallower(*command)
    assert again.out == first.out
    assert f"out/{place.name} is already there" in again.err
    if kind in ("scan", "eval"):
        dry = shallower(*command, "--dry-run", "--json").json
        assert (dry["shard"], dry["write"]) == ("1/4", [f"out/{place.name}"])
    assert place.stat().st_mtime_ns == before
    assert f"{place.name} exists already" in shallower(*command, *of.other.split()).error


def test_a_shard_that_was_killed_is_gone_on_with(shallower, folder, asked, monkeypatch):
    command, shard = asked("scan"), ["--shard", "1/2"]
    assert shallower(*command[:-1], "whole", *shard).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SECONDS_BETWEEN_CHECKPOINTS", -1)
        written, write = [], shards.write_file

        def killed(*content):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(write(*content))

        patch.setattr(shards, "write_file", killed)
        assert shallower(*command, *shard).status == 130
    assert not list((folder / "out").glob("scan.*"))
    (begun,) = (folder / "out").rglob("begun")
    content = begun.read_bytes()
    begun.write_bytes(b"damaged")
    assert "delete it to start anew" in shallower(*command, *shard).error
    begun.write_bytes(content)
    done = shallower(*command, *shard)
    assert "of 40 batches were scanned" in done.err
    (place,) = (folder / "out").iterdir()
    values = [MadeShard.load(folder / name / place.name).values for name in ("out", "whole")]
    assert values[0] == values[1]


def test_a_shard_by_hand_is_of_what_the_command_has_read(shallower, folder, tiny, monkeypatch):
    (folder / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(300)))
    monkeypatch.setattr(
        "shallower.sharing.eval_work.measures_of", lambda *_, **__: 1 / 0
    )  # as of a pipe
    options = ["--perplexity", folder / "text.txt", "--context", 16, "--shard", "0/1"]
    assert shallower("eval", tiny, *options, "--out", "out").status == 0


def test_a_shard_names_the_model_as_the_scan_does(shallower, folder, asked, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    of = [*SMALL.replace("many", f"{folder}/many").split(), "--out"]
    assert shallower("scan", ".", *of, folder / "out", "--shard", "0/1").status == 0
    assert shallower("gather", folder / "out", "--out", folder / "gathered").status == 0
    assert shallower("scan", ".", *of, folder / "whole").status == 0
    names = (folder / name / "scan.safetensors" for name in ("gathered", "whole"))
    gathered, whole = (name.read_bytes() for name in names)
    assert gathered == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--shard 9/8", "there is no shard 9/8"),
        ("--shard one", "expected I/N, as 3/64, or auto"),
        ("--shard 1/8 --workers 2", "a shard is made by one process"),
        ("--on local", "how many processes are to share the "),
    ],
)
def test_what_cannot_be_shared_is_refused(shallower, folder, asked, kind, options, said):
    assert said in shallower(*asked(kind), *options.split()).error
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("scan --shard 1/8 --until 0.99 --out out", "--until is for a scan of one process"),
        ("eval --shard 1/8", "a shard is a file: name the folder to write it to (--out)"),
        ("eval --tasks boolq --shard 1/8 --out out", "--tasks is measured by one"),
        ("eval --tasks boolq --workers 2", "by naming one task a command"),
        ("eval --against other --workers 2", "finds both in the cache"),
        ("compare --shard 0/2 --out out --no-cache", "leave out --no-cache"),
        ("curve --workers 2 --no-cache --out out", "leave out --no-cache"),
        ("curve --shard 9/2 --dry-run --out out", "there is no shard 9/2"),
        ("curve --shard 0/2 --states cut,healed --heal-steps 1 --out out", "a shard heals no cut"),
    ],
)
def test_what_a_kind_cannot_share_is_refused(shallower, folder, asked, command, said):
    kind, *options = command.split()
    *shared, _, _ = asked(kind)
    assert said in shallower(*shared, *options).error
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scan", "eval"])
def test_texts_that_no_worker_can_do_are_named_and_the_others_are_kept(
    shallower, folder, asked, kind, monkeypatch
):
    command = [*asked(kind), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("shallower.sharing.share.OPENER", "tests.studies.poisoned:poisoned")
        done = shallower(*command)
    assert f"the {kind} is incomplete: 1 of its shards failed 3 times each" in done.error
    assert "shard 9/64 by ValueError: poison" in done.error
    (named,) = json.loads((folder / "out" / "incomplete.json").read_text())
    first, last = named["texts"] if kind == "scan" else named["texts"]["loss"]
    assert (named["shard"], len(named["errors"])) == ("9/64", 3)
    assert 0 <= first < last <= 80
    again = shallower(*command, "--json")
    assert "resuming: 63 of 64 shards are done" in again.err
    assert not [one for one in (folder / "out").iterdir() if "-of-64" in one.name]
    assert not (folder / "out" / "incomplete.json").exists()
    (result,) = (folder / "out").glob(f"{kind}.*")
    whole = shallower(*asked(kind)[:-1], "whole", "--no-cache")
    assert whole.status == 0, whole.err
    assert result.read_bytes() == (folder / "whole" / result.name).read_bytes()

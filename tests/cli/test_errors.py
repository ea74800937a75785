"""Dry runs, and errors in one sentence."""

import json
import re
import shlex

import pytest

from tests.cli.documents import tree
from tests.commands import SHALLOWER, in_a_process

# Dry runs.
DRY = [
    "scan {tiny} --texts {texts} --out out",
    "plan {scan} --n 2 --out out",
    "prune {tiny} --drop 1:3 --out out",
    "prune {tiny} --plan {plan} --out out",
    "run {tiny} --texts {texts} --eval-texts {texts} --out out --n 1",
]


@pytest.fixture
def places(models, texts, scans, plans):
    return {
        "models": models,
        "tiny": models / "tiny",
        "texts": texts / "texts.jsonl",
        "scan": scans / "tiny",
        "plan": plans / "tiny",
    }


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    shallower, folder, places, command
):
    command = shlex.split(command.format(**places))
    shown = shallower(*command, "--dry-run")
    assert shown.status == 0
    assert "would write" in shown.out
    assert shallower(*command, "--dry-run", "--json").json
    assert tree(folder) == {}


@pytest.mark.parametrize(
    "command",
    [
        "scan {tiny} --texts {texts} --out out --metrics taxicab",
        "scan none --texts {texts} --out out",
        "run {tiny} --texts {texts} --eval-texts {texts} --out out --n 99",
        "run none --texts {texts} --eval-texts {texts} --out out --n 1",
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse_at_once(shallower, places, command):
    assert shallower(*shlex.split(command.format(**places)), "--dry-run").error


# Errors.
@pytest.fixture
def errors(folder, places):
    """Files that are not what they should be, and where to find them."""
    bad = folder / "bad"
    bad.mkdir()
    (bad / "broken.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w3 w4\n')
    (bad / "field.jsonl").write_text('{"txt": "w1"}\n')
    (bad / "null.jsonl").write_text('{"text": "w1"}\n{"text": null}\n')
    (bad / "list.jsonl").write_text('["w1"]\n')
    (bad / "latin.txt").write_bytes(b"w1 w2\ncaf\xe9\n")
    (bad / "empty.txt").write_text("")
    (bad / "blank.txt").write_text("\n  \r\n\n")
    (bad / "empty_texts.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    (bad / "texts.csv").write_text("text\nw1\n")
    (bad / "corrupt.parquet").write_bytes(b"PAR1" + bytes(50))
    (bad / "no.gguf").write_text("this is no GGUF file")
    (bad / "empty.gguf").write_text("")
    (bad / "file").write_text("in the way")
    (bad / "full").mkdir()
    (bad / "full" / "something").write_text("dear to someone")
    (bad / "empty").mkdir()
    scan = (places["scan"] / "scan.safetensors").read_bytes()
    (bad / "truncated.safetensors").write_bytes(scan[: len(scan) // 2])
    plan = (places["plan"] / "shallower_plan.json").read_text()
    (bad / "plan.json").write_text(plan[: len(plan) // 2])
    (bad / "other.json").write_text(json.dumps({"format": "other", "version": 1}))
    for name in ("truncated", "config", "tokenizer", "typeless"):
        copied = bad / "models" / name
        copied.mkdir(parents=True)
        for file in places["tiny"].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
    weights = bad / "models" / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (bad / "models" / "config" / "config.json").write_text("{")
    (bad / "models" / "typeless" / "config.json").write_text("{}")
    (bad / "models" / "tokenizer" / "tokenizer.json").write_text("{}")
    return {**places, "bad": "bad"}


SCAN = "scan {tiny} --out out --texts "
RUN = "run {tiny} --texts {texts} --out "
PRUNE = "prune {tiny} --out out "
ERRORS = [
    (SCAN + "none.jsonl", r"there is no text file none\.jsonl"),
    (SCAN + "{bad}/broken.jsonl", r"bad/broken\.jsonl, line 2: not JSON"),
    (SCAN + "{bad}/field.jsonl", r"bad/field\.jsonl, line 1: no field `text`"),
    (SCAN + "{bad}/null.jsonl", r"bad/null\.jsonl, line 2: no field `text`"),
    (SCAN + "{bad}/list.jsonl", r"bad/list\.jsonl, line 1: no field `text`"),
    (SCAN + "{bad}/latin.txt", r"bad/latin\.txt.*not UTF-8"),
    (SCAN + "{bad}/empty.txt", "no texts"),
    (SCAN + "{bad}/blank.txt", "no texts"),
    (SCAN + "{bad}/empty_texts.jsonl", "2 of 2 samples rejected"),
    (SCAN + "{bad}/texts.csv", r"bad/texts\.csv.*\.jsonl, \.txt, \.parquet"),
    (SCAN + "{bad}/corrupt.parquet", r"bad/corrupt\.parquet"),
    (SCAN + "{bad}", "cannot read texts from bad"),
    (SCAN + "allenai/c4", "allenai/c4.*id:split"),
    (SCAN + "{texts} --metrics taxicab", "taxicab.*angular, cosine"),
    (SCAN + "{texts} --metrics angular,angular", "once each.* got .*angular, angular"),
    (SCAN + "{texts} --device-map nowhere", "nowhere"),
    (SCAN + "{texts} --gguf-file none.gguf", r"no file none\.gguf"),
    ("scan ./none --texts {texts} --out out", "no model at .*none"),
    ("scan none --texts {texts} --out out", "none"),
    ("scan {models}/none/ --texts {texts} --out out", "no model at .*none"),
    ("scan {bad}/empty --texts {texts} --out out", r"bad/empty holds no config\.json"),
    ("scan {bad}/file --texts {texts} --out out", "bad/file is a file"),
    ("scan {bad}/no.gguf --texts {texts} --out out", r"bad/no\.gguf"),
    ("scan {bad}/empty.gguf --texts {texts} --out out", r"bad/empty\.gguf"),
    ("scan {bad}/models/truncated --texts {texts} --out out", "models/truncated"),
    ("scan {bad}/models/config --texts {texts} --out out", "models/config"),
    ("scan {bad}/models/typeless --texts {texts} --out out", "models/typeless"),
    ("scan {bad}/models/tokenizer --texts {texts} --out out", "models/tokenizer"),
    ("scan {tiny} --texts {texts} --out {bad}/file", "bad/file is not a folder"),
    ("scan {tiny} --texts {texts} --out {bad}/file/below", "bad/file is not a folder"),
    (SCAN + "{texts} --keep-states out/states.npy", r"ends in \.safetensors"),
    (SCAN + "{texts} --keep-states {bad}/file/below.safetensors", "bad/file is not a folder"),
    (SCAN + "{texts} --keep-states out/scan.safetensors", "the scan itself"),
    ("analyse {bad}/none.npy --out out", r"no states file bad/none\.npy"),
    ("analyse {bad}/file --out out", r"ends in \.npy or \.safetensors"),
    ("analyse {bad}/truncated.safetensors --out out", r"bad/truncated\.safetensors is truncated"),
    ("analyse {scan}/scan.safetensors --out out", "has no tensor hidden_states.*--tensor"),
    ("analyse {scan}/scan.safetensors --out out --dry-run", "has no tensor hidden_states"),
    ("analyse {scan}/scan.safetensors --out out --tensor sums", "expected one of BF16"),
    ("analyse {bad}/none.npy --out out --metrics taxicab", "taxicab.*angular, cosine"),
    ("plan {bad}/truncated.safetensors --n 2", r"bad/truncated\.safetensors is truncated"),
    ("plan {bad}/file --n 2", "bad/file"),
    ("plan {bad}/none --n 2", "no scan file bad/none"),
    ("plan {bad}/empty --n 2", r"no scan file bad/empty/scan\.safetensors"),
    ("plan {scan} --n 0", "n = 0 .*1 <= n <= 5"),
    ("plan {scan} --n -1", "n = -1 .*1 <= n <= 5"),
    ("plan {scan} --n 6", "n = 6 .*1 <= n <= 5"),
    ("plan {scan} --n 99", "n = 99 .*1 <= n <= 5"),
    ("plan {scan} --n 99 --strategy deepest", "n = 99 .*1 <= n <= 5"),
    ("plan {scan} --n 2 --metric taxicab", "taxicab"),
    ("plan {scan} --n 2 --out {bad}/file", "bad/file is not a folder"),
    (PRUNE + "--drop junk", "cannot read 'junk'.*3,12:20"),
    (PRUNE + "--drop 4:2", r"\[4, 2\)"),
    (PRUNE + "--drop 6", "no layer 6: its 6 layers are 0 .. 5"),
    (PRUNE + "--drop -1", "'-1'"),
    (PRUNE + "--drop 1,1", "layer 1 is named twice"),
    (PRUNE + "--drop 0:6", "at least one must stay"),
    (PRUNE + "--drop ''", "cannot read ''"),
    (PRUNE, "either by --drop or by --plan"),
    (PRUNE + "--drop 1 --plan {plan}", "either by --drop or by --plan"),
    (PRUNE + "--plan {bad}/plan.json", r"bad/plan\.json is not a plan"),
    (PRUNE + "--plan {bad}/other.json", r"bad/other\.json is not a plan"),
    (PRUNE + "--plan {bad}/none", "cannot read the plan bad/none"),
    (PRUNE + "--plan {bad}/empty", "cannot read the plan bad/empty"),
    (PRUNE + "--plan {scan}/scan.safetensors", "is not a plan"),
    ("prune ./none --drop 1 --out out", "no model at .*none"),
    ("prune {bad}/models/truncated --drop 1 --out out", "models/truncated"),
    ("prune {tiny} --drop 1 --out {bad}/full", "bad/full exists already"),
    ("prune {tiny} --drop 1 --out {bad}/file", "bad/file exists already"),
    ("prune {tiny} --drop 1 --out {bad}/file/below", "bad/file is not a folder"),
    ("prune {tiny} --drop 1 --out /proc/none/below", "/proc/none"),
    ("prune {tiny} --drop 1 --out . --overwrite", "cannot write"),
    ("eval {tiny} --texts {bad}/empty.txt", "no text"),
    ("eval {tiny} --texts {texts} --drop junk", "cannot read 'junk'"),
    ("eval {tiny} --texts {texts} --drop 6", "no layer 6"),
    ("eval {tiny} --texts {texts} --drop 1 --plan {plan}", "either by --drop or by --plan"),
    ("eval {tiny} --texts {texts} --plan {bad}/plan.json", "is not a plan"),
    (RUN + "out --n 0", "n = 0: expected at least 1"),
    (RUN + "out --n -1", "n = -1: expected at least 1"),
    (RUN + "out --n 99", "n = 99 .*1 <= n <= 5"),
    (RUN + "out --n 1,junk", "'--n': Input should be a valid integer"),
    (RUN + "{bad}/file --n 1", "bad/file is not a folder"),
    (RUN + "out --n 1 --texts {bad}/broken.jsonl", r"broken\.jsonl, line 2"),
    (RUN + "out --n 1 --texts {bad}/empty.txt", "no texts"),
    (RUN + "out --n 1 --eval-texts {bad}/broken.jsonl", r"broken\.jsonl, line 2"),
    (RUN + "out --n 1 --eval-texts {bad}/empty.txt", "no text"),
]


@pytest.mark.parametrize(("command", "message"), ERRORS, ids=[command for command, _ in ERRORS])
def test_an_error_is_one_sentence_and_nothing_is_written(
    shallower, folder, errors, command, message
):
    before = tree(folder)
    assert re.search(message, shallower(*shlex.split(command.format(**errors))).error)
    assert tree(folder) == before


MISTYPED = [
    (SCAN + "{texts} --dtype float8", "--dtype.*float8"),
    (SCAN + "{texts} --max-texts 0", "--max-texts"),
    (SCAN + "{texts} --max-texts many", "--max-texts"),
    (SCAN + "{texts} --batch-size 0", "--batch-size"),
    (SCAN + "{texts} --threads 0", "--threads"),
    (SCAN + "{texts} --max-text 3", "--max-text"),
    ("scan {tiny} --out out", "--texts"),
    ("plan {scan} --n two", "--n"),
    ("plan {scan} --n 2 --strategy best", "--strategy.*best"),
    ("demo --max-texts 0 --out out", "--max-texts"),
    ("prnue {tiny}", "prnue"),
]


@pytest.mark.parametrize(("command", "message"), MISTYPED, ids=[command for command, _ in MISTYPED])
def test_a_mistyped_option_is_one_sentence_and_nothing_is_written(
    shallower, folder, places, command, message
):
    done = shallower(*shlex.split(command.format(**places)))
    assert tree(folder) == {}
    assert re.search(message, done.error)


def test_a_hub_dataset_is_named_when_there_is_no_hub(folder, tiny):
    done = in_a_process(
        SHALLOWER, "scan", tiny, "--out", "out", "--texts", "no/such:train",
        cwd=folder, env={"HF_HOME": str(folder / "hub")},
    )  # fmt: skip
    assert done.error.startswith("cannot read no/such:train: ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_path_in_a_message_is_not_broken_over_lines(
    shallower, folder, tiny, jsonl, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    long = "/".join(["a folder with spaces in its name"] * 4)
    failed = shallower("scan", tiny, "--texts", f"{long}/none.txt", "--out", "out")
    assert f"error: there is no text file {long}/none.txt" in failed.err.splitlines()
    done = shallower("scan", tiny, "--texts", jsonl, "--out", long)
    assert f"wrote {long}/scan.safetensors" in done.out.splitlines()
    refused = shallower("scan", tiny, "--texts", jsonl, "--out", long, "--no-cache")
    assert f"{long}/scan.safetensors exists already" in refused.err


@pytest.mark.parametrize("name", ["[bold]a[/bold]", ":train:", "[/]", "ä 三"])
def test_a_name_in_a_message_is_as_it_was_given(shallower, name):
    assert shallower("plan", name, "--n", 1).error == f"there is no scan file {name}"

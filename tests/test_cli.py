"""The command line as a person and a script meet it."""

import json
import os
import pty
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import shallower as sh
from conftest import WORDS, tiny_llama, write_jsonl
from shallower import Plan, Scan, cli, figures
from shallower._core import tiers

COMMANDS = typer.main.get_command(cli.app).commands
HEAVY = {"torch", "transformers", "matplotlib", "datasets"}
SHALLOWER = str(Path(sys.executable).with_name("shallower"))


@dataclass
class Done:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        """Standard output, all of it, as strict JSON."""
        return json.loads(self.out, parse_constant=pytest.fail)

    @property
    def error(self):
        """The one sentence of a command that failed."""
        assert (self.status, self.out) == (2, "")
        assert "Traceback" not in self.err
        *_, last = self.err.splitlines()
        assert last.startswith("error: ")
        assert self.err.count("error: ") == 1
        return last.removeprefix("error: ")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shallower(folder, monkeypatch, capfd):
    """Run a command in this process, in ``folder``."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["shallower", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code, *capfd.readouterr())

    return call


def in_a_process(*command, **options):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "1000",
        **options.pop("env", {}),
    }
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def documents(count, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 20))) for _ in range(count)]


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


def tree(folder):
    """Everything below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# Help.


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def help_of(*command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    return plain(result.output)


def test_help_names_every_command():
    lines = help_of().splitlines()
    for name, command in COMMANDS.items():
        summary = command.help.split("\n\n")[0].replace("\n", " ")
        assert any(f" {name} " in line and summary in line for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_describes_every_option(name):
    shown = help_of(name)
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        lines = [line for line in shown.splitlines() if f" {parameter.opts[0]}" in line]
        assert any(parameter.help in line for line in lines), parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_of_its_options(name):
    (example,) = (line for line in help_of(name).splitlines() if "Example:" in line)
    program, command, *arguments = shlex.split(example.split("Example:")[1])
    assert (program, command) == ("shallower", name)
    options = {
        option: parameter for parameter in COMMANDS[name].params for option in parameter.opts
    }
    given = {argument for argument in arguments if argument.startswith("--")}
    assert given <= options.keys()
    assert {
        option for option, p in options.items() if p.required and option.startswith("-")
    } <= given


def test_without_a_command_the_help_is_shown(shallower):
    done = shallower()
    assert done.status == 2
    assert "Usage: " in done.out + done.err
    assert "Commands" in done.out + done.err


def test_the_version_is_that_of_the_package(shallower):
    done = shallower("--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


@pytest.mark.parametrize("command", [[SHALLOWER], [sys.executable, "-m", "shallower"]])
def test_the_installed_program_and_the_module_run(command):
    done = in_a_process(*command, "--version")
    assert (done.status, done.out, done.err) == (0, version("shallower") + "\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["scan", "--help"], ["plan", "{scan}", "--n", "2"]],
    ids=["help", "version", "help of a command", "plan"],
)
def test_what_needs_no_model_loads_nothing_heavy(arguments, scans):
    arguments = [argument.format(scan=scans / "tiny") for argument in arguments]
    code = (
        "import sys\nfrom shallower.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print('loaded', *({HEAVY!r} & set(sys.modules)))"
    )
    done = in_a_process(sys.executable, "-c", code, *arguments)
    assert done.status == 0
    assert done.out.splitlines()[-1] == "loaded"


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
        "num_layers": 6,
        "positions": "last",
        "num_samples": 24,
        "num_sequences": 24,
        "num_rejected": 0,
        "rejections": [],
        "blocks": [{"n": len(block), **block.to_json()} for block in blocks],
        "written": ["out/scan.safetensors", "out/heat_map.png"],
    }


def test_scan_compares_the_tokens_that_are_named(shallower, tiny, jsonl, folder):
    out = folder / "out" / "scan.safetensors"
    for name, described in [("random:2", "random:2, seed 7"), ("last:2", "last:2"), ("all", "all")]:
        command = ["scan", tiny, "--texts", jsonl, "--out", "out", "--positions", name]
        command += ["--seed", 7, "--overwrite"]
        said = shallower(*command, "--dry-run").out
        assert f"positions: {described}" in said
        done = shallower(*command, "--json").json
        scanned = Scan.load(out)
        assert done["positions"] == str(scanned.positions) == described
        assert done["num_samples"] == scanned.num_samples > 24 == done["num_sequences"]
        if name != "all":
            assert scanned.num_samples == 48
        title = f"{scanned.num_samples} tokens of 24 sequences; positions {described}"
        assert title in " ".join(shallower(*command).out.split())
        plan = shallower("plan", "out", "--n", 2, "--json").json
        assert plan["positions"] == asdict(scanned.positions)
    refused = shallower("scan", tiny, "--texts", jsonl, "--out", "new", "--positions", "first")
    assert refused.status != 0
    assert "last, last:K, random:K or all" in refused.err


def test_scan_of_one_sample_has_no_error_and_still_prints_json(shallower, tiny, jsonl):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--samples", 1, "--json")
    assert done.json["num_samples"] == 1
    assert {block["stderr"] for block in done.json["blocks"]} == {None}


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


def test_without_matplotlib_the_heat_map_is_left_out_with_a_warning(
    shallower, folder, tiny, jsonl, monkeypatch
):
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--json")
    assert done.status == 0
    assert done.json["written"] == ["out/scan.safetensors"]
    assert "pip install 'shallower[figures]'" in done.err
    assert [path.name for path in (folder / "out").iterdir()] == ["scan.safetensors"]


def test_scan_takes_the_metrics_that_are_named(shallower, tiny, jsonl, folder):
    for metrics in ("cosine,angular", "cosine, angular"):
        done = shallower(
            "scan", tiny, "--texts", jsonl, "--out", "out", "--metrics", metrics, "--overwrite"
        )
        assert done.status == 0, done.err
        assert set(Scan.load(folder / "out" / "scan.safetensors").metrics) == {"angular", "cosine"}


def test_scan_of_cosine_alone_says_so(shallower, tiny, jsonl):
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--metrics", "cosine")
    assert "1 - cosine" in done.out
    assert "wrote out/scan.safetensors" in done.out


def test_a_second_scan_needs_overwrite(shallower, folder, tiny, jsonl):
    assert shallower("scan", tiny, "--texts", jsonl, "--out", "out").status == 0
    before = tree(folder)
    refused = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--samples", 3)
    assert "out/scan.safetensors exists already" in refused.error
    assert tree(folder) == before
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "out", "--samples", 3, "--overwrite")
    assert done.status == 0
    assert Scan.load(folder / "out" / "scan.safetensors").num_samples == 3


CHILD = """
import sys
from shallower import cli, pipeline
pipeline.SECONDS_BETWEEN_CHECKPOINTS = 0
cli.main()
"""


def test_a_killed_scan_goes_on_where_it_was(shallower, folder, tiny):
    texts = documents(600)
    source = write_jsonl(folder / "many.jsonl", texts)
    command = ["scan", tiny, "--texts", source, "--out", "out", "--batch-size", 1]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = folder / "out" / "scan.partial.safetensors"
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert 0 < Scan.load(partial).num_samples < 600
    assert not (folder / "out" / "scan.safetensors").exists()

    assert shallower(*command).status == 0
    assert {path.name for path in (folder / "out").iterdir()} == {
        "scan.safetensors",
        "heat_map.png",
    }
    sh.scan(*sh.load_model(tiny), texts, batch_size=1).save(folder / "whole")
    assert (folder / "out" / "scan.safetensors").read_bytes() == (folder / "whole").read_bytes()


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


def test_json_is_alone_on_standard_output_while_a_terminal_shows_progress(folder, tiny, jsonl):
    master, slave = pty.openpty()
    command = [SHALLOWER, "scan", tiny, "--texts", jsonl, "--out", "out", "--json"]
    child = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 10_000)
        except OSError:
            break
    os.close(master)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert json.loads(out)["num_samples"] == 24
    assert "24/24" in plain(shown.decode())


def test_scan_keeps_samples_if_asked(shallower, folder, models, texts, scans):
    arguments = ("scan", models / "tiny", "--texts", texts / "texts.jsonl", "--dtype", "float32")
    assert shallower(*arguments, "--out", "kept", "--keep-samples").status == 0
    assert shallower(*arguments, "--out", "plain").status == 0
    kept, plain = (Scan.load(folder / name / "scan.safetensors") for name in ("kept", "plain"))
    assert (kept.keeps_samples, plain.keeps_samples) == (True, False)
    assert kept.samples("angular").shape == (24, 21)
    assert (kept.mean() == plain.mean()).all()


# States in files.


def test_scan_keeps_states_and_analyse_gives_the_same_scan(shallower, folder, tiny, jsonl):
    kept = folder / "kept" / "states.safetensors"
    done = shallower("scan", tiny, "--texts", jsonl, "--out", "one", "--keep-states", kept)
    assert done.status == 0
    assert f"wrote {kept}" in done.out
    done = shallower("analyse", kept, "--out", "two")
    assert done.status == 0
    assert "[" in done.out
    one, two = (folder / name / "scan.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert (folder / "two" / "heat_map.png").exists()
    assert shallower("plan", "two", "--n", 2, "--out", "plan").status == 0
    done = shallower("prune", tiny, "--plan", "plan", "--out", "cut")
    assert done.status == 0
    assert "exists already" in shallower("analyse", kept, "--out", "two").error
    shown = shallower(
        "analyse", kept, "--out", "two", "--overwrite", "--json", "--metrics", "relative_l2",
        "--keep-samples", "--cka-batch", 8,
    )  # fmt: skip
    assert shown.json["num_samples"] == 24
    again = Scan.load(two)
    assert (again.metrics, again.keeps_samples) == (("relative_l2",), True)
    assert again.cka.shape == (7, 7)


def test_a_dry_run_says_how_many_bytes_states_take(shallower, folder, tiny, jsonl):
    command = ["scan", tiny, "--texts", jsonl, "--out", "out", "--keep-states", "kept.safetensors"]
    said = shallower(*command, "--dry-run", "--json").json
    assert said["states_bytes_per_token"] == 7 * 32 * 2
    assert said["states_bytes_at_most"] == 7 * 32 * 2 * 24
    assert said["free_bytes"] > 0
    assert said["write"] == ["out/scan.safetensors", "kept.safetensors"]
    options = ["--dtype", "float32", "--positions", "all", "--max-length", 10]
    said = shallower(*command, *options, "--dry-run", "--json").json
    assert said["states_bytes_at_most"] == 7 * 32 * 4 * 24 * 10
    assert tree(folder) == {}
    assert shallower(*command, *options).status == 0
    said = shallower("analyse", "kept.safetensors", "--out", "two", "--dry-run", "--json").json
    assert (said["states"], said["width"]) == (7, 32)
    assert said["bytes"] == said["samples"] * 7 * 32 * 4 <= 7 * 32 * 4 * 24 * 10
    assert not (folder / "two").exists()


def test_a_second_scan_replaces_kept_states_only_when_told_so(shallower, folder, tiny, jsonl):
    (folder / "kept.safetensors").write_text("dear to someone")
    command = ["scan", tiny, "--texts", jsonl, "--out", "out", "--keep-states", "kept.safetensors"]
    before = tree(folder)
    assert "kept.safetensors exists already" in shallower(*command).error
    assert tree(folder) == before
    assert shallower(*command, "--overwrite").status == 0
    assert sh.analyse_states(folder / "kept.safetensors").num_samples == 24


# Planning.


def test_plan_shows_and_saves_the_best_block(shallower, folder, scans):
    done = shallower("plan", scans / "tiny", "--n", 2, "--out", "out")
    assert done.status == 0
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    assert plan == Scan.load(scans / "tiny" / "scan.safetensors").plan(2)
    assert "plan: 2 of 6 layers" in done.out
    assert str(plan.blocks[0]) in done.out
    assert f"angular {plan.blocks[0].score:.4f}" in done.out
    assert "wrote out/shallower_plan.json" in done.out.splitlines()


def test_plan_without_out_writes_nothing(shallower, folder, scans):
    file = scans / "tiny" / "scan.safetensors"
    done = shallower("plan", file, "--n", 3, "--json")
    assert done.json == Scan.load(file).plan(3).to_json()
    assert tree(folder) == {}


def test_plan_prints_the_json_that_it_saves(shallower, folder, scans):
    done = shallower("plan", scans / "tiny", "--n", 1, "--out", "out", "--json")
    assert done.json == json.loads((folder / "out" / "shallower_plan.json").read_text())


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
    assert done.json == scanned.best_plan(3, 2, 1, 1).to_json()
    assert shallower("plan", scans / "tiny", "--n", 3, *options).out.count("drop") == len(
        scanned.best_plan(3, 2, 1, 1).blocks
    )


@pytest.mark.parametrize("metric", ["angular", "cosine"])
def test_plan_lists_the_best_blocks(shallower, scans, metric):
    arguments = ("plan", scans / "tiny", "--n", 2, "--metric", metric, "--top", 3)
    best = Scan.load(scans / "tiny" / "scan.safetensors").best_blocks(2, 3, metric)
    assert shallower(*arguments, "--json").json["top"] == [block.to_json() for block in best]
    shown = " ".join(shallower(*arguments).out.split())
    for block in best:
        assert f"{block} │ {block.score:.4f} ± {block.stderr:.4f}" in shown
    assert "probability" not in shown


def test_plan_says_how_sure_it_is(shallower, scans):
    scanned = Scan.load(scans / "kept" / "scan.safetensors")
    sure = scanned.bootstrap(200, 7)[2]
    arguments = ("plan", scans / "kept", "--n", 2, "--bootstrap", 200, "--seed", 7)
    assert shallower(*arguments, "--json").json["bootstrap"] == {
        "num_resamples": 200,
        "seed": 7,
        "probability": sure.probability,
        "distribution": sure.distribution.tolist(),
    }
    done = shallower(*arguments, "--top", 5)
    block = scanned.best_block(2)
    said = f"{block} is the best block with probability {sure.probability:.3f} (200 resamples)"
    assert said in done.out
    for share in sure.distribution:
        assert f"{share:.3f} │" in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bootstrap", 10), "--keep-samples"),
        (("--bootstrap", 10, "--max-blocks", 2), "leave out --max-blocks"),
        (("--bootstrap", 10, "--protect-last", 1), "leave out --max-blocks"),
        (("--strategy", "deepest", "--top", 2), "leave out"),
        (("--strategy", "deepest", "--protect-first", 2), "leave out"),
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


def test_plan_does_not_count_the_same_texts_twice(shallower, scans):
    assert shallower("plan", scans / "tiny", scans / "tiny", "--n", 2).error


def test_plan_does_not_merge_scans_of_different_models(shallower, scans):
    for other in ("twin", "deeper"):
        message = shallower("plan", scans / "tiny", scans / other, "--n", 2).error
        assert "different models" in message
        assert other in message
        assert "ModelIdentity(" not in message


# Pruning.


def assert_cut(path, model, survivors):
    """``path`` holds the layers ``survivors`` of the checkpoint ``model``, bit for bit."""
    cut, whole = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.bfloat16) for each in (path, model)
    )
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(survivors)
    for layer, index in zip(cut.model.layers, survivors, strict=True):
        original = whole.model.layers[index].state_dict()
        assert all(torch.equal(layer.state_dict()[name], original[name]) for name in original)
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer("w1 w2")["input_ids"] == [1, 2]


def test_prune_drops_the_layers_that_are_named(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "0,3:5", "--out", "cut")
    assert done.status == 0
    assert_cut(folder / "cut", tiny, [1, 2, 5])
    plan = Plan.load(folder / "cut" / "shallower_plan.json")
    assert (plan.dropped, plan.strategy, plan.model.name) == ((0, 3, 4), "manual", "tiny")
    assert "plan: 3 of 6 layers" in done.out
    assert "[1, 3) [5, 6)" in done.out
    assert "wrote cut" in done.out.splitlines()


@pytest.mark.parametrize("name", ["", "shallower_plan.json"])
def test_prune_carries_out_a_plan(shallower, folder, tiny, plans, name):
    plan = Plan.load(plans / "tiny" / "shallower_plan.json")
    done = shallower("prune", tiny, "--plan", plans / "tiny" / name, "--out", "cut", "--json")
    assert done.json == {**plan.to_json(), "max_logits_difference": None, "written": "cut"}
    assert_cut(folder / "cut", tiny, plan.survivors)
    assert Plan.load(folder / "cut" / "shallower_plan.json") == plan


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_prune_verifies(shallower, tiny, dtype, most):
    command = ["prune", tiny, "--drop", "1:3", "--verify", "--dtype", dtype]
    assert 0 <= shallower(*command, "--out", "a", "--json").json["max_logits_difference"] <= most
    assert "logits differ by at most" in shallower(*command, "--out", "b").out


@pytest.fixture
def never_loaded(monkeypatch):
    """Loading a model is an error."""
    monkeypatch.setattr(cli.prune, "load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("options", [[], ["--dtype", "float32"]])
def test_prune_cuts_a_folder_without_loading_it(shallower, folder, tiny, never_loaded, options):
    done = shallower(
        "prune", tiny, "--drop", "0,3:5", "--out", "cut", "--max-shard-size", "30KB", *options
    )
    assert done.status == 0
    assert_cut(folder / "cut", tiny, [1, 2, 5])
    assert len(list((folder / "cut").glob("*.safetensors"))) > 1
    stored = json.loads((folder / "cut" / "config.json").read_text())
    assert (stored["num_hidden_layers"], stored["dtype"]) == (3, "float32")


def test_prune_says_how_much_it_would_write(shallower, folder, tiny, never_loaded):
    done = shallower("prune", tiny, "--drop", "1", "--out", "cut", "--dry-run", "--json").json
    assert tree(folder) == {}
    shallower("prune", tiny, "--drop", "1", "--out", "cut")
    assert done["bytes"] == (folder / "cut" / "model.safetensors").stat().st_size
    refused = shallower(
        "prune", tiny, "--drop", "1", "--out", "c", "--max-shard-size", "x", "--dry-run"
    )
    assert "'x' is no size of a shard" in refused.error


def test_prune_refuses_a_shard_size_that_it_cannot_keep(shallower, folder, tiny, never_loaded):
    command = ["prune", tiny, "--drop", "1", "--out", "cut", "--max-shard-size", "1GB"]
    assert "--max-shard-size goes with" in shallower(*command, "--dtype", "float16").error
    assert tree(folder) == {}


def test_prune_verifies_a_cut_on_disk(shallower, tiny):
    command = ["prune", tiny, "--drop", "1:3", "--verify", "--json", "--out", "cut"]
    assert shallower(*command).json["max_logits_difference"] == 0


@pytest.mark.parametrize(
    ("command", "plan"),
    [
        ("prune --out cut", "twin"),
        ("prune --out cut", "deeper"),
        ("prune --out cut --dry-run", "deeper"),
        ("eval --texts {texts}", "twin"),
        ("eval --texts {texts}", "deeper"),
    ],
)
def test_a_plan_of_another_model_is_refused(shallower, folder, tiny, plans, jsonl, command, plan):
    name, *options = command.format(texts=jsonl).split()
    message = shallower(name, tiny, "--plan", plans / plan, *options).error
    assert "plan" in message
    assert "tiny" in message
    assert tree(folder) == {}


def test_a_refusal_names_the_option_that_replaces(shallower, tiny, plans):
    assert "--overwrite" in shallower("prune", tiny, "--drop", "1", "--out", plans).error


def test_prune_replaces_only_when_told_so(shallower, folder, tiny):
    assert shallower("prune", tiny, "--drop", "1", "--out", "cut").status == 0
    before = tree(folder)
    refused = shallower("prune", tiny, "--drop", "1:4", "--out", "cut")
    assert "cut exists already" in refused.error
    assert tree(folder) == before
    assert shallower("prune", tiny, "--drop", "1:4", "--out", "cut", "--overwrite").status == 0
    assert_cut(folder / "cut", tiny, [0, 4, 5])
    assert [path.name for path in folder.iterdir()] == ["cut"]


def test_prune_replaces_a_file_when_told_so(shallower, folder, tiny):
    (folder / "cut").write_text("a file")
    assert shallower("prune", tiny, "--drop", "1", "--out", "cut", "--overwrite").status == 0
    assert_cut(folder / "cut", tiny, [0, 2, 3, 4, 5])
    assert [path.name for path in folder.iterdir()] == ["cut"]


def test_prune_does_not_replace_the_folder_that_one_is_in(shallower, folder, tiny):
    done = shallower("prune", tiny, "--drop", "1", "--out", ".", "--overwrite")
    assert "it is the current folder" in done.error
    assert tree(folder) == {}


# Evaluating.


def test_eval_measures_before_and_after_a_cut(shallower, folder, tiny, texts):
    held_out = documents(8, seed=1)
    model, tokenizer = sh.load_model(tiny)
    whole = sh.evaluate_loss(model, tokenizer, held_out)
    with sh.without_layers(model, [1, 3, 4]):
        cut = sh.evaluate_loss(model, tokenizer, held_out)
    command = ["eval", tiny, "--texts", texts / "held_out.jsonl"]
    assert shallower(*command, "--json").json == {"base": whole.to_json()}
    assert shallower(*command, "--drop", "1,3:5", "--json").json == {
        "base": whole.to_json(),
        "cut": cut.to_json(),
        "drop": [sh.Block(1, 2).to_json(), sh.Block(3, 5).to_json()],
    }
    shown = shallower(*command, "--drop", "1,3:5").out.splitlines()
    assert shown[0].startswith(f"all layers: {whole} nats a token ({whole.normalized:.4f} of ln")
    assert shown[1].startswith(f"without [1, 2) [3, 5): {cut} nats a token")
    assert f"{whole.num_tokens} tokens of 8 texts" in shown[0]
    assert tree(folder) == {}


def test_eval_carries_out_a_plan_and_counts_the_rejected(shallower, folder, tiny, plans):
    source = write_jsonl(folder / "gap.jsonl", ["w1 w2 w3", "w1", "w4 w5"])
    done = shallower("eval", tiny, "--texts", source, "--plan", plans / "tiny", "--json")
    (name,) = done.json.keys() - {"base", "drop"}
    assert name == "cut"
    block = Plan.load(plans / "tiny" / "shallower_plan.json").blocks[0]
    assert done.json["drop"] == [sh.Block(block.start, block.stop).to_json() | block.to_json()]
    assert done.json["base"]["num_rejected"] == 1
    assert "1 texts rejected" in shallower("eval", tiny, "--texts", source).out


# The whole way.


def test_run_leaves_everything_and_says_so(shallower, folder, tiny, texts):
    command = ["run", tiny, "--texts", texts / "texts.jsonl"]
    command += ["--eval-texts", texts / "held_out.jsonl", "--out", "out", "--n", "2,1"]
    done = shallower(*command)
    assert done.status == 0
    assert {path.name for path in (folder / "out").iterdir()} == {
        "scan.safetensors",
        "heat_map.png",
        "shallower_plan.json",
        "results.json",
        "checkpoint",
    }
    for part in (
        "6 layers, 24 samples",
        "held-out loss",
        "plan: 2 of 6 layers",
        "before: ",
        "wrote",
    ):
        assert part in done.out
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    assert_cut(folder / "out" / "checkpoint", tiny, plan.survivors)
    results = json.loads((folder / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results.keys() == {
        "format",
        "version",
        "num_layers",
        "num_samples",
        "num_rejected",
        "base",
        "cuts",
        "plan",
        "max_logits_difference",
        "continuation",
    }
    sizes = [cut["drop"]["stop"] - cut["drop"]["start"] for cut in results["cuts"]]
    assert sizes == [1, 1, 2, 2]
    assert results["plan"] == plan.to_json()
    assert results["base"]["num_texts"] == 8
    assert results["num_samples"] == 24

    before = tree(folder)
    refused = shallower(*command)
    assert "exists already" in refused.error
    assert tree(folder) == before

    again = shallower(*command[:-1], "3", "--overwrite", "--json")
    assert again.status == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert again.json == {**results, "out": "out"}
    plan = Plan.load(folder / "out" / "shallower_plan.json")
    assert len(plan.dropped) == 3
    assert_cut(folder / "out" / "checkpoint", tiny, plan.survivors)


def test_steps_of_healing_need_a_healing(shallower, folder, tiny, texts):
    done = shallower(
        "run", tiny, "--texts", texts / "texts.jsonl", "--eval-texts", texts / "held_out.jsonl",
        "--out", "out", "--heal-steps", "2",
    )  # fmt: skip
    assert "--heal-steps without --heal" in done.error
    assert not (folder / "out").exists()


def test_run_says_nothing_on_standard_error_when_no_one_looks(folder, tiny, texts):
    done = in_a_process(
        SHALLOWER, "run", tiny, "--texts", texts / "texts.jsonl",
        "--eval-texts", texts / "held_out.jsonl", "--out", "out", "--n", "1", "--json",
        cwd=folder,
    )  # fmt: skip
    assert done.status == 0
    assert done.json["num_samples"] == 24
    assert done.err == ""


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
RUN = "run {tiny} --texts {texts} --eval-texts {texts} --out "
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
    ("analyse {scan}/scan.safetensors --out out --tensor angular", "expected one of BF16"),
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
    (RUN + "out --n 0", "cannot read '0'"),
    (RUN + "out --n -1", "cannot read '-1'"),
    (RUN + "out --n 99", "n = 99 .*1 <= n <= 5"),
    (RUN + "out --n 1,junk", "cannot read '1,junk'"),
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
    (SCAN + "{texts} --samples 0", "--samples"),
    (SCAN + "{texts} --samples many", "--samples"),
    (SCAN + "{texts} --batch-size 0", "--batch-size"),
    (SCAN + "{texts} --threads 0", "--threads"),
    (SCAN + "{texts} --sample 3", "--sample"),
    ("scan {tiny} --out out", "--texts"),
    ("plan {scan} --n two", "--n"),
    ("plan {scan} --n 2 --strategy best", "--strategy.*best"),
    ("demo --samples 0 --out out", "--samples"),
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
    refused = shallower("scan", tiny, "--texts", jsonl, "--out", long)
    assert f"{long}/scan.safetensors exists already" in refused.err


@pytest.mark.parametrize("name", ["[bold]a[/bold]", ":train:", "[/]", "ä 三"])
def test_a_name_in_a_message_is_as_it_was_given(shallower, name):
    assert shallower("plan", name, "--n", 1).error == f"there is no scan file {name}"


# Info.


def test_info_names_the_tiers_and_the_one_in_use(shallower):
    info = shallower("info", "--json").json
    assert info["tiers"]["scalar"] is True
    assert info["tiers"][info["tier"]] is True
    assert info["packages"]["shallower"] == sh.__version__
    assert f"tier {info['tier']} of scalar" in shallower("info").out


@pytest.mark.parametrize("name", [name for name, there in tiers() if there])
def test_a_tier_can_be_forced(name):
    forced = {**os.environ, "SHALLOWER_TIER": name}
    done = subprocess.run(
        [SHALLOWER, "info", "--json"], env=forced, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["tier"] == name


def test_a_tier_that_is_not_there_is_refused():
    forced = {**os.environ, "SHALLOWER_TIER": "steam"}
    done = subprocess.run(
        [SHALLOWER, "info"], env=forced, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "steam" in done.stderr
    assert "scalar" in done.stderr
    assert "Traceback" not in done.stderr

"""Outputs: never what is read, by whatever name; one process at a time; refused before any work."""

import itertools
import os
import re
import shutil
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import shallower as sh
from shallower.healing import checks
from shallower.models import loading
from shallower.models.source import ModelSource
from shallower.patching import saving as shallower_patch
from shallower.processes import held
from shallower.texts.sources import Texts
from tests.conftest import mostly_slow, write_jsonl
from tests.cutting.gguf_files import write
from tests.folders import tree
from tests.healing.cuts import QUICK, documents

PLACES = {
    "the same": "all/{}",
    "a link to it": "to/{}",
    "a roundabout way": "all/../all/{}",
    "in it": "all/{}/new",
    "around it": "all",
}
"""Ways to name an output by the name of what is read."""

ON_TEXTS = "--texts all/texts.jsonl --eval-texts all/held.jsonl"
COMMANDS = {
    "scan all/model --texts all/texts.jsonl": ["model", "texts.jsonl"],
    "analyse all/states.npy": ["states.npy"],
    "plan all/scans/scan.safetensors --n 2": ["scans/scan.safetensors"],
    f"run all/model {ON_TEXTS} --n 2": ["model", "texts.jsonl", "held.jsonl"],
    f"curve all/model {ON_TEXTS} --n 2": ["model", "texts.jsonl", "held.jsonl"],
    f"compare all/model all/cut {ON_TEXTS} --n 2": ["model", "cut", "texts.jsonl"],
    "prune all/model --drop 1": ["model"],
    "prune all/model --dtype float16 --drop 1": ["model"],
    "prune all/model --plan all/plans": ["plans"],
    "prune all/small.gguf --drop 1": ["small.gguf"],
    "prune all/small.gguf --drop 1 --as-gguf": ["small.gguf"],
    f"patch all/model --drop 1 {ON_TEXTS}": ["model", "texts.jsonl", "held.jsonl"],
    "patch all/model --plan all/plans --texts all/texts.jsonl": ["plans"],
    f"heal all/cut --original all/model {ON_TEXTS}": ["cut", "model", "texts.jsonl", "held.jsonl"],
    "merge all/adapters": ["adapters"],
    "merge all/adapters --model all/cut": ["cut"],
}
"""Commands without their ``--out``, and what each reads."""

RESULTS = {
    "scan": "scan.safetensors",
    "analyse": "scan.safetensors",
    "run": "results.json",
    "curve": "comparison.json",
    "compare": "comparison.json",
    "eval": "eval.json",
}
"""The file of commands that write into a folder, by which it is held."""

IN_PARTS = ("scan", "analyse", "plan", "eval", "run", "curve", "compare")
"""Commands that write single files into a folder, where others may lie."""


@pytest.fixture(scope="module")
def made(tmp_path_factory, models, scans, plans, words):
    """All that commands read, in one folder, and links to it in another."""
    root = tmp_path_factory.mktemp("apart")
    folder = root / "all"
    shutil.copytree(models / "tiny", folder / "model")
    shutil.copytree(scans / "tiny", folder / "scans")
    shutil.copytree(plans / "tiny", folder / "plans")
    write_jsonl(folder / "texts.jsonl", documents(60, 0))
    write_jsonl(folder / "held.jsonl", documents(8, 1))
    np.save(folder / "states.npy", np.zeros((4, 7, 8), dtype=np.float32))
    write(folder / "small.gguf", num_layers=4)
    sh.prune(folder / "model", [2, 3], folder / "cut")
    sh.heal(folder / "cut", documents(120, 0), folder / "adapters", recipe=replace(QUICK, steps=1))
    (root / "to").symlink_to("all")
    fill_with_theirs(root, folder / "cut")
    return root


def fill_with_theirs(root, cut):
    """Folders that hold a thesis and a repository of git: alone, beside a cut, and in one."""
    theirs = root / "theirs"
    for name in ("mine", "checkpoint", "healed"):
        (theirs / name / ".git").mkdir(parents=True)
        (theirs / name / ".git" / "HEAD").write_text("ref: refs/heads/main")
        (theirs / name / "thesis.txt").write_text("three years")
    shutil.copytree(theirs / "mine", theirs / "cut")
    shutil.copytree(cut, theirs / "cut", dirs_exist_ok=True)
    shutil.copytree(theirs / "mine", theirs / "cut" / "inner")
    (root / "linked").symlink_to("theirs/cut")


@pytest.fixture(scope="module")
def loaded(made):
    """The model, as functions are given it that refuse."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made)
        return sh.load_model("all/model")


@pytest.fixture
def read(made, monkeypatch):
    """The folder to work in; what is in it is the same in the end."""
    monkeypatch.chdir(made)
    before = tree(made)
    yield made
    assert tree(made) == before


ROWS = [
    pytest.param(
        command,
        name,
        place,
        id=f"{command}: {place} {name}",
        marks=() if place == "the same" or name == names[0] else pytest.mark.slow,
    )
    for command, names in COMMANDS.items()
    for name in names
    for place in PLACES
    if not (place == "around it" and command.split()[0] in IN_PARTS)
    if not (place == "in it" and name == "plans")  # beside the file that is read
]


@pytest.mark.parametrize(("command", "name", "place"), ROWS)
def test_a_command_refuses_to_write_to_what_it_reads(read, shallower, command, name, place):
    os.chdir(read)
    out = PLACES[place].format(name)
    for option in ("--overwrite", "--dry-run")[: 2 if place == "the same" else 1]:
        done = shallower(*command.split(), "--out", out, option)
        assert done.status == 2
        assert f"cannot write {out}" in done.err, done.err
        assert "which is read: choose another place" in done.err


THEIRS = {
    "theirs/mine": ".git/, thesis.txt",
    "theirs/cut": ".git/, inner/, thesis.txt",
    "theirs/cut/inner": ".git/, thesis.txt",
    "all/../theirs/cut": ".git/, inner/, thesis.txt",
    "linked": ".git/, inner/, thesis.txt",
    "theirs": "checkpoint/, cut/, healed/ and 1 more",
}
"""Folders that hold what no command wrote, and what a refusal names of each."""

EACH_WAY = ("theirs/mine", "theirs")
"""Those by which dry runs, and commands without a cache, are tested, too."""

WHOLE = [
    *(one for one in COMMANDS if one.split()[0] in ("patch", "heal", "merge")),
    *(one for one in COMMANDS if one.startswith("prune all/model") or "--as-gguf" in one),
    f"heal all/cut {ON_TEXTS} --merge",
]
"""Commands that replace a folder as a whole."""

IN_THEIRS = [(command, place, place) for command in WHOLE for place in THEIRS]
IN_THEIRS += [
    (f"run all/model {ON_TEXTS} --n 2", "theirs", "theirs/checkpoint"),
    (f"run all/model {ON_TEXTS} --n 2 --heal", "theirs", "theirs/checkpoint"),
]


@pytest.mark.parametrize(
    ("command", "place", "named"),
    mostly_slow(
        IN_THEIRS, [one for one in IN_THEIRS if one[1] in EACH_WAY or one[0].startswith("prune")]
    ),
)
def test_a_folder_with_what_no_command_wrote_is_not_replaced(
    read, shallower, monkeypatch, command, place, named
):
    os.chdir(read)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("loaded"))
    foreign = THEIRS[place] if named == place else ".git/, thesis.txt"
    for options in ([], ["--dry-run"], ["--no-cache"])[: 3 if place in EACH_WAY else 1]:
        done = shallower(*command.split(), "--out", place, "--overwrite", *options)
        assert done.status == 2
        assert f"cannot replace {named}: no record says that shallower wrote {foreign} there; " in (
            done.error
        )
        assert "choose another place, or move them away" in done.error


def test_what_lies_beside_the_files_of_a_command_stays(made, shallower, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    texts, few = "--texts all/texts.jsonl", "--eval-texts all/held.jsonl --n 1 --max-texts 12"
    for shard in ("0/2", "1/2"):
        words = (*texts.split(), "--max-texts", 9, "--out", tmp_path / "shards", "--shard", shard)
        assert shallower("scan", "all/model", *words).status == 0
    states = np.random.default_rng(0).standard_normal((4, 7, 8), dtype=np.float32)
    np.save(tmp_path / "states.npy", states)
    shutil.copytree(made / "theirs" / "mine", tmp_path / "out")
    before = tree(tmp_path / "out")
    for command in (
        f"analyse {tmp_path / 'states.npy'} --no-cache",
        f"scan all/model {texts} --max-texts 9 --no-cache",
        f"gather {tmp_path / 'shards'}",
        "plan all/scans/scan.safetensors --n 2",
        f"eval all/model {texts} --max-texts 9 --no-cache",
        f"compare all/model {texts} {few} --criteria deepest --no-cache",
        f"curve all/model {texts} {few} --criteria deepest --states cut --no-cache",
    ):
        for _ in range(1 if command.startswith(("compare", "curve")) else 2):
            done = shallower(*command.split(), "--out", tmp_path / "out", "--overwrite")
            assert done.status == 0, done.err
        now = tree(tmp_path / "out")
        assert {name: now.get(name) for name in before} == before, command


def test_a_heat_map_of_somebody_is_not_replaced_unasked(made, shallower, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    np.save(tmp_path / "states.npy", np.ones((4, 7, 8), np.float32))
    texts = "--texts all/texts.jsonl --max-texts 9"
    for shard in ("0/2", "1/2"):
        words = (*texts.split(), "--out", tmp_path / "shards", "--shard", shard)
        assert shallower("scan", "all/model", *words).status == 0
    theirs = tmp_path / "out" / "heat_map.png"
    theirs.parent.mkdir()
    theirs.write_text("a photograph")
    for command in (
        f"analyse {tmp_path / 'states.npy'}",
        f"scan all/model {texts}",
        f"scan all/model {texts} --dry-run",
        f"scan all/model {texts} --no-cache --workers 2",
        f"gather {tmp_path / 'shards'}",
    ):
        done = shallower(*command.split(), "--out", theirs.parent)
        assert f"{theirs} exists already: choose another place" in done.error
        assert [one.name for one in theirs.parent.iterdir()] == ["heat_map.png"]
    assert theirs.read_text() == "a photograph"


@contextmanager
def written_elsewhere(place, *, inside):
    """Hold a place as another process would, which has locks of its own."""
    ends = threading.Event()

    def write(begun):
        with held(place, inside=inside):
            begun.set()
            ends.wait()

    begun = threading.Event()
    writer = threading.Thread(target=write, args=[begun])
    writer.start()
    assert begun.wait(9)
    yield
    ends.set()
    writer.join()


WRITING = {
    "it": ("", False),
    "in it": ("/{}", False),
    "into it": ("", True),
    "around": ("/..", True),
}
"""Where somebody writes, beside a place, and whether into a folder, file by file."""

LONG = [command for command in COMMANDS if not command.startswith("plan")]
LONG += ["eval all/model --texts all/texts.jsonl"]


@pytest.mark.parametrize(
    ("command", "where"),
    mostly_slow(
        every := list(itertools.product(LONG, WRITING)),
        [
            one
            for one in every
            if one[1] == "it" or one[0].startswith(("scan", "prune all/model --d"))
        ],
    ),
)
def test_a_place_that_another_process_writes_to_is_not_to_be_replaced(
    read, shallower, command, where
):
    os.chdir(read)
    out = Path("new.gguf" if "gguf --drop 1" in command and "as-gguf" not in command else "new")
    if out.suffix and where in ("in it", "into it"):
        return
    place, inside = WRITING[where]
    place = str(out) + place.format(RESULTS.get(command.split()[0], "eval.json"))
    with written_elsewhere(Path(os.path.normpath(place)), inside=inside):
        before = tree(Path())
        for options in (["--overwrite"], ["--dry-run"], [])[: 3 if where == "it" else 1]:
            done = shallower(*command.split(), "--out", out, *options)
            assert done.status == 2
            assert f"cannot write {out}" in done.err
            assert f"process {os.getpid()} (" in done.err
            assert re.search(
                rf"\) is writing (it|{read}(/new)?); wait for it, or choose another place", done.err
            )
            assert "--overwrite" not in done.error
        assert tree(Path()) == before
    assert not Path("new").exists()


ON_DISK = [one for one in COMMANDS if not one.startswith(("plan", "analyse"))]


@pytest.mark.parametrize("command", [*ON_DISK, "eval all/model --texts all/held.jsonl"])
def test_a_full_disk_is_found_before_the_work(read, shallower, monkeypatch, command):
    os.chdir(read)
    temporary = tempfile.gettempdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: SimpleNamespace(free=10 if str(at) != temporary else 1e9)
    )
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(shallower_patch, "patch", None)
    monkeypatch.setattr(checks, "device_room", None)  # nor is the memory of a healing planned
    out = "new.gguf" if "gguf --drop 1" in command and "as-gguf" not in command else "new"
    for options in ([], ["--dry-run"]):
        done = shallower(*command.split(), "--out", out, *options)
        assert done.status == 2
        assert f"cannot write {out}" in done.err
        assert " MB are needed, 0.0 MB are free there: make room, or choose" in done.err
    assert not (read / out).exists()


PATCHED = sh.Patch(sh.Plan(6, (sh.Block(1, 2),)), "feed_forward", 90, 10, 1.0, 3.0, 2.0)

FUNCTIONS = {
    "heal": ("cut", lambda out, _: sh.heal("all/cut", documents(9, 0), out, overwrite=True)),
    "merge": ("adapters", lambda out, _: sh.merge("all/adapters", out, overwrite=True)),
    "merge, into the cut": ("cut", lambda out, _: sh.merge("all/adapters", out, overwrite=True)),
    "save_model": ("model", lambda out, loaded: sh.save_model(*loaded, out, overwrite=True)),
    "save_patched": (
        "model",
        lambda out, loaded: sh.save_patched(*loaded, out, done=PATCHED, overwrite=True),
    ),
    "scan, checkpoint": (
        "texts.jsonl",
        lambda out, loaded: sh.scan(*loaded, Texts("all/texts.jsonl"), checkpoint=out),
    ),
}
"""Functions that no command calls, or whose command refuses first, and what each reads."""


@pytest.mark.parametrize("place", ["the same", "a link to it", "a roundabout way"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_refuses_to_write_to_what_it_reads(read, loaded, name, place):
    reads, call = FUNCTIONS[name]
    with pytest.raises(sh.OutputError, match="which is read: choose another place"):
        call(PLACES[place].format(reads), loaded)


@pytest.mark.parametrize("place", THEIRS)
@pytest.mark.parametrize("name", ["heal", "merge", "save_model", "save_patched"])
def test_a_function_replaces_nothing_that_none_wrote(read, loaded, name, place):
    words = f"cannot replace {place}: no record says that shallower wrote "
    with pytest.raises(sh.OutputError, match=words):
        FUNCTIONS[name][1](place, loaded)


def test_a_hub_id_and_texts_that_are_given_are_no_places(tmp_path):
    from shallower.storage import check_apart

    check_apart(tmp_path / "out", ["who/model", None, "x" * 5000, "allenai/c4:en:train"])

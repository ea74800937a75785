"""The cache behind every command: a second run finds what the first has measured."""

import re
import sys
from pathlib import Path

import pytest

import shallower as sh
from shallower.models import loading
from shallower.texts.sources import Texts
from tests.cli.results import given as given
from tests.commands import in_a_process
from tests.conftest import mostly_slow
from tests.folders import tree
from tests.scanning.state_files import keep

QUICK = (
    "--dtype float32 --max-length 16 --batch-size 8 --steps 2 --rank 2 --learning-rate 0.01 "
    "--eval-every 1"
)
COMMANDS = {
    "scan": "scan {tiny} --texts {texts} --out {out}",
    "scan samples": "scan {tiny} --texts {texts} --out {out} --keep-samples --positions last:2",
    "analyse": "analyse {states} --out {out} --cka-batch 8",
    "run": "run {tiny} --texts {texts} --eval-texts {held_out} --n 1 --top 2 --no-speech "
    "--out {out}",
    "patch": "patch {trained} --texts {counting} --drop 2:4 --eval-texts {counted} --out {out} "
    "--dtype float32 --max-length 16",
    "prune": "prune {tiny} --drop 2:4 --dtype bfloat16 --verify --out {out}",
    "heal": "heal {cut} --texts {many} --eval-texts {held_out} --max-eval-texts 40 --out {out} "
    + QUICK,
    "heal merged": "heal {cut} --texts {many} --out {out} --merge " + QUICK,
    "merge": "merge {adapters} --out {out}",
}
"""Commands that leave something."""


@pytest.fixture(scope="module")
def place(given, texts):
    """What the commands are given, by name."""
    states = given / "states.safetensors"
    keep(states, *sh.load_model(given / "tiny"), Texts(str(texts / "texts.jsonl")))
    files = {name: given / f"{name}.jsonl" for name in ("held_out", "many", "counting", "counted")}
    folders = {name: given / name for name in ("tiny", "trained", "cut", "adapters")}
    return {"texts": texts / "texts.jsonl", "states": states, **files, **folders}


@pytest.fixture
def no_model(monkeypatch):
    """Nothing is loaded, scanned or cut any more, once called."""

    def refuse():
        def refused(*_args, **_options):
            pytest.fail("a model was loaded")

        monkeypatch.setattr(loading, "load_model", refused)
        monkeypatch.setattr(loading, "read_config", refused)
        for module in ("shallower.scanning.analyse", "shallower.merging.merge"):
            if module in sys.modules:
                for name in ("analyse_states", "merge"):
                    monkeypatch.setattr(f"{module}.{name}", refused, raising=False)

    return refuse


def words(command, place, out="made"):
    return command.format(**place, out=out).split()


def said_once(text):
    (line,) = [line for line in text.splitlines() if "shallower cache" in line]
    assert re.search(r"on \d{4}-\d\d-\d\d \(shallower cache; --no-cache measures anew\)$", line)
    return line


pytestmark = pytest.mark.filterwarnings("default:the cut is not patched")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "name", mostly_slow(COMMANDS, set(COMMANDS) - {"run", "heal merged", "scan samples"})
)
def test_a_second_run_is_not_measured_again(shallower, folder, place, no_model, name):
    first = shallower(*words(COMMANDS[name], place))
    assert first.status == 0, first.err
    assert "shallower cache" not in first.err
    before = tree(folder)
    dry = shallower(*words(COMMANDS[name], place), "--dry-run")
    no_model()
    again = shallower(*words(COMMANDS[name], place))
    assert (again.status, again.out) == (0, first.out), again.err
    assert "already there, made from the same inputs on" in said_once(again.err)
    assert dry.status == 0, dry.err
    if name != "run":
        assert said_once(dry.err) == said_once(again.err)
    assert tree(folder) == before


def test_a_dry_run_of_an_evaluation_finds_its_file(shallower, folder, place):
    command = words("eval {tiny} --texts {held_out} --drop 2 --out made", place)
    done = shallower(*command)
    before = tree(folder)
    dry = shallower(*command, "--dry-run")
    assert (dry.status, dry.out) == (0, done.out)
    assert "cached, measured on" in said_once(dry.err)
    other = [one.replace("2", "3") if one == "2" else one for one in command]
    assert "exists already" in shallower(*other, "--dry-run").error
    assert shallower(*other[:-1], "elsewhere").status == 0
    assert "exists already" in shallower(*other, "--dry-run").error
    assert {name: one for name, one in tree(folder).items() if name in before} == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", mostly_slow(["scan", "run", "prune", "merge"], ["scan", "merge"]))
def test_what_somebody_has_changed_is_not_known(shallower, folder, place, name):
    command = words(COMMANDS[name], place)
    assert shallower(*command).status == 0
    path = next(path for path in sorted((folder / "made").rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "exists already" in shallower(*command).error
    assert path.read_bytes() == content
    if name != "scan":  # a folder, of which only what was written there is replaced
        assert f"{path.name} (as it is now)" in shallower(*command, "--overwrite").error
        assert path.read_bytes() == content
        path.unlink()
    done = shallower(*command, "--overwrite")
    assert done.status == 0
    assert path.read_bytes() != content
    assert ("shallower cache" in done.err) == (name == "scan")  # whose distances are known
    assert "already there" in said_once(shallower(*command).err)


@pytest.mark.usefixtures("undrawn")
def test_without_the_cache_nothing_is_found_and_nothing_kept(
    shallower, folder, place, cache_folder
):
    for name in ("scan", "prune"):
        command = words(COMMANDS[name], place, name)
        assert shallower(*command, "--no-cache").status == 0
        assert cache_folder.exists() == (name != "scan")
        assert "exists already" in shallower(*command).error
        assert shallower(*command, "--overwrite").status == 0
        assert "exists already" in shallower(*command, "--no-cache").error
        done = shallower(*command, "--no-cache", "--overwrite")
        assert "shallower cache" not in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_hit_loads_no_torch(shallower, folder, place, cache_folder):
    code = (
        "import sys\nfrom shallower.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print({'torch', 'transformers', 'matplotlib'} & set(sys.modules),"
        " file=sys.stderr)"
    )
    (folder / "asked.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    commands = [
        ["eval", place["tiny"], "--texts", place["held_out"], "--drop", "1"],
        ["eval", place["tiny"], "--speech", "asked.jsonl", "--speech-tokens", "4", "--drop", "1"],
        words(COMMANDS["run"], place),
    ]
    for command in commands:
        first = shallower(*command)
        assert first.status == 0, first.err
        again = in_a_process(sys.executable, "-c", code, *command)
        assert again.out == first.out
        assert again.err.splitlines()[-1] == "set()"
        said_once(again.err)


# The command.
def test_the_cache_is_shown_and_cleared(shallower, folder, place, cache_folder):
    shown = shallower("cache")
    assert shown.out == f"nothing was measured yet\n{cache_folder}\n"
    assert shallower("cache", "--json").json == {"folder": str(cache_folder), "kinds": []}
    shallower("eval", place["tiny"], "--texts", place["held_out"])
    shallower(*words(COMMANDS["scan"], place))
    kinds = {kind["kind"]: kind for kind in shallower("cache", "--json").json["kinds"]}
    assert {"measurement", "files"} <= kinds.keys()
    assert kinds["measurement"]["entries"] == 1
    assert kinds["files"]["bytes"] > 100
    assert kinds["measurement"]["oldest"] == kinds["measurement"]["newest"]
    table = shallower("cache").out
    assert "measurement" in table
    assert str(cache_folder) in table
    total = sum(kind["bytes"] for kind in kinds.values())
    assert shallower("cache", "--clear", "--json").json == {
        "folder": str(cache_folder),
        "cleared_bytes": total,
    }
    assert shallower("cache", "--json").json["kinds"] == []
    assert Path("made/scan.safetensors").is_file()
    assert "removed 0.0 MB" in shallower("cache", "--clear").out


def test_without_a_home_there_is_no_cache_and_no_error(shallower, place, monkeypatch):
    monkeypatch.delenv("SHALLOWER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    for _ in range(2):
        done = shallower("eval", place["tiny"], "--texts", place["held_out"])
        assert (done.status, "shallower cache" in done.err) == (0, False)
    assert shallower("cache", "--json").json == {"folder": None, "kinds": []}
    assert "no folder" in shallower("cache").out

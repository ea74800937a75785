"""Whatever is killed at any moment and begun again ends in the same results, to the bit."""

import json
import random
import shutil
import time

import pytest

from shallower.storage import RESULT_RECORD
from tests.conftest import tiny_llama, write_jsonl
from tests.cutting.mixtures import mixture
from tests.examples import fit_head
from tests.forks import Fork, command_with_checkpoints
from tests.healing.cuts import documents
from tests.written import MANY, write_prompts

ON_TEXTS = "tiny --texts texts.jsonl --eval-texts held_out.jsonl --max-length 16 --out out"
HEAL = (
    "heal cut --texts texts.jsonl --eval-texts held_out.jsonl --max-length 16 --dtype float32 "
    "--batch-size 8 --steps 6 --rank 4 --learning-rate 0.01 --eval-every 1 --out "
)
COMMANDS = {
    "scan": "scan tiny --texts texts.jsonl --max-length 16 --batch-size 1 --out out",
    "eval": "eval tiny --texts many.jsonl --max-texts 120 --max-length 16 --batch-size 1 "
    "--drop 2:4 --out out",
    "run": f"run {ON_TEXTS} --n 2 --top 2 --speech asked.jsonl",
    "run --heal": f"run {ON_TEXTS} --n 2 --top 2 --speech asked.jsonl --texts many.jsonl "
    "--max-texts 60 --heal --heal-steps 4",
    "curve": f"curve {ON_TEXTS} --n 1,2 --criteria angular,deepest",
    "compare": f"compare {ON_TEXTS} --n 1,2 --criteria angular,greedy,one_shot",
    "heal": HEAL + "out",
    "heal --objective kd": HEAL + "out --objective kd --original tiny",
    "heal --answers": HEAL + "out --answers prompts.jsonl --answer-tokens 8 --original tiny",
    "merge": "merge adapters --out out",
    "patch --answers": "patch tiny --drop 2:4 --texts many.jsonl --eval-texts held_out.jsonl "
    "--max-length 16 --dtype float32 --answers prompts.jsonl --answer-tokens 8 --out out",
    "prune": "prune tiny --drop 2:4 --max-shard-size 4000 --out out",
    "prune --drop-experts": "prune mixture --drop 2 --max-shard-size 8000 --out out --drop-experts "
    + ";".join(f"{layer}:1,4" for layer in range(8) if layer != 2),
}
"""Commands that go on where they were."""

RARE = (
    "run", "run --heal", "curve", "heal --objective kd", "heal --answers", "compare", "merge",
    "patch --answers", "prune --drop-experts",
)  # fmt: skip

MOMENTS = [
    pytest.param(name, seed, marks=pytest.mark.slow if seed or name in RARE else ())
    for name in COMMANDS
    for seed in range(5)
]
"""A command, and the seed of two moments: ten moments each, two of them in the quick tests."""

UNLIKE = {"seconds", "tokens_per_second"}
"""What two runs of the same command do not agree on in their JSON."""


def start(words, folder):
    """A command in a folder, in a process of its own."""
    words, cache = words.split(), str(folder / "cache")
    return Fork(command_with_checkpoints, words, folder=folder, SHALLOWER_CACHE=cache)


def done(words, folder):
    """Seconds of a command that ends well."""
    began = time.monotonic()
    started = start(words, folder)
    assert started.ended() == 0, started.err
    return time.monotonic() - began


@pytest.fixture(scope="module")
def place(tmp_path_factory, words):
    """What the commands are given."""
    folder = tmp_path_factory.mktemp("given")
    rows = [row[:9] for row in words(documents(200, 3))["input_ids"] if len(row) >= 9]
    # It knows the words, so that a cut is worse and learns from it on every machine.
    fit_head(tiny_llama(5, initializer_range=0.05), rows).save_pretrained(folder / "tiny")
    words.save_pretrained(folder / "tiny")
    mixture("mixtral").save_pretrained(folder / "mixture")
    write_jsonl(folder / "texts.jsonl", documents(60, 0))
    write_jsonl(folder / "many.jsonl", documents(400, 0))
    write_jsonl(folder / "held_out.jsonl", documents(8, 1))
    asked = [json.dumps({"prompt": one}) for one in documents(6, 2)]
    (folder / "asked.jsonl").write_text("\n".join(asked))
    write_prompts(folder / "prompts.jsonl", *MANY, *MANY[::-1])
    for command in ("prune tiny --drop 2:4 --out cut", HEAL + "adapters --steps 1"):
        done(command, folder)
    return folder


def begun(place, folder):
    """A folder of its own with what the commands are given."""
    folder.mkdir()
    files = [f"{name}.jsonl" for name in ("texts", "many", "held_out", "asked", "prompts")]
    for name in ("tiny", "mixture", "cut", "adapters", *files):
        (folder / name).symlink_to(place / name)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """What a command leaves that nobody kills, and how long it takes, by the command."""
    known = {}

    def run(name):
        if name not in known:
            folder = begun(place, place / f"whole {name}")
            known[name] = folder, done(COMMANDS[name], folder)
        return known[name]

    return run


def results(out):
    """All that is below a folder, without times, and without pages and figures of the rest."""
    return {
        str(path.relative_to(out)): _content(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _content(path):
    if path.suffix == ".json":
        found = _plain(json.loads(path.read_text()))
        if path.name.endswith(RESULT_RECORD):  # files that name times have other hashes
            del found["digest"]
            found["files"] = sorted(found["files"])
        return found
    if path.suffix in (".html", ".png", ".md", ".csv"):
        return "written from the rest"
    return path.read_bytes()


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(inside) for name, inside in value.items() if name not in UNLIKE}
    return [_plain(inside) for inside in value] if isinstance(value, list) else value


def unlike(out, expected):
    """What differs below two folders, by name; of JSON the values."""
    found, wanted = results(out), results(expected)
    return [
        (name, *_shown(found.get(name), wanted.get(name)))
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name)
    ]


def _shown(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        differ = [key for key in sorted(one | other) if one.get(key) != other.get(key)]
        return [(key, *_shown(one.get(key), other.get(key))) for key in differ]
    return [f"{len(of)} bytes" if isinstance(of, bytes) else str(of)[:300] for of in (one, other)]


def kill(name, folder, chance, seconds):
    """Kill a command at a random moment; one that ended before is begun anew."""
    while True:
        started = start(COMMANDS[name], folder)
        status = started.ended(chance.uniform(0.02, 0.95) * seconds)
        if status is None:
            started.kill()
            return
        assert status == 0 or is_there(folder, started), started.err
        for made in ("out", "cache"):
            shutil.rmtree(folder / made, ignore_errors=True)


def is_there(folder, ended):
    """Whether a command was killed behind its last step, so that the next one finds all there."""
    *_, last = ended.err.splitlines() or [""]
    return ended.ended() == 2 and " exists already: " in last and (folder / "out").is_dir()


@pytest.mark.parametrize(("name", "seed"), MOMENTS)
def test_what_is_killed_at_two_random_moments_ends_in_the_same_results(
    place, whole, tmp_path, name, seed
):
    expected, seconds = whole(name)
    folder = begun(place, tmp_path / "work")
    chance = random.Random(f"{name} {seed}")
    for _ in range(2):
        kill(name, folder, chance, seconds)
    last = start(COMMANDS[name], folder)
    assert last.ended() == 0 or is_there(folder, last), last.err
    differ = unlike(folder / "out", expected / "out")
    if last.ended():  # it was killed between its last step and its record
        differ = [one for one in differ if not one[0].endswith(RESULT_RECORD)]
    assert differ == []


@pytest.mark.slow
@pytest.mark.parametrize("names", [("curve", "curve"), ("run", "compare")])
def test_two_commands_on_one_store_at_once_lose_nothing(place, whole, tmp_path, names):
    folders = [begun(place, tmp_path / f"{at}") for at in range(len(names))]
    (tmp_path / "cache").mkdir()
    for folder in folders:
        (folder / "cache").symlink_to(tmp_path / "cache")
    both = [start(COMMANDS[name], folder) for name, folder in zip(names, folders, strict=True)]
    for name, folder, started in zip(names, folders, both, strict=True):
        assert started.ended() == 0, started.err
        assert "the store" not in started.err  # it could be used by both
        assert unlike(folder / "out", whole(name)[0] / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_result_that_is_made_again_is_killed_twice_and_the_same(place, tmp_path, seed):
    folder, chance = begun(place, tmp_path / "work"), random.Random(seed)
    done(f"{HEAL}made", folder)
    words = "reproduce made --model cut --texts texts.jsonl --eval-texts held_out.jsonl"
    seconds = done(words, folder)
    for _ in range(2):
        started = start(words, folder)
        if started.ended(chance.uniform(0.1, 0.9) * seconds) is None:
            started.kill()
    last = start(words, folder)
    assert last.ended() == 0, last.out + last.err

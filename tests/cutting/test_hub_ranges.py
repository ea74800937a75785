"""A model of the hub is cut by the ranges of its files that stay, whatever its server sends."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

import shallower as sh
from shallower import ModelError, OutputError
from shallower.cutting import from_hub
from shallower.cutting.checkpoint import PreparedCut
from shallower.cutting.checkpoint_files import INDEX_FILE
from shallower.cutting.exports import EXPORT_FILES
from shallower.cutting.prune import plan_prune
from shallower.storage import RECORD
from shallower.store.records import NOT_VERIFIED
from shallower.texts.quiet import hushed
from tests.cutting import embedders
from tests.cutting.checkpoints import DROPPED, read_json, stored
from tests.cutting.mixtures import mixture, some_experts
from tests.folders import full_disk, tree
from tests.hub import TOKEN
from tests.hub import hub as hub

NAMED = {*EXPORT_FILES, RECORD}
"""Files that name the source, and the record with their hashes."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(hub, source):
    """A hub that has ``me/tiny``."""
    hub.put("me/tiny", source)
    return hub


@pytest.fixture
def local(source, tmp_path):
    """The cut of the folder, without loading it."""
    sh.prune(source, DROPPED, tmp_path / "local")
    return tmp_path / "local"


def assert_same(out, local):
    found, expected = tree(out), tree(local)
    assert set(found) == set(expected)
    assert {name for name in found if found[name] != expected[name]} <= NAMED


def assert_each_byte_once(sent):
    """No byte of a file was sent twice; gives how many were."""
    for _, ranges in itertools.groupby(sorted(sent), key=lambda one: one[0]):
        ends = [(start, stop) for _, start, stop in ranges]
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    return sum(stop - start for _, start, stop in sent)


def most_bytes(source, out):
    """The bytes of what stays, of the headers, and of the vectors that identify the model."""
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors")
    )
    vectors = [one for one in stored(source).values() if len(one.shape) == 1]
    return headers + sum(len(one.content) for one in [*vectors, *stored(out).values()])


def nothing_left(tmp_path):
    return not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


@pytest.mark.parametrize("away", [False, True])
def test_a_cut_is_that_of_a_local_folder(remote, source, local, tmp_path, away, capfd):
    remote.away = away
    heard = []
    capfd.readouterr()
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "cut", progress=False)
    before = assert_each_byte_once(remote.sent)
    assert (planned.way, planned.loads_model) == ("disk", False)
    plan = planned.run(lambda *one: heard.append(one)).plan
    assert plan.model.name == "tiny"
    assert_same(tmp_path / "cut", local)
    fetched = assert_each_byte_once(remote.sent)
    assert fetched == before + planned.fetch_bytes <= most_bytes(source, tmp_path / "cut")
    copied = sum(len(one.content) for one in stored(local).values())
    assert heard == sorted(heard)
    assert heard[-1] == (planned.fetch_bytes + copied,) * 2
    assert nothing_left(tmp_path)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "# me/tiny without" in card
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "gpt_oss"])
def test_only_the_experts_that_stay_are_fetched(hub, tmp_path, name):
    """Single experts, and parts of stacks; by the config alone, and by a built model."""
    model = mixture(name)
    model.save_pretrained(tmp_path / "mixture", max_shard_size="40KB")
    dropped = some_experts(model)
    dropped.pop(1, None)
    hub.put("me/mixture", tmp_path / "mixture")
    sh.prune("me/mixture", [1], tmp_path / "cut", experts=dropped)
    sh.prune(tmp_path / "mixture", [1], tmp_path / "local", experts=dropped)
    assert_same(tmp_path / "cut", tmp_path / "local")
    fetched = assert_each_byte_once(hub.sent)
    assert fetched <= most_bytes(tmp_path / "mixture", tmp_path / "cut")


@pytest.mark.parametrize("pooling", ["1_Pooling", "mean of tokens"])
def test_an_embedder_keeps_its_modules(hub, words, tmp_path, pooling):
    folder = embedders.write(tmp_path / "embedder", words)
    (folder / "1_Pooling").rename(folder / pooling)
    modules = folder / "modules.json"
    modules.write_text(modules.read_text().replace("1_Pooling", pooling))
    hub.put("me/embedder", folder)
    sh.prune("me/embedder", [1, 3], tmp_path / "cut")
    sh.prune(folder, [1, 3], tmp_path / "local")
    assert_same(tmp_path / "cut", tmp_path / "local")
    expected = {name.replace("1_Pooling", pooling) for name in embedders.MODULES}
    assert expected <= {*tree(tmp_path / "cut")}


def test_what_is_refused_is_so_before_weights_are_fetched(remote, tmp_path):
    for layers, error in (([7], sh.LayersError), (range(6), sh.LayersError)):
        with pytest.raises(error):
            sh.prune("me/tiny", layers, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert max(stop for _, _, stop in remote.sent) < 1000


def test_other_ways_load_the_model(remote, source, tmp_path, cache):
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "cut", dtype="bfloat16")
    assert (planned.way, planned.fetch_bytes) == ("memory", 0)
    remote.repos["me/bin"] = {
        "config.json": (source / "config.json").read_bytes(),
        "pytorch_model.bin": b"",
    }
    assert plan_prune("me/bin", DROPPED, tmp_path / "cut").way == "memory"
    assert remote.sent == []
    assert nothing_left(tmp_path)


def test_what_is_loaded_to_be_compared_is_not_fetched_again(remote, source, tmp_path):
    planned = plan_prune("me/tiny", sh.ForStates([1, 3]), tmp_path / "cut")
    before = len(remote.sent)
    planned.run()
    sh.prune(source, sh.ForStates([1, 3]), tmp_path / "local")
    assert_same(tmp_path / "cut", tmp_path / "local")
    assert len(remote.sent) == before
    assert nothing_left(tmp_path)


def test_what_the_cache_has_whole_is_taken_from_there(remote, local, tmp_path, cache, monkeypatch):
    snapshot_download("me/tiny")
    sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert_same(tmp_path / "cut", local)
    assert remote.sent == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.requests.clear()
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "again", verify=True)
    assert planned.way == "disk"
    assert planned.run().difference < 1e-5
    assert_same(tmp_path / "again", local)
    assert remote.requests == []
    assert list(cache.glob("models--*/snapshots/*/model*.safetensors"))


def test_the_cut_says_what_it_fetches_and_its_record_what_it_read(remote, shallower, monkeypatch):
    call = ("prune", "me/tiny", "--drop", "1:3", "--out", "cut")
    said = shallower(*call, "--dry-run", "--json").json
    assert said["fetch_bytes"] < said["bytes"]
    assert "\nfetch: 0.1 MB\n" in shallower(*call, "--dry-run").out
    assert shallower(*call).status == 0
    read = read_json(Path("cut/shallower_record.json"))["read"]["model"]
    assert (read["name"], read["commit"]) == ("me/tiny", "c" * 40)
    names = {name for name in remote.repos["me/tiny"] if name.endswith(".safetensors")}
    whole = {path: sha256_of_file(remote, path) for path in names}
    parts = {name.partition(" (the parts")[0] for name in read["files"] if "not verified" in name}
    assert all(read["files"][path] == whole[path] for path in names)
    assert 0 < len(parts) < len(names)
    assert all(read["files"][path + NOT_VERIFIED] != whole[path] for path in parts)
    assert "is already there" in shallower(*call).err
    done = shallower("reproduce", "cut", "--json")
    assert (done.status, done.json["differences"]) == (0, [])


def sha256_of_file(remote, path):
    return hashlib.sha256(remote.repos["me/tiny"][path]).hexdigest()


def half(data):
    return data[: len(data) // 2]


BREAKS = {"Connection": "close"}
"""Of an answer whose body ends early."""


def test_it_goes_on_where_a_connection_breaks_off(remote, local, tmp_path):
    failed = set()

    def spoil(name, status, headers, data):
        """Every file is down at first, and every longer answer is half of what it says."""
        if name not in failed:
            failed.add(name)
            return 503, {}, b""
        if len(data) < 1000:
            return status, headers, data
        return status, {"Content-Length": str(len(data)), **headers, **BREAKS}, half(data)

    remote.spoil = spoil
    sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert_same(tmp_path / "cut", local)


@pytest.fixture
def heeded():
    """A Ctrl-C that is heeded, also where a shell in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("planned_again", [False, True])
def test_what_was_deleted_is_fetched_again(remote, local, tmp_path, monkeypatch, planned_again):
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "cut")
    with monkeypatch.context() as patched:
        interrupted = signal.raise_signal
        patched.setattr(PreparedCut, "write", lambda *_, **__: interrupted(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            planned.run()
    gone = [path for path in (tmp_path / "assets").rglob("*.safetensors") if path.unlink() is None]
    assert gone
    if planned_again:
        plan_prune("me/tiny", DROPPED, tmp_path / "cut")
    sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert_same(tmp_path / "cut", local)


def test_a_model_that_is_loaded_to_be_compared_is_fetched_whole(remote, source, tmp_path):
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    states = plan_prune("me/tiny", sh.ForStates([1]), tmp_path / "cut")
    assert states.fetch_bytes == whole
    left = plan_prune("me/tiny", DROPPED, tmp_path / "cut").fetch_bytes
    verified = plan_prune("me/tiny", DROPPED, tmp_path / "cut", verify=True)
    assert verified.fetch_bytes == whole + left


def test_more_than_was_asked_for_is_cut_off(remote, local, tmp_path):
    remote.spoil = lambda _, status, headers, data: (status, headers, data + b"more")
    sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert_same(tmp_path / "cut", local)


def saying(send=lambda data: data, **changed):
    """A server whose answers have other headers, or another body than they say."""

    def spoil(_, status, headers, data):
        said = {**headers, **{name.replace("_", "-"): value for name, value in changed.items()}}
        return status, {"Content-Length": str(len(data)), **said}, send(data)

    return spoil


SPOILT = {
    "whole": (lambda *_: (200, {}, b"x" * 20_000), "does not send ranges of model-00"),
    "other": (
        saying(Content_Range="bytes 1-9/20"),
        "sends another range of model-00.* expected bytes 0-7/",
    ),
    "nothing": (saying(lambda _: b"", **BREAKS), "the connection breaks off again and again"),
    "another": (
        saying(ETag="other"),
        r"sends another content of model-00.* \(ETag other\), expected [0-9a-f]{64}, as it states",
    ),
    "nameless": (saying(ETag=""), r"sends another content of model-00.* \(ETag missing\)"),
    "down": (lambda *_: (503, {}, b""), "cannot fetch me/tiny: .*503"),
    "gone": (lambda *_: (404, {"X-Error-Code": "EntryNotFound"}, b""), "cannot fetch me/tiny: "),
}


@pytest.mark.parametrize("way", SPOILT)
def test_a_server_that_sends_something_else_is_refused(remote, local, tmp_path, way):
    remote.spoil, words = SPOILT[way]
    with pytest.raises(ModelError, match=words):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    remote.spoil = lambda _, *answer: answer
    sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert_same(tmp_path / "cut", local)


@pytest.mark.parametrize(
    ("length", "said"),
    [(1 << 60, "its header claims 1152921504606846976 bytes"), (200, "its header is broken")],
)
def test_a_lying_header_is_refused(remote, tmp_path, length, said):
    name = "model-00003-of-00012.safetensors"
    data = remote.repos["me/tiny"][name]
    remote.repos["me/tiny"][name] = length.to_bytes(8, "little") + data[8:]
    with pytest.raises(ModelError, match=said):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert max(stop for _, _, stop in remote.sent) < 1000


def test_ranges_that_are_not_those_of_the_copy_are_refused(remote, tmp_path):
    """Zeros would take the place of what was not fetched."""
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "cut")
    make, (cut, out) = planned._write.func, planned._write.args
    with pytest.raises(ModelError, match="the ranges of me/tiny that stay are not known"):
        make(dataclasses.replace(cut, reads=cut.reads[1:]), out)
    assert not out.exists()


def test_names_in_an_index_lead_nowhere_else(remote, tmp_path):
    index = json.loads(remote.repos["me/tiny"][INDEX_FILE])
    index["weight_map"]["lm_head.weight"] = "../../x.safetensors"
    remote.repos["me/tiny"][INDEX_FILE] = json.dumps(index).encode()
    with pytest.raises(ModelError, match="expected the plain name"):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")


def test_a_full_disk_says_so(remote, tmp_path, monkeypatch):
    planned = plan_prune("me/tiny", DROPPED, tmp_path / "cut")
    with full_disk(0), pytest.raises(OutputError, match="cannot write"):
        planned.run(False)
    monkeypatch.setattr(from_hub, "free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"are needed with the cut, 0\.0 MB are free"):
        planned.run()
    assert not (tmp_path / "cut").exists()


def prune_in_a_process(hub, home, drop, out):
    """The command, given to a process of its own."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "shallower", "prune", "me/tiny", "--drop", drop, "--out", out]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def kill(child, home):
    """Kill a process; gives the ranges that it had, by its journal."""
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (journal,) = (home / "assets").rglob(".fetched.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return {(name, start, stop) for name, _, start, stop in lines}


@pytest.mark.parametrize("wanted", [2, 6])
def test_killed_it_goes_on(remote, local, tmp_path, wanted):
    """The server waits after so many ranges of weights; what had come is not sent again."""
    waits, go_on = threading.Event(), threading.Event()
    plan_prune("me/tiny", DROPPED, tmp_path / "elsewhere")
    planning = len(remote.sent)
    remote.sent.clear()

    def spoil(_, *answer):
        if len(remote.sent) > planning + wanted:
            waits.set()
            go_on.wait(60)
        return answer

    remote.spoil = spoil
    call = (remote, tmp_path / "home", ",".join(map(str, DROPPED)), tmp_path / "cut")
    child = prune_in_a_process(*call)
    assert waits.wait(120)
    come = kill(child, tmp_path / "home")
    assert len(come) >= planning
    assert not (tmp_path / "cut").exists()
    remote.spoil = lambda _, *answer: answer
    go_on.set()
    remote.sent.clear()
    child = prune_in_a_process(*call)
    assert "MB are fetched" in child.communicate()[1]
    assert remote.sent
    assert_each_byte_once([*come, *remote.sent])
    found = tree(tmp_path / "cut")
    del found["shallower_record.json"]
    assert {name for name, data in tree(local).items() if found[name] != data} <= NAMED
    assert not [path for path in (tmp_path / "home" / "assets").rglob("*") if path.is_file()]


def spoilt(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_server_that_sends_other_weights_is_found_out_where_that_can_be(remote, tmp_path):
    """It states the right hash of each file; only files that came whole can be held against it."""
    stays = "model-00001-of-00012.safetensors"
    remote.spoil = lambda name, status, headers, data: (
        (status, headers, spoilt(data, len(data) - 1))
        if name == stays and len(data) > 1000
        else (status, headers, data)
    )
    with pytest.raises(ModelError, match=f"sends another {stays} of me/tiny than it states"):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert nothing_left(tmp_path)


def test_a_server_that_is_not_the_hub_is_named(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("shallower.texts.hub.HUB", "https://huggingface.co")
    with pytest.warns(UserWarning, match=f"comes from {remote.url} .HF_ENDPOINT. and not from"):
        sh.prune("me/tiny", DROPPED, tmp_path / "cut")


def test_what_the_hub_makes_us_wait_for_is_said(remote, local, tmp_path, capfd):
    answers = iter([(500, {}, b""), (429, {"Retry-After": "7"}, b"")])

    def spoil(_name, *answer):
        return next(answers, answer)

    remote.spoil = spoil
    sh.prune("me/tiny", DROPPED, tmp_path / "cut", progress=False)
    assert_same(tmp_path / "cut", local)
    said = capfd.readouterr().err
    assert f"{remote.url} answers with status 500: asking again in 1 s\n" in said
    assert f"{remote.url} answers with status 429: asking again in 8 s\n" in said
    remote.spoil = lambda *_: (429, {"Retry-After": "3600"}, b"")
    with pytest.raises(ModelError, match="may come in 3601 s: try again then"):
        sh.prune("me/tiny", DROPPED, tmp_path / "again", progress=False)


def test_a_wait_is_said_where_no_reason_was_heard_in_its_thread(capfd):
    client = logging.getLogger("huggingface_hub.utils._http")
    with hushed():
        client.warning("'HTTP Error 500' thrown while requesting GET https://hub.example/one")
        other = threading.Thread(target=client.warning, args=["Retrying in 2.0s [Retry 1/5]."])
        other.start()
        other.join()
        client.warning("Retrying in 1.0s [Retry 1/5].")
    assert capfd.readouterr().err.splitlines() == [
        "the hub does not answer: asking again in 2 s",
        "https://hub.example answers with status 500: asking again in 1 s",
    ]

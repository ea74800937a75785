"""The cache: entries by content, whole after any death, and nothing else removed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import CacheError
from shallower.runs.cache import Cache, cache_folder, open_cache

INPUTS = {"model": "0" * 64, "texts": ["a", "b"], "dtype": "float32", "dropped": [3, 4]}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def the_file(cache, pattern="*/*.json"):
    (path,) = cache.folder.glob(pattern)
    return path


# The place.
def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SHALLOWER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "shallower"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "shallower"
    assert open_cache().folder == cache_folder()
    assert open_cache(no_cache=True).folder is None


def test_no_test_sees_the_cache_of_the_user():
    assert cache_folder() is not None
    assert "caches" in cache_folder().parts
    assert not cache_folder().exists()


# Entries.
@given(
    inputs=st.dictionaries(st.text(), PLAIN, max_size=3), value=st.dictionaries(st.text(), PLAIN)
)
def test_what_was_put_is_found(tmp_path_factory, inputs, value):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    assert cache.get("loss", inputs) is None
    cache.put("loss", inputs, value)
    assert cache.get("loss", inputs) == value
    assert cache.get("loss", {**inputs, "another": 1}) is None
    assert cache.get("scan", inputs) is None


def test_the_keys_of_a_value_keep_their_order(cache):
    value = {"b": 1, "a": {"d": 2, "c": 3}}
    cache.put("loss", INPUTS, value)
    assert json.dumps(cache.get("loss", INPUTS)) == json.dumps(value)


def test_every_input_counts_and_their_order_does_not(cache):
    cache.put("loss", INPUTS, {"nats": 3.5})
    assert cache.get("loss", dict(reversed(INPUTS.items()))) == {"nats": 3.5}
    for name in INPUTS:
        assert cache.get("loss", {**INPUTS, name: "another"}) is None
        assert cache.get("loss", {n: v for n, v in INPUTS.items() if n != name}) is None


def test_an_entry_knows_when_it_was_made_and_holds_files(cache):
    before = time.strftime("%Y-%m-%d")
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"bytes", "map.png": b""})
    entry = cache.find("scan", INPUTS)
    assert before <= entry.made[:10] <= time.strftime("%Y-%m-%d")
    assert entry.content("scan.safetensors") == b"bytes"
    assert entry.content("map.png") == b""
    assert sorted(entry.names) == ["map.png", "scan.safetensors"]


def test_a_cache_that_is_off_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cache, inputs in ((Cache(None), INPUTS), (Cache(tmp_path), None)):
        cache.put("loss", inputs, {"nats": 1.0})
        assert cache.get("loss", inputs) is None
        assert cache.journal("trials", inputs) is None
    assert Cache(None).usage() == []
    assert Cache(None).clear() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", ["cut off", "empty", "changed", "of another", "no JSON", "a list"]
)
def test_a_damaged_entry_is_named_with_the_way_out(cache, damage):
    cache.put("loss", INPUTS, {"nats": 3.5})
    path = the_file(cache)
    content = path.read_bytes()
    if damage == "of another":
        other = Cache(cache.folder.with_name("other"))
        other.put("loss", {}, {"nats": 1.0})
        content = the_file(other).read_bytes()
    damaged = {
        "cut off": content[: len(content) // 2],
        "empty": b"",
        "changed": content.replace(b"3.5", b"3.4"),
        "of another": content,
        "no JSON": b"\xff\xfe",
        "a list": b"[1, 2]",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(CacheError) as raised:
        cache.get("loss", INPUTS)
    message = str(raised.value)
    assert str(path) in message
    assert "shallower cache --clear" in message
    assert "--no-cache" in message
    assert "\n" not in message


def test_every_changed_byte_is_noticed(cache):
    cache.put("loss", {"n": 1}, {"nats": 3.5})
    path = the_file(cache)
    content = path.read_bytes()
    for index in range(len(content) - 1):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CacheError):
            cache.get("loss", {"n": 1})


def test_a_damaged_file_of_an_entry_is_named(cache):
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"bytes"})
    path = the_file(cache, "*/*/*")
    for content in (b"byt", b"Bytes"):
        path.write_bytes(content)
        with pytest.raises(CacheError, match=path.name):
            cache.find("scan", INPUTS).content("scan.safetensors")
    path.unlink()
    with pytest.raises(CacheError, match=path.name):
        cache.find("scan", INPUTS).content("scan.safetensors")


def test_a_path_in_an_entry_is_not_trusted(cache):
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"bytes"})
    path = the_file(cache)
    entry = json.loads(path.read_bytes())
    entry["files"] = {"scan.safetensors": "../../secret"}
    del entry["sha256"]
    from shallower.runs import cache as module

    entry["sha256"] = module.hashlib.sha256(module._canonical(entry)).hexdigest()
    path.write_bytes(module._canonical(entry))
    with pytest.raises(CacheError, match="not a hash"):
        cache.find("scan", INPUTS)


@pytest.mark.parametrize("place", ["a file", "forbidden"])
def test_where_nothing_can_be_kept_a_warning_says_so(tmp_path, place):
    folder = tmp_path / "place"
    if place == "a file":
        folder.write_text("dear to someone")
    else:
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
    cache = Cache(folder)
    assert cache.get("loss", INPUTS) is None
    with pytest.warns(UserWarning, match="nothing is kept in the cache"):
        cache.put("loss", INPUTS, {"nats": 1.0})
    journal = cache.journal("trials", INPUTS)
    assert journal.read() == []
    with pytest.warns(UserWarning, match="no more is kept"):
        journal.append({"n": 1})
    journal.append({"n": 2})  # said once


# Deaths and company.
WRITER = """
import sys
from pathlib import Path
from shallower.runs.cache import Cache
cache = Cache(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10**9):
    cache.put("loss", {"n": number % 7}, {"by": sys.argv[2], "long": "x" * 200_000},
              files={"file": sys.argv[2].encode() * 100_000})
"""


def writers(cache, *names):
    started = []
    for name in names:
        command = [sys.executable, "-c", WRITER, str(cache.folder), name]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    for process in started:
        assert process.stdout.readline() == b"ready\n"
    return started


def test_a_kill_while_it_is_written_leaves_the_old_entry_or_the_new_one(cache):
    for round_ in range(4):
        (process,) = writers(cache, f"writer{round_}")
        time.sleep(0.13 + 0.017 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        entries = [cache.find("loss", {"n": number}) for number in range(7)]
        assert any(entries)
        for entry in filter(None, entries):
            assert len(entry.value["long"]) == 200_000
            assert entry.content("file") == entry.value["by"].encode() * 100_000
    cache.clear()
    assert not cache.folder.exists()


def test_two_processes_write_the_same_entries_at_once(cache):
    started = writers(cache, "one", "two")
    seen = set()
    ending = time.monotonic() + 2.0
    while time.monotonic() < ending:
        for number in range(7):
            entry = cache.find("loss", {"n": number})
            if entry is not None:
                assert entry.content("file") == entry.value["by"].encode() * 100_000
                seen.add(entry.value["by"])
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    assert seen == {"one", "two"}


# Showing and clearing.
def test_usage_counts_entries_and_bytes_by_kind(cache):
    cache.put("loss", {"n": 1}, {"nats": 1.0})
    cache.put("loss", {"n": 2}, {"nats": 2.0})
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"x" * 5000})
    cache.journal("trials", INPUTS).append({"n": 1})
    used = {usage.kind: usage for usage in cache.usage()}
    assert {kind: usage.entries for kind, usage in used.items()} == {
        "loss": 2,
        "scan": 1,
        "trials": 1,
    }
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert sum(usage.num_bytes for usage in used.values()) == sum(p.stat().st_size for p in files)
    assert used["scan"].num_bytes > 5000
    assert used["loss"].oldest <= used["loss"].newest <= time.time()


def test_clearing_removes_what_a_cache_made_and_nothing_else(cache, tmp_path):
    cache.put("loss", INPUTS, {"nats": 1.0})
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"x"})
    cache.journal("trials", INPUTS).append({"n": 1})
    key = cache.key("scan", INPUTS)
    dear = tmp_path / "dear"
    (dear / key).mkdir(parents=True)
    for place in (dear / f"{key}.json", dear / key / key):
        place.write_text("dear to someone")
    (cache.folder / "loss" / "notes.txt").write_text("dear to someone")
    (cache.folder / "scan" / "0").mkdir()
    (cache.folder / "links").symlink_to(dear)
    (cache.folder / "scan" / ("1" * 64)).symlink_to(dear / key)
    (cache.folder / "scan" / f"{'2' * 64}.json").symlink_to(dear / f"{key}.json")
    (cache.folder / "loss" / f".{key}.json.0123abcd.partial").write_bytes(b"cut off")
    assert cache.clear() > 0
    left = {str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*")}
    assert left == {"loss", "loss/notes.txt", "scan", "scan/0", f"scan/{'1' * 64}", "links"}
    assert all(p.read_text() == "dear to someone" for p in dear.rglob("*") if p.is_file())
    assert len([path for path in dear.rglob("*") if path.is_file()]) == 2
    assert cache.get("loss", INPUTS) is None


def test_clearing_an_empty_cache_is_nothing(cache):
    assert cache.clear() == 0
    cache.put("loss", INPUTS, {})
    cache.clear()
    assert not cache.folder.exists()


@pytest.mark.parametrize("gone", ["cache", "scan", "a folder of files", "a file"])
@pytest.mark.parametrize("what", ["usage", "clear"])
def test_what_another_process_removes_meanwhile_is_no_error(cache, monkeypatch, what, gone):
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"x" * 5000})
    names = {"a folder of files": cache.key("scan", INPUTS), "a file": "scan"}
    listed = Path.iterdir

    def list_and_remove(folder):
        found = list(listed(folder))
        if folder.name == names.get(gone, gone):
            for path in found if gone == "a file" else [folder]:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", list_and_remove)
    assert getattr(cache, what)() in ([], 0) or gone == "a folder of files"
    monkeypatch.undo()
    assert cache.clear() >= 0
    assert not cache.folder.exists()


def test_what_another_process_writes_meanwhile_stays(cache, monkeypatch):
    cache.put("loss", INPUTS, {"nats": 1.0})
    removed = Path.rmdir

    def write_and_remove(folder):
        cache.put("loss", INPUTS, {"nats": 2.0})
        removed(folder)

    monkeypatch.setattr(Path, "rmdir", write_and_remove)
    assert cache.clear() > 0
    assert cache.get("loss", INPUTS) == {"nats": 2.0}


def test_usage_and_clearing_go_on_while_others_write(cache):
    started = writers(cache, "one", "two")
    ending = time.monotonic() + 1.5
    freed = 0
    while time.monotonic() < ending:
        cache.usage()
        freed += cache.clear()
    for process in started:
        assert process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
    assert freed > 0
    cache.clear()
    assert not cache.folder.exists()


@pytest.mark.parametrize("place", ["entry", "journal", "file of an entry"])
def test_a_folder_in_the_place_of_a_file_is_removed_if_it_is_empty(cache, place):
    cache.put("loss", {"n": 1}, {"nats": 1.0})
    cache.put("scan", INPUTS, {}, files={"scan.safetensors": b"x"})
    key = cache.key("scan", INPUTS)
    names = {"entry": f"{key}.json", "journal": f"{key}.jsonl", "file of an entry": f"{key}/{key}"}
    path = cache.folder / "scan" / names[place]
    if place == "entry":
        path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("dear to someone")
    if place == "entry":
        with pytest.raises(CacheError, match="is cut off or damaged"):
            cache.get("scan", INPUTS)
    assert [usage.kind for usage in cache.usage()][:1] == ["loss"]
    with pytest.raises(CacheError) as raised:
        cache.clear()
    assert str(raised.value).endswith(f"; remove {path}")
    assert [p for p in cache.folder.rglob("*") if p.is_file()] == [path / "notes.txt"]
    (path / "notes.txt").unlink()
    assert cache.clear() == 0
    assert not cache.folder.exists()

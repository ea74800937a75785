"""The store shown and cleared, damaged or in use."""

import contextlib
import time

import pytest

from shallower.errors import CacheError
from shallower.runs import store as module
from shallower.runs.store import STORE_FILE, Store
from tests.runs.stores import DAMAGES, INPUTS, again, break_file, path_of, start


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_usage_counts_entries_and_bytes_by_kind(store):
    store.put("loss", {"n": 1}, {"nats": 1.0})
    store.put("loss", {"n": 2}, {"nats": 2.0})
    for number in range(3):
        store.journal("trials", INPUTS).append({"n": number, "long": "x" * 5000})
    used = {usage.kind: usage for usage in store.usage()}
    assert {kind: usage.entries for kind, usage in used.items()} == {"loss": 2, "trials": 3}
    assert used["loss"].num_bytes == len('{"nats":1.0}') * 2
    assert used["trials"].num_bytes > 15_000
    assert time.time() - 60 < used["loss"].oldest <= used["loss"].newest <= time.time()


def old_cache(folder):
    """Entries as version 0.1 left them, and what lies among them and is not its own."""
    key = "0" * 64
    dear = folder.parent / "dear"
    (dear / key).mkdir(parents=True)
    for place in (dear / f"{key}.json", dear / key / key):
        place.write_text("dear to someone")
    (folder / "scan" / key).mkdir(parents=True)
    (folder / "loss" / "notes").mkdir(parents=True)
    (folder / "emptied").mkdir()
    for name in (f"loss/{key}.json", f"scan/{key}.jsonl", f"scan/{key}/{key}"):
        (folder / name).write_text("old")
    (folder / "loss" / f".{key}.json.0123abcd.partial").write_bytes(b"cut off")
    (folder / "loss" / "notes.txt").write_text("dear to someone")
    (folder / "links").symlink_to(dear)
    (folder / "scan" / ("1" * 64)).symlink_to(dear / key)
    (folder / "scan" / f"{'2' * 64}.json").symlink_to(dear / f"{key}.json")
    return dear


def test_clearing_removes_all_entries_and_nothing_else(store):
    dear = old_cache(store.folder)
    store.put("loss", INPUTS, {"nats": 1.0})
    store.journal("trials", INPUTS).append({"n": 1})
    freed = store.clear()
    assert freed > len('{"nats":1.0}{"n":1}') + 3 * len("old")
    left = {str(path.relative_to(store.folder)) for path in store.folder.rglob("*")}
    assert {name for name in left if not name.startswith(STORE_FILE)} == {
        "loss", "loss/notes", "loss/notes.txt", "scan", f"scan/{'1' * 64}", "links",
    }  # fmt: skip
    assert all(p.read_text() == "dear to someone" for p in dear.rglob("*") if p.is_file())
    assert len([path for path in dear.rglob("*") if path.is_file()]) == 2
    assert store.get("loss", INPUTS) is None
    assert store.journal("trials", INPUTS).read() == []
    assert store.usage() == []
    assert store.clear() == 0
    store.put("loss", INPUTS, {"nats": 2.0})
    assert again(store).get("loss", INPUTS) == {"nats": 2.0}


def test_clearing_goes_on_while_others_write(store):
    started = [start(store, name, quiet=True) for name in ("one", "two")]
    ending = time.monotonic() + 1.0
    freed = 0
    while time.monotonic() < ending:
        freed += store.clear()
    for process in started:
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert freed > 0
    store.clear()
    assert store.usage() == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_clearing_removes_what_is_damaged_and_names_what_it_may_not(store, damage, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    repair = break_file(store, damage)
    one = again(store)
    if damage in ("a folder", "a folder that is a file", "locked", "of another program"):
        before = path_of(store).exists()
        with pytest.raises(CacheError, match=STORE_FILE) if before else contextlib.nullcontext():
            one.clear()
        assert path_of(store).exists() == before
    else:
        one.clear()
        fresh = again(store)
        fresh.put("loss", INPUTS, {"nats": 1.0})
        assert fresh.get("loss", INPUTS) == {"nats": 1.0}
    with contextlib.suppress(FileNotFoundError):
        repair()

"""The store shown and cleared, damaged or in use."""

import contextlib
import time

import pytest

from shallower.errors import CacheError
from shallower.store import store as module
from shallower.store.store import STORE_FILE, Store
from tests.store.stores import DAMAGES, INPUTS, again, break_file, path_of, start


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_usage_counts_entries_and_bytes_by_kind(store):
    store.put("loss", {"n": 1}, {"nats": 1.0})
    store.put("loss", {"n": 2}, {"nats": 2.0})
    for number in range(3):
        store.journal("trials", INPUTS).append({"n": number, "long": "x" * 5000})
    (loss, *_, oldest, newest), trials = store.usage()
    assert (loss, trials[0], trials[1]) == ("loss", "trials", 3)
    assert store.usage()[0][1:3] == (2, len('{"nats":1.0}') * 2)
    assert trials[2] > 15_000
    assert time.time() - 60 < oldest <= newest <= time.time()


def test_clearing_removes_all_entries_and_nothing_else(store):
    dear = store.folder / "loss" / "notes.txt"
    dear.parent.mkdir(parents=True)
    dear.write_text("dear to someone")
    store.put("loss", INPUTS, {"nats": 1.0})
    store.journal("trials", INPUTS).append({"n": 1})
    assert store.clear() == len('{"nats":1.0}{"n":1}')
    left = {str(path.relative_to(store.folder)) for path in store.folder.rglob("*")}
    assert {name for name in left if not name.startswith(STORE_FILE)} == {"loss", "loss/notes.txt"}
    assert dear.read_text() == "dear to someone"
    assert store.get("loss", INPUTS) is None
    assert store.journal("trials", INPUTS).read() == []
    assert store.usage() == []
    assert store.clear() == 0
    store.put("loss", INPUTS, {"nats": 2.0})
    assert again(store).get("loss", INPUTS) == {"nats": 2.0}


def test_clearing_goes_on_while_others_write(store):
    started = [start(store, name, quiet=True) for name in ("one", "two")]
    ending = time.monotonic() + 0.4
    freed = 0
    while time.monotonic() < ending or not freed:  # on a loaded machine they begin later
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

"""The store: entries by content, whole after any death, and never the reason that work ends."""

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.store import store as module
from shallower.store.store import STORE_FILE, Store, file_system, open_store, store_folder
from tests.store.stores import DAMAGES, INPUTS, again, break_file, path_of, records, start

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@contextlib.contextmanager
def sql(store):
    """The file by itself, all connections of the store closed."""
    store._close()
    with contextlib.closing(sqlite3.connect(path_of(store))) as connection, connection:
        yield connection


# The place.
def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "own"))
    assert store_folder() == tmp_path / "own"
    monkeypatch.delenv("SHALLOWER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store_folder() == tmp_path / "xdg" / "shallower"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_folder() == tmp_path / ".cache" / "shallower"
    assert open_store().folder == store_folder()
    assert open_store(no_cache=True).folder is None


def test_no_test_sees_the_cache_of_the_user():
    assert store_folder() is not None
    assert "caches" in store_folder().parts
    assert not store_folder().exists()


# Measurements.
@given(
    inputs=st.dictionaries(st.text(), PLAIN, max_size=3), value=st.dictionaries(st.text(), PLAIN)
)
def test_what_was_put_is_found(tmp_path_factory, inputs, value):
    store = Store(tmp_path_factory.mktemp("cache"))
    assert store.get("loss", inputs) is None
    store.put("loss", inputs, value)
    for one in (store, again(store)):
        assert one.get("loss", inputs) == value
        assert one.get("loss", {**inputs, "another": 1}) is None
        assert one.get("scan", inputs) is None


def test_the_keys_of_a_value_keep_their_order(store):
    value = {"b": 1, "a": {"d": 2, "c": 3}}
    store.put("loss", INPUTS, value)
    assert json.dumps(store.get("loss", INPUTS)) == json.dumps(value)


def test_every_input_counts_and_their_order_does_not(store):
    store.put("loss", INPUTS, {"nats": 3.5})
    assert store.get("loss", dict(reversed(INPUTS.items()))) == {"nats": 3.5}
    for name in INPUTS:
        assert store.get("loss", {**INPUTS, name: "another"}) is None
        assert store.get("loss", {n: v for n, v in INPUTS.items() if n != name}) is None


def test_an_entry_is_replaced_and_knows_when_it_was_made(store):
    before = time.strftime("%Y-%m-%d")
    store.put("loss", INPUTS, {"nats": 1.0})
    store.put("loss", INPUTS, {"nats": 2.0})
    entry = store.find("loss", INPUTS)
    assert entry.value == {"nats": 2.0}
    assert before <= entry.made[:10] <= time.strftime("%Y-%m-%d")
    assert [count for _, count, *_ in store.usage()] == [1]


def test_a_store_that_is_off_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for store, inputs in ((Store(None), INPUTS), (Store(tmp_path), None)):
        store.put("loss", inputs, {"nats": 1.0})
        assert store.get("loss", inputs) is None
        assert store.journal("trials", inputs) is None
    assert Store(None).usage() == []
    assert Store(None).clear() == 0
    assert list(tmp_path.iterdir()) == []


def test_looking_up_makes_no_file(store):
    assert store.get("loss", INPUTS) is None
    assert store.journal("trials", INPUTS).read() == []
    assert store.usage() == []
    assert store.clear() == 0
    assert not store.folder.exists()


# Records.
def test_records_are_read_as_they_were_appended(store):
    records = [{"n": n, "text": "ä\n\u2028", "nats": [0.1 * n, None]} for n in range(5)]
    for record in records:
        store.journal("trials", INPUTS).append(record)
        store.journal("trials", {"model": "other"}).append({"other": 1})
    for one in (store, again(store)):
        assert one.journal("trials", INPUTS).read() == records
        assert one.journal("patched_trials", INPUTS).read() == []
    store.put("trials", INPUTS, {"n": 9})
    assert store.journal("trials", INPUTS).read() == records


# Damage.
def test_a_changed_byte_is_never_read_as_a_value(store):
    store.put("loss", {"n": 1}, {"nats": 3.5})
    store.journal("trials", INPUTS).append({"n": 1})
    store._close()
    content = path_of(store).read_bytes()
    row = content.index(b'{"nats"')
    changes = [*range(100), *range(100, len(content), 97), *range(row - 100, row + 90)]
    for index in changes:
        changed = bytearray(content)
        changed[index] ^= 1
        path_of(store).write_bytes(changed)
        one = again(store)
        with contextlib.suppress(UserWarning):
            assert one.get("loss", {"n": 1}) in ({"nats": 3.5}, None), index
        with contextlib.suppress(UserWarning):
            assert one.journal("trials", INPUTS).read() in ([{"n": 1}], []), index
        one._close()
        for left in store.folder.glob(f"{STORE_FILE}-*"):
            left.unlink()


@pytest.mark.parametrize(
    "change",
    [
        "value = '{}'", "made = made + 1", "value = X'00'", "value = NULL", "made = 'yesterday'",
        "checksum = 5", "value = 'ä'", "value = value || ' '",
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["measurements", "records"])
def test_a_damaged_row_is_left_out_with_a_warning(store, table, change):
    for number in range(2):
        store.put("loss", {"n": number}, {"n": number})
        store.journal("loss", INPUTS).append({"n": number})
    with sql(store) as connection:
        connection.execute(
            f"UPDATE {table} SET {change} WHERE rowid = (SELECT MIN(rowid) FROM {table})"
        )

    def found(one):
        if table == "records":
            return one.journal("loss", INPUTS).read()
        return [value for n in range(2) if (value := one.get("loss", {"n": n})) is not None]

    with pytest.warns(UserWarning, match="damaged and not used") as warned:
        assert found(again(store)) == [{"n": 1}]
    assert len(warned) == 1
    assert "shallower cache --clear" in str(warned[0].message)
    if table == "measurements":
        store.put("loss", {"n": 0}, {"n": 0})
        assert found(again(store)) == [{"n": 0}, {"n": 1}]


def test_a_row_under_the_key_of_another_is_damaged(store):
    for number in range(2):
        store.put("loss", {"n": number}, {"n": number})
    one, two = (store.key("loss", {"n": number}) for number in range(2))
    with sql(store) as connection:
        connection.execute("DELETE FROM measurements WHERE key = ?", (one,))
        connection.execute("UPDATE measurements SET key = ? WHERE key = ?", (one, two))
    with pytest.warns(UserWarning, match="damaged"):
        assert again(store).get("loss", {"n": 0}) is None


def use_in_vain(store):
    store.put("loss", INPUTS, {"nats": 1.0})
    assert store.get("loss", INPUTS) is None
    journal = store.journal("trials", INPUTS)
    journal.append({"n": 1})
    assert journal.read() == []
    assert store.usage() == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_said_once_and_nothing_else_happens(
    store, damage, monkeypatch
):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    repair = break_file(store, damage)
    with pytest.warns(UserWarning, match="the work goes on") as warned:
        use_in_vain(again(store))
    (message,) = [str(one.message) for one in warned]
    assert str(path_of(store)) in message
    assert "shallower cache --clear" in message
    assert "--no-cache" in message
    assert "\n" not in message
    repair()


def test_a_full_disk_is_said_once_and_leaves_no_half_record(store, monkeypatch):
    store.put("loss", INPUTS, {"nats": 1.0})
    one = again(store)
    assert one.get("loss", INPUTS)
    one._connection.execute("PRAGMA max_page_count = 1")
    journal = one.journal("trials", INPUTS)
    with pytest.warns(UserWarning, match="full"):
        list(map(journal.append, ({"n": number, "long": "x" * 5000} for number in range(40))))
    one._close()
    kept = again(store).journal("trials", INPUTS).read()
    assert [record["n"] for record in kept] == list(range(len(kept)))
    assert len(kept) < 40


def test_a_folder_that_may_not_be_written_to_is_said_once(store):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    store.folder.mkdir()
    store.folder.chmod(0o500)
    assert store.get("loss", INPUTS) is None
    with pytest.warns(UserWarning, match="the work goes on") as warned:
        use_in_vain(store)
    assert len(warned) == 1


def test_a_read_only_file_is_said_once(store, monkeypatch):
    store.put("loss", INPUTS, {"nats": 1.0})
    store._close()
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **named: connect(f"file:{path}?mode=ro", uri=True, **named)
    )
    one = again(store)
    assert one.get("loss", INPUTS) in ({"nats": 1.0}, None)
    with pytest.warns(UserWarning, match=r"readonly.*the work goes on"):
        one.put("loss", INPUTS, {"nats": 2.0})
    assert one.get("loss", INPUTS) is None  # it is off


# File systems.
def test_a_network_folder_is_written_without_a_shared_log(store, monkeypatch):
    store.put("loss", {"n": 1}, {"nats": 1.0})
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
    store._close()
    monkeypatch.setattr(module, "file_system", lambda _: "nfs4")
    Store(store.folder / "parts").put("loss", {"n": 1}, {"nats": 1.0})  # no variable names it
    monkeypatch.setenv("SHALLOWER_CACHE", str(store.folder))
    one = again(store)
    with pytest.warns(UserWarning, match="network folder .*SHALLOWER_CACHE"):
        one.put("loss", {"n": 2}, {"nats": 2.0})
    assert one._connection.execute("PRAGMA journal_mode").fetchone() == (b"delete",)
    assert [one.get("loss", {"n": n})["nats"] for n in (1, 2)] == [1.0, 2.0]


def test_a_file_system_without_the_log_gets_a_journal(store, monkeypatch):
    real = module._pragma

    def refusing(connection, name):
        if name == "journal_mode = WAL":
            raise sqlite3.OperationalError("locking protocol")
        return real(connection, name)

    monkeypatch.setattr(module, "_pragma", refusing)
    store.put("loss", INPUTS, {"nats": 1.0})
    assert again(store).get("loss", INPUTS) == {"nats": 1.0}


def test_file_systems_are_read_from_the_table_of_mounts(monkeypatch, tmp_path):
    assert file_system(Path("/proc")) == "proc"
    table = (
        "1 0 0:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:2 / /home rw shared:1 - nfs4 host:/home rw\n"
        "3 2 0:3 / /home/my\\040disk rw - xfs /dev/sdb rw\n"
        "4 2 0:3 / /home/sums rw - fuse.sshfs x rw\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_named: table)
    monkeypatch.setattr(Path, "resolve", lambda path: path)
    found = [file_system(Path(p)) for p in ("/x", "/home/a", "/home/my disk/b", "/home/sums")]
    assert found == ["ext4", "nfs4", "xfs", "fuse.sshfs"]
    assert file_system(Path("/homely")) == "ext4"


# Threads, forks, deaths and company.
def test_threads_share_a_store_from_its_first_use_on(tmp_path):
    for number in range(10):  # a thread that meets another one making the file waits for it
        journal = Store(tmp_path / f"{number}").journal("trials", INPUTS)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n, journal=journal: journal.append({"n": n}), range(100)))
        assert sorted(record["n"] for record in journal.read()) == list(range(100))


def test_a_forked_process_opens_the_file_anew(store):
    store.put("loss", {"n": 0}, {"by": "parent"})

    def child():
        store.put("loss", {"n": 1}, {"by": "child"})
        os._exit(0 if store.get("loss", {"n": 0}) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.get("loss", {"n": 1}) == {"by": "child"}
    store.put("loss", {"n": 2}, {"by": "parent"})
    assert again(store).get("loss", {"n": 2}) == {"by": "parent"}


def test_a_file_that_is_taken_away_is_made_anew(store):
    store.put("loss", {"n": 0}, {"nats": 1.0})
    for path in store.folder.iterdir():
        path.unlink()
    store.put("loss", {"n": 1}, {"nats": 2.0})
    assert store.get("loss", {"n": 0}) is None
    assert again(store).get("loss", {"n": 1}) == {"nats": 2.0}


def test_a_kill_loses_at_most_the_record_in_flight(store):
    before = 0
    for round_ in range(2):
        killed, other = start(store, f"killed{round_}"), start(store, f"other{round_}", 20)
        time.sleep(0.05 + 0.03 * round_)
        killed.send_signal(signal.SIGKILL)
        said = [int(line) for line in killed.communicate()[0].splitlines()]
        other.communicate()
        assert other.returncode == 0
        assert records(store, f"other{round_}") == list(range(20))
        kept = records(store, f"killed{round_}")
        assert kept == list(range(len(kept)))
        assert len(said) <= len(kept) <= len(said) + 1
        entries = [store.find("loss", {"n": number}) for number in range(7)]
        assert all(len(entry.value["long"]) == 30_000 for entry in filter(None, entries))
        total = len(store.journal("trials", {"model": "m"}).read())
        assert total >= before + 20
        before = total


def test_what_an_earlier_version_kept_is_not_found(tmp_path, monkeypatch):
    """Hashes of files as well, which shards of anybody could write."""
    with monkeypatch.context() as patch:
        patch.setattr("shallower.store.store._FORMAT", ["shallower.store", 1])
        for kind in ("loss", "files"):
            Store(tmp_path).put(kind, INPUTS, {"n": 1})
        Store(tmp_path).journal("trials", INPUTS).append({"n": 1})
        assert Store(tmp_path).get("files", INPUTS) == {"n": 1}
    assert Store(tmp_path).get("loss", INPUTS) is Store(tmp_path).get("files", INPUTS) is None
    assert Store(tmp_path).journal("trials", INPUTS).read() == []


def test_what_is_offered_is_kept_once_it_is_asked_for(tmp_path):
    given, store = Store(tmp_path / "given"), Store(tmp_path / "store")
    for kind in ("loss", "tasks", "files"):
        given.put(kind, INPUTS, {"kind": kind})
    given.journal("trials", INPUTS).append({"n": 1})
    rows = given._rows("SELECT key, kind, made, value, checksum FROM measurements")
    every = [[one.decode() if isinstance(one, bytes) else one for one in row] for row in rows]
    assert [row[1] for row in every] == ["loss", "tasks", "files"]
    store.offer({**given.give({}), "measurements": every})
    assert store.usage() == []
    assert store.get("loss", INPUTS) == {"kind": "loss"}
    assert store.journal("trials", INPUTS).read() == [{"n": 1}]
    assert store.get("files", INPUTS) is None
    kept = Store(tmp_path / "store")
    assert kept.get("loss", INPUTS) == {"kind": "loss"}
    assert kept.get("tasks", INPUTS) is None
    assert [kind for kind, *_ in kept.usage()] == ["loss", "trials"]
    store.take({"measurements": every})
    assert [kind for kind, *_ in kept.usage()] == ["loss", "tasks", "trials"]

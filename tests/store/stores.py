"""Stores for tests: damaged ones, and processes that write to one."""

import sqlite3
import subprocess
import sys

from shallower.store.store import STORE_FILE, Store

INPUTS = {"model": "0" * 64, "texts": ["a", "b"], "dtype": "float32", "dropped": [3, 4]}


def path_of(store):
    return store.folder / STORE_FILE


def again(store):
    """The same store, as another process would open it."""
    return Store(store.folder)


def break_file(store, damage):
    """Make the file one that cannot be used; give what is to be done when it is over."""
    path = path_of(store)
    if damage == "a folder":
        path.mkdir(parents=True)
        return path.rmdir
    if damage == "a folder that is a file":
        store.folder.write_text("dear to someone")
        return store.folder.unlink
    if damage == "not a database":
        path.parent.mkdir(parents=True)
        path.write_bytes(b"dear to someone" * 400)
        return path.unlink
    store.put("loss", INPUTS, {"nats": 1.0})
    store._close()
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:5000])
        return path.unlink
    other = sqlite3.connect(path, isolation_level=None)
    if damage == "locked":
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
    elif damage == "newer":
        other.execute("PRAGMA user_version = 77")
    elif damage == "of another program":
        other.execute("PRAGMA application_id = 77")
    elif damage == "without tables":
        other.execute("DROP TABLE measurements")
        other.execute("DROP TABLE records")
    return other.close


DAMAGES = (
    "a folder", "a folder that is a file", "not a database", "cut off", "locked", "newer",
    "of another program", "without tables",
)  # fmt: skip


WRITER = """
import sys
from pathlib import Path
from shallower.store.store import Store
store = Store(Path(sys.argv[1]))
journal = store.journal("trials", {"model": "m"})
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    store.put("loss", {"n": number % 7}, {"by": sys.argv[2], "long": "x" * 30_000})
    journal.append({"by": sys.argv[2], "n": number, "long": "x" * 30_000})
    print(number, flush=True)
"""


def start(store, name, count=10**9, quiet=False):
    code = WRITER.replace("    print", "    # print") if quiet else WRITER
    command = [sys.executable, "-W", "error", "-c", code, str(store.folder), name, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def records(store, name):
    return [r["n"] for r in store.journal("trials", {"model": "m"}).read() if r["by"] == name]

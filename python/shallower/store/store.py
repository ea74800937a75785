"""The store: what was measured on the same model, texts and settings is not measured again.

A hash of all that a measurement depends on finds it, so nothing becomes stale. One SQLite file
serves several processes; it also has records of interrupted work, and outlives any crash. Its
errors end no work: one warning, and the work goes on without it. No value from it is used as a path
or a size before it is checked.
"""

import json
import os
import sqlite3
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock
from time import monotonic, sleep, time
from typing import Any

from ..errors import CacheError, why
from ..values.provenance import hash_of
from ..values.schema import of_type

FOLDER_VARIABLE = "SHALLOWER_CACHE"
"""The variable that names the folder of the store."""

STORE_FILE = "store.sqlite"

BUSY_SECONDS = 10.0
"""How long one access waits for other processes at most."""

_FORMAT = ["shallower.store", 2]
"""In every key: with another number nothing is found that was kept before."""

_APPLICATION = 0x5368616C  # "Shal": marks the file as ours
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE measurements"
    " (key TEXT PRIMARY KEY, kind TEXT, made INTEGER, value TEXT, checksum TEXT)",
    "CREATE TABLE records (number INTEGER PRIMARY KEY,"
    " key TEXT, kind TEXT, made INTEGER, value TEXT, checksum TEXT)",
    "CREATE INDEX records_by_key ON records (key)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_FIND = "SELECT made, value, checksum FROM measurements WHERE key = ?"
_PUT = "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?)"
_READ = "SELECT made, value, checksum FROM records WHERE key = ? ORDER BY number"
_APPEND = "INSERT INTO records (key, kind, made, value, checksum) VALUES (?, ?, ?, ?, ?)"
_OF_FILES = "files"
"""The kind of entries of the files of this machine, which no other one gives."""

_GIVEN = (
    "SELECT rowid, key, kind, made, value, checksum FROM {} WHERE rowid > ? "
    f"AND kind != '{_OF_FILES}'"
)
_TAKEN = {
    "measurements": "INSERT OR IGNORE INTO measurements VALUES (?, ?, ?, ?, ?)",
    "records": "INSERT INTO records (key, kind, made, value, checksum) SELECT ?1, ?2, ?3, ?4, ?5"
    " WHERE NOT EXISTS (SELECT * FROM records WHERE key = ?1 AND checksum = ?5)",
}
"""How entries of another store are kept, by their table; those that are there stay."""
_USAGE = """
SELECT kind, COUNT(*), SUM(LENGTH(value)), MIN(made), MAX(made) FROM (
    SELECT kind, made, value FROM measurements UNION ALL SELECT kind, made, value FROM records
) WHERE TYPEOF(kind) = 'text' AND TYPEOF(made) = 'integer' AND made BETWEEN 0 AND 253402300799
GROUP BY kind ORDER BY kind
"""
_NETWORKS = (
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse",
    "gluster",
    "gpfs",
    "lustre",
    "nfs",
    "smb",
    "virtiofs",
)
"""How the types of file systems begin whose machines share no memory, which WAL needs."""

_NOT_CLEARED = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_AUTH,
)
"""Errors of a file that is whole; with any other it is removed instead of emptied."""


def store_folder() -> Path | None:
    """Find the store's folder, which need not exist; None without a home.

    ``SHALLOWER_CACHE``, else ``shallower`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    own, shared = os.environ.get(FOLDER_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        caches = Path(shared) if shared else Path.home() / ".cache"
        return caches.absolute() / "shallower"
    except RuntimeError:
        return None


def open_store(no_cache: bool = False, *, dry_run: bool = False) -> "Store":
    """Open this user's store, or one that caches nothing; a dry run makes no new one."""
    folder = None if no_cache else store_folder()
    is_there = folder is not None and (folder / STORE_FILE).is_file()
    return Store(folder if is_there or not dry_run else None)


Entries = dict[str, list[list[Any]]]
"""Rows by their table, as plain JSON values: key, kind, when it was made, value and checksum."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A measurement as plain JSON values, and when it was made, in ISO 8601."""

    value: dict[str, Any]
    made: str


class Store:
    """Measurements by what they depend on, and records of work.

    Every method takes ``inputs``: plain JSON values that hold all that the result depends on, or
    None where that is not known, and then nothing is found and nothing kept.

    Attributes:
        folder: where its file lies, made with the first entry; None for a store that is off.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._path = (folder or Path()) / STORE_FILE
        self._is_off = folder is None
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, ...] | None = None
        self._opening = Lock()
        self._offered: dict[str, list[tuple[str, list[Any]]]] = {}

    def __del__(self) -> None:
        self._close()

    def key(self, kind: str, inputs: Mapping[str, Any]) -> str:
        """Hash what a result depends on."""
        return hash_of([_FORMAT, kind, inputs])

    def get(self, kind: str, inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Look up the value of a measurement."""
        entry = self.find(kind, inputs)
        return None if entry is None else entry.value

    def find(self, kind: str, inputs: Mapping[str, Any] | None) -> Entry | None:
        """Look up a measurement, and when it was made."""
        if self._is_off or inputs is None:
            return None
        found = self._entries(_FIND, self._accepted(kind, inputs), kind)
        return found[0] if found else None

    def put(self, kind: str, inputs: Mapping[str, Any] | None, value: Mapping[str, Any]) -> None:
        """Keep a measurement, in place of one of the same inputs."""
        if not self._is_off and inputs is not None:
            self._write(_PUT, self.key(kind, inputs), kind, value)

    def journal(self, kind: str, inputs: Mapping[str, Any] | None) -> "Journal | None":
        """Open the records of work that may be interrupted; None if nothing is kept."""
        if self.folder is None or inputs is None:
            return None
        return Journal(self, self._accepted(kind, inputs), kind)

    def give(self, behind: dict[str, int]) -> Entries:
        """Give the entries behind the rows that ``behind`` numbers, and number the last there.

        Not those of the files of this machine.
        """
        found: Entries = {}
        for table in _TAKEN if self.folder is not None else ():
            rows = self._rows(_GIVEN.format(table), behind.get(table, 0))
            behind[table] = max([behind.get(table, 0), *(row[0] for row in rows)])
            found[table] = [
                [one.decode() if isinstance(one, bytes) else one for one in row[1:]] for row in rows
            ]
        return found

    def take(self, entries: Any) -> None:
        """Keep entries that a worker's store gave; CacheError, and none is kept, if one is damaged.

        Those of the files of a machine are left out.
        """
        self._keep(_given(entries))

    def offer(self, entries: Any) -> None:
        """Hold a shard's entries, which anybody may have written: one is kept once its key is used.

        CacheError, and none is held, if one is damaged.
        """
        for query, row in _given(entries):
            self._offered.setdefault(row[0], []).append((query, row))

    def _accepted(self, kind: str, inputs: Mapping[str, Any]) -> str:
        """The key of what is asked for, kept now if it is offered."""
        key = self.key(kind, inputs)
        self._keep([(query, row) for query, row in self._offered.pop(key, ()) if row[1] == kind])
        return key

    def _keep(self, rows: Iterable[tuple[str, Sequence[Any]]]) -> None:
        for query, row in rows:
            self._run(query, *row)

    def usage(self) -> list[tuple[str, int, int, int, int]]:
        """Count entries by kind, with their bytes, and when the first and the last were made."""
        return [(kind.decode(errors="replace"), *rest) for kind, *rest in self._rows(_USAGE)]

    # The file: opened when it is first needed, and no reason for the work to end.
    def _entries(self, query: str, key: str, kind: str) -> list[Entry]:
        """Read entries; those that are damaged are left out, and a warning says so."""
        found = [_entry(key, kind, *row) for row in self._rows(query, key)]
        if None in found:
            warnings.warn(
                f"a {kind} in the store {self._path} is damaged and not used (shallower cache "
                f"--clear removes all)",
                stacklevel=1,
            )
        return [entry for entry in found if entry is not None]

    def _write(self, query: str, key: str, kind: str, value: Mapping[str, Any]) -> None:
        """Write one entry, whole or not at all."""
        text, made = json.dumps(value, separators=(",", ":")), int(time())
        self._run(query, key, kind, made, text, _checksum(key, kind, made, text))

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read rows; none where the file is not there or cannot be used."""
        return self._run(query, *values) if os.path.lexists(self._path) else []

    def _run(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        if self._is_off:
            return []
        try:
            return self._waiting(query, values)
        except (sqlite3.Error, OSError) as error:
            self._is_off = True  # rather than to wait for a lock again and again
            # From one line and in the same words, so that it is shown once.
            warnings.warn(
                f"the store {self._path} cannot be used ({why(error)}): the work goes on, and "
                f"nothing is found or kept (shallower cache --clear empties it, --no-cache leaves "
                f"it alone)",
                stacklevel=1,
            )
            return []

    def _waiting(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Run a query, waiting for others also where SQLite does not: while one makes the file."""
        deadline = monotonic() + BUSY_SECONDS
        while True:
            try:
                return self._connected().execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or monotonic() > deadline:
                    raise
            sleep(0.01)

    def _connected(self) -> sqlite3.Connection:
        """The connection of this process to the file that is there now, opened by one thread."""
        with self._opening:
            if self._connection is None or self._opened != self._mark():
                self._close()
                self._connection = _open(self._path)
                self._opened = self._mark()
            return self._connection

    def _mark(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return os.getpid(), status.st_dev, status.st_ino

    def _close(self) -> None:
        if self._connection is not None and self._opened:
            if self._opened[0] == os.getpid():
                self._connection.close()
            else:
                _INHERITED.append(self._connection)
        self._connection = None

    def clear(self) -> int:
        """Remove all entries, and count the bytes of their values.

        Other processes may use the store meanwhile. A damaged file is removed. Raises CacheError
        if the file is held, is not ours, or cannot be written.
        """
        if self.folder is None or not os.path.lexists(self._path):
            return 0
        try:
            with closing(_open(self._path)) as connection:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    freed = sum(row[2] for row in connection.execute(_USAGE))
                    connection.execute("DELETE FROM measurements")
                    connection.execute("DELETE FROM records")
                with suppress(sqlite3.OperationalError):  # others read: the pages are used again
                    connection.execute("VACUUM")
            return freed
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if isinstance(error, sqlite3.NotSupportedError | OSError) or code in _NOT_CLEARED:
                raise CacheError(f"cannot clear the store {self._path}: {error}") from error
            return self._remove()

    def _remove(self) -> int:
        self._close()
        freed = self._path.lstat().st_size
        for suffix in ("-wal", "-shm", "-journal", ""):
            try:
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(f"cannot remove the damaged store: {error}") from error
        return freed


def _given(entries: Any) -> list[tuple[str, list[Any]]]:
    """Entries as :meth:`Store.give` gave them, each with the query that keeps it; CacheError."""
    try:
        rows = [(_TAKEN[table], row) for table, found in entries.items() for row in found]
        whole = all(_checksum(*row[:4]) == row[4] and len(row) == 5 for _, row in rows)
        rows = [(query, row) for query, row in rows if row[1] != _OF_FILES]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CacheError("these are no entries of a store") from error
    if not whole:
        raise CacheError("an entry is damaged: it has not the checksum that it was made with")
    return rows


class Journal:
    """The records of one piece of work, in the order in which they were appended."""

    def __init__(self, store: Store, key: str, kind: str) -> None:
        self._store, self._key, self._kind = store, key, kind

    def read(self) -> list[dict[str, Any]]:
        """Give all records that were appended, by this process or another."""
        return [entry.value for entry in self._store._entries(_READ, self._key, self._kind)]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which is there whole after any death of the process, or not at all."""
        self._store._write(_APPEND, self._key, self._kind, record)


_INHERITED: list[sqlite3.Connection] = []
"""Connections of the process that this one was forked from, which it must not even close."""


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _open(path: Path) -> sqlite3.Connection:
    """Open the file, new or old, ready to use by any thread; a statement is a transaction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=sqlite3.threadsafety < 3
    )
    try:
        connection.text_factory = bytes
        connection.execute("PRAGMA trusted_schema = OFF")
        if _marks(connection) != (_APPLICATION, _VERSION):
            _lay_out(connection)
        _choose_mode(connection, path.parent)
    except BaseException:
        connection.close()
        raise
    return connection


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _marks(connection: sqlite3.Connection) -> tuple[int, int]:
    return _pragma(connection, "application_id"), _pragma(connection, "user_version")


def _lay_out(connection: sqlite3.Connection) -> None:
    """Make the tables, unless another process just did; refuse a file that is not ours."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        application, version = _marks(connection)
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if application != _APPLICATION and (application or tables):
            raise sqlite3.NotSupportedError("it belongs to another program")
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError("it was made by another version of shallower")
        if not tables:
            for statement in _SCHEMA:
                connection.execute(statement)


def _choose_mode(connection: sqlite3.Connection, folder: Path) -> None:
    """Write ahead to a log (WAL), which a kill cannot hurt; where that cannot be, to a journal."""
    is_shared = file_system(folder).startswith(_NETWORKS)
    if is_shared and folder == store_folder():
        warnings.warn(
            f"the store lies on a network folder ({folder}), where it is slow, without a log: "
            f"the variable {FOLDER_VARIABLE} names another one",
            stacklevel=1,
        )
    if is_shared and _pragma(connection, "journal_mode") == b"wal":
        _pragma(connection, "journal_mode = DELETE")
    if not is_shared and _pragma(connection, "journal_mode") != b"wal":
        with suppress(sqlite3.OperationalError):  # the file system cannot: the journal stays
            _pragma(connection, "journal_mode = WAL")
    if _pragma(connection, "journal_mode") == b"wal":
        # Only a loss of power can take the last entries, and it damages none.
        connection.execute("PRAGMA synchronous = NORMAL")


def file_system(folder: Path) -> str:
    """Name the type of the file system that a folder lies on; empty where that is not known."""
    found = (0, "")
    with suppress(OSError, ValueError, IndexError):
        place = folder.resolve()
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            mount, _, kind = line.partition(" - ")
            top = mount.split()[4].encode(errors="surrogateescape").decode("unicode_escape")
            if place.is_relative_to(top) and len(top) >= found[0]:
                found = len(top), kind.split()[0]
    return found[1]


def _checksum(key: str, kind: str, made: int, text: str) -> str:
    return hash_of([key, kind, made, text])


def _entry(key: str, kind: str, made: Any, text: Any, checksum: Any) -> Entry | None:
    """An entry from its row; None if it is damaged."""
    try:
        value = text.decode("ascii")
        if checksum.decode("ascii") != _checksum(key, kind, made, value):
            return None
        moment = datetime.fromtimestamp(made).astimezone()
        return Entry(of_type(dict, json.loads(value)), moment.isoformat(timespec="seconds"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None

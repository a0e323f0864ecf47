"""Each cell of a comparison is committed exactly once.

A worker that dies at any instant loses at most the cell it was running: the kernel frees its
claim, and what it committed stays. Execution may repeat, the commit may not::

    for key in ledger.pending():
        with ledger.claim(key) as mine:
            if mine:
                ledger.commit(key, run(key))
"""

import fcntl
import hashlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from envs.errors import BadInput, RunFailed

_PATIENCE = 120.0  # seconds to wait for another process that holds the database
_MARK = (0x53544552, 1)  # application id, "STER", and version of the schema
_SCHEMA = (
    "CREATE TABLE cells (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE,"
    " description TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'planned',"
    " outcome TEXT, sha256 TEXT, failures INTEGER NOT NULL DEFAULT 0, reason TEXT)",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"PRAGMA application_id = {_MARK[0]}",
    f"PRAGMA user_version = {_MARK[1]}",
)
_PLAN = "INSERT OR IGNORE INTO cells (key, description) VALUES (?, ?)"
_COMMIT = "UPDATE cells SET status='done', outcome=?, sha256=? WHERE key=? AND status != 'done'"
_FAIL = "UPDATE cells SET failures=failures+1, reason=? WHERE key=? AND status != 'done'"
_BAD_FILE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_FLOAT = "$float"
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


# A claim dies with its worker, and does not live on in a process that the worker forked.
os.register_at_fork(after_in_child=_let_go)


def key_of(description: Mapping[str, Any]) -> str:
    """Sha256 of the canonical JSON of ``description``: the same cell has the same key."""
    return _sha256(_to_json(description))


class Ledger:
    """The cells of one comparison in an SQLite file on a local disk, for any number of processes.

    Raises `BadInput` where the file cannot be a ledger, and `RunFailed` where something outside
    stops a method (disk full, locked, turned read-only); what was committed stays. Values are
    JSON in which NaN and the infinities survive, as ``{"$float": "nan"}``; tuples become lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks = Path(f"{path}.locks")
        try:
            if path.exists():
                if not path.is_file():
                    raise BadInput(f"{path}: not a regular file; name a new file or a ledger")
                with self._transaction() as database:  # Nothing is written to a stranger's.
                    self._is_new(database)
            self._locks.mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{path}: {reason}; name a file in a folder you may write to") from error
        with self._lock("schema", fcntl.LOCK_EX):
            with self._transaction("rwc") as database:
                for statement in _SCHEMA if self._is_new(database) else ():
                    database.execute(statement)
            with self._open("rw") as database:
                _let_read(database)

    def plan(self, cells: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Add the cells that are not there yet, all or none; how many were added."""
        rows, added = [(key, _to_json(description)) for key, description in cells], 0
        with self._transaction() as database:
            for key, text in rows:
                added += database.execute(_PLAN, (key, text)).rowcount
                if self._cell(database, key, "description") != text:
                    raise BadInput(f"{self.path}: cell {key!r} was planned otherwise; rename it")
        return added

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the cell is this caller's to run, until the block or the process ends.

        False at once when another caller has it, or when it is done.
        """
        with self._lock(_sha256(key), fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            with self._transaction() as database:
                done = self._cell(database, key, "status") == "done"
            yield free and not done

    def commit(self, key: str, outcome: Mapping[str, Any]) -> bool:
        """Store the outcome for good; False, and nothing changes, when the cell has one."""
        text = _to_json(outcome)
        with self._transaction() as database:
            self._cell(database, key, "status")
            return database.execute(_COMMIT, (text, _sha256(text), key)).rowcount == 1

    def fail(self, key: str, reason: str) -> None:
        """Record a failed attempt; the cell stays pending. Nothing changes when it is done."""
        with self._transaction() as database:
            self._cell(database, key, "status")
            database.execute(_FAIL, (reason, key))

    def pending(self) -> list[str]:
        """Keys of the cells without an outcome, in plan order."""
        return [key for (key,) in self._rows("key", "status != 'done'")]

    def failures(self) -> dict[str, tuple[int, str]]:
        """How often each cell that is still pending failed, and the last reason."""
        rows = self._rows("key, failures, reason", "status != 'done' AND failures > 0")
        return {key: (count, reason) for key, count, reason in rows}

    def outcomes(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """``(key, description, outcome)`` of each cell that is done, in plan order."""
        rows = self._rows("key, description, outcome, sha256", "status = 'done'")
        for key, description, outcome, checksum in rows:
            if _sha256(outcome) != checksum:
                raise BadInput(f"{self.path}: outcome of {key!r} is damaged; restore a copy")
            yield key, _from_json(description), _from_json(outcome)

    def set_meta(self, name: str, value: Any) -> None:
        """Store a value about the whole comparison, in place of the one before."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, _to_json(value)))

    def meta(self, name: str) -> Any:
        """The value stored under ``name``, or None."""
        with self._transaction() as database:
            row = database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return None if row is None else _from_json(row[0])

    @contextmanager
    def _lock(self, name: str, how: int) -> Iterator[bool]:
        try:
            lock = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFailed(f"{self._locks}: {error.strerror}; mend that, run again") from error
        _held.add(lock)
        free = False
        try:
            with suppress(BlockingIOError):
                fcntl.flock(lock, how)
                free = True
            yield free
        finally:
            if lock in _held:
                _held.remove(lock)
                os.close(lock)

    def _is_new(self, database: sqlite3.Connection) -> bool:
        queries = ("PRAGMA application_id", "PRAGMA user_version", "PRAGMA schema_version")
        mark, version, schema = (database.execute(query).fetchone()[0] for query in queries)
        if (mark, version) != _MARK and (mark or version or schema):
            kind = f"a ledger of version {version}" if mark == _MARK[0] else "another program's"
            raise BadInput(f"{self.path}: {kind}; name a new file or one of this version")
        return (mark, version) != _MARK

    def _cell(self, database: sqlite3.Connection, key: str, column: str) -> Any:
        row = database.execute(f"SELECT {column} FROM cells WHERE key=?", (key,)).fetchone()
        if row is None:
            raise BadInput(f"{self.path}: no cell {key!r}; plan it first")
        return row[0]

    def _rows(self, columns: str, condition: str) -> list[Any]:
        query = f"SELECT {columns} FROM cells WHERE {condition} ORDER BY position"
        with self._transaction() as database:
            return database.execute(query).fetchall()

    @contextmanager
    def _transaction(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        with self._open(mode) as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")  # Closed without it, the database rolls back.

    @contextmanager
    def _open(self, mode: str) -> Iterator[sqlite3.Connection]:
        """Opened anew by each method: a connection of SQLite must not cross a fork."""
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            connection = sqlite3.connect(uri, _PATIENCE, isolation_level=None, uri=True)
            with closing(connection) as database:
                database.execute("PRAGMA synchronous = FULL")
                yield database
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BAD_FILE:  # & drops the details
                raise BadInput(f"{self.path}: {error}; restore or rename it") from error
            raise RunFailed(f"{self.path}: {error}; mend that and run again") from error


def _let_read(database: sqlite3.Connection) -> None:
    """Readers beside a writer from now on (WAL).

    SQLite does not wait here for one who is about to write, as who only looks at the file is.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _to_json(value: Any) -> str:
    return json.dumps(_strict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        if _FLOAT in value or not all(isinstance(name, str) for name in value):
            raise TypeError(f"keys {list(value)!r:.80}; use strings other than {_FLOAT!r}")
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def _from_json(text: str) -> Any:
    return json.loads(text, object_hook=lambda d: float(d[_FLOAT]) if _FLOAT in d else d)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

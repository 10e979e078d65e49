"""What a node must not forget, in SQLite (ADR 4): write here first, then send.

One table of records, each a value under (kind, key) with a generation: a write with a lower generation than the stored one changes
nothing, so replays and late messages are harmless.  WAL with `synchronous=FULL` makes each commit survive a power loss; writes
that arrive while a commit is under way share the next one (grouped commits), because an fsync costs more than a record.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.errors import CorruptFileError, InvalidRequestError, SettingsError, ShoalError, StorageFullError

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
    kind TEXT NOT NULL, key TEXT NOT NULL, generation INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID
"""
_UPSERT = """
INSERT INTO record (kind, key, generation, value) VALUES (?, ?, ?, ?)
ON CONFLICT (kind, key) DO UPDATE SET generation = excluded.generation, value = excluded.value
WHERE excluded.generation >= record.generation
"""


_MOST = 2**63 - 1
_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})
"""A shared memory file that finds no room is an I/O error."""
_NOT_OURS = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})


class _Write(msgspec.Struct):
    statement: str
    arguments: tuple[object, ...]
    done: threading.Event
    error: Exception | None = None


class Journal:
    """Durable records of one node; safe to use from several threads.  Values are frozen Structs, stored as JSON."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        """Open or create; raises CorruptFileError when the file is not a journal, else what ails its folder.

        One that is not *durable* survives the end of a process and not of the machine: for rehearsals.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._waiting: list[_Write] = []
        self._wake = threading.Condition()
        self._closed = False
        self.failed_writes = 0
        """Records that the disk did not take, since the start."""
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self._connection.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise _unopened(path, error) from error
        self._writer = threading.Thread(target=self._write_loop, name="journal", daemon=True)
        self._writer.start()

    def put(self, kind: str, key: str, value: msgspec.Struct, *, generation: int = 0) -> None:
        """Store *value*, durably, before returning; raises StorageFullError when the disk does not take it.

        Raises InvalidRequestError for a number that no database holds: others say numbers too.
        """
        if abs(generation) > _MOST:
            raise InvalidRequestError(f"{kind} {generation} is out of range", hint=f"at most {_MOST} can be kept")
        self._submit(_UPSERT, (kind, key, generation, msgspec.json.encode(value)))

    def remove(self, kind: str, key: str) -> None:
        """Forget a record; harmless when there is none."""
        self._submit("DELETE FROM record WHERE kind = ? AND key = ?", (kind, key))

    def get(self, kind: str, key: str, as_type: type[T]) -> T | None:
        """The record, or None when absent."""
        rows = self._read("SELECT value FROM record WHERE kind = ? AND key = ?", (kind, key))
        return msgspec.json.decode(rows[0], type=as_type) if rows else None

    def all(self, kind: str, as_type: type[T]) -> tuple[T, ...]:
        """Every record of a kind, by key."""
        rows = self._read("SELECT value FROM record WHERE kind = ? ORDER BY key", (kind,))
        return tuple(msgspec.json.decode(row, type=as_type) for row in rows)

    def next_number(self, name: str, *, above: int = 0) -> int:
        """A number higher than *above* and all before under *name*, durable: incarnations, fencing epochs."""
        with self._lock:
            kept = self.get("number", name, _Number)
            number = max(kept.value if kept else 0, above) + 1
            self.put("number", name, _Number(value=number), generation=number)
            return number

    def close(self) -> None:
        """Finish pending writes and close; harmless when repeated."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
        self._writer.join(timeout=10)
        self._connection.close()

    def _read(self, statement: str, arguments: Sequence[object]) -> list[bytes]:
        return [row[0] for row in self._connection.execute(statement, arguments).fetchall()]

    def _submit(self, statement: str, arguments: tuple[object, ...]) -> None:
        write = _Write(statement=statement, arguments=arguments, done=threading.Event())
        with self._wake:
            if self._closed:
                raise StorageFullError(f"journal {self._path} is closed", hint="the node is stopping")
            self._waiting.append(write)
            self._wake.notify_all()
        write.done.wait()
        if write.error is not None:
            self.failed_writes += 1
            raise StorageFullError(
                f"journal {self._path} did not take a record: {write.error}", hint="free disk space on this node"
            ) from write.error

    def _write_loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                batch, self._waiting = self._waiting, []
                if not batch:
                    return
            error = self._commit(batch)
            for write in batch:
                write.error = error
                write.done.set()

    def _commit(self, batch: Sequence[_Write]) -> Exception | None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                self._connection.execute(write.statement, write.arguments)
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 this thread must live: others wait for what it writes
            if self._connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            return error
        return None


def _unopened(path: Path, error: sqlite3.DatabaseError) -> ShoalError:
    """Whose move it is when a journal does not open: SQLite says it by the lower byte of its code."""
    code = error.sqlite_errorcode & 0xFF
    if code in _NO_ROOM:
        return StorageFullError(
            f"cannot write {path}: {error}",
            hint="free space on that disk (`shoal rm NAME`, `shoal gc`), or set SHOAL_HOME to a folder on a larger one",
        )
    if code in _NOT_OURS:
        return SettingsError(
            f"cannot write to home {path.parent}: {path.name}: {error}",
            hint="set SHOAL_HOME to a folder that you may write to",
            param="home",
        )
    return CorruptFileError(
        f"{path} is not a readable journal ({error})",
        hint="move it away: the node then starts without its last plan and asks the coordinator",
    )


class _Number(msgspec.Struct, frozen=True, kw_only=True):
    value: int

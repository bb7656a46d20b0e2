"""The SQLite file: opens it or says why not, writes records in transactions, reads everything back."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from scheduler_svc.journal.changes import CLEAR, changes
from scheduler_svc.journal.errors import FullError, JournalError, explained
from scheduler_svc.journal.file_lock import FileLock, Identity, identity
from scheduler_svc.journal.records import Record
from scheduler_svc.journal.restored import Restored, restore
from scheduler_svc.journal.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION

PAGE_BYTES = 4096
MIN_BYTES = 128 * 1024
"""Below it the empty tables are most of the file."""
WAL_PAGE_COUNT = 1000
"""From how many pages on the write-ahead log goes into the database and begins again at its start."""
BUSY_TIMEOUT_S = 5.0
"""How long somebody else's write transaction (a person with the sqlite3 command) is waited for."""
_DISK_RESERVE_BYTES = 1024 * 1024  # a disk with more than this left is not full
_SMALLEST_DATABASE_BYTES = 512


class Store:
    """One journal file, written by one process. Any thread may use it; one call runs at a time.

    A transaction survives the death of the process once `write` returns, but the machine's death only once SQLite has
    moved its log into the database (`synchronous=NORMAL`). The database never has more than `max_bytes`. Its log is a
    quarter of that, 4 MB at most, or as large as the largest transaction.
    """

    def __init__(self, path: Path, max_bytes: int, lock: FileLock) -> None:
        """See `open`."""
        self._path = path
        self._max_bytes = max_bytes
        self._lock = lock
        self._mutex = threading.RLock()
        self._connection = self._connect()
        self._identities = self._find_files()

    @classmethod
    def open(cls, path: str | os.PathLike[str], max_bytes: int) -> Store:
        """Open a journal, or make one where there is nothing. Raises `JournalError` and changes no other file."""
        path = Path(path).resolve()  # two names of one file are one journal
        if max_bytes < MIN_BYTES:
            raise JournalError(path, f"its limit of {max_bytes} bytes is too low", f"allow {MIN_BYTES} or more")
        if not path.parent.is_dir():
            raise JournalError(path, "its directory does not exist", "make it, or choose another path")
        if path.exists() and not path.is_file():
            raise JournalError(path, "it is not a file", "choose another path")
        with explained(path):
            lock = FileLock(path)
            try:
                return cls(path, max_bytes, lock)
            except BaseException:
                lock.release()
                raise

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Restored:
        """Read a journal without a lock and without writing; a scheduler may be using it. Raises `JournalError`."""
        path = Path(path).absolute()
        if not path.is_file():
            raise JournalError(path, "there is no such file", "choose another path")
        with explained(path), contextlib.closing(_connection(path, "ro")) as connection:
            return Restored() if _is_new(connection, path) else _restore(connection, path)

    # --- what is in it ------------------------------------------------------------------------------------------

    def write(self, records: Iterable[Record]) -> None:
        """Write all of `records` in one transaction, or nothing.

        Raises `JournalError` when that cannot be, `FullError` when it would take more than `max_bytes`.
        """
        with self._transaction():
            self._apply(records)

    def rewrite(self, records: Iterable[Record], epoch: int) -> None:
        """Replace everything by what `records` say, in one transaction, after whatever went wrong before.

        Makes the file again when it is gone. Raises what `write` raises.
        """
        with self._mutex, explained(self._path):
            self._reopen()
        with self._transaction():
            for statement in CLEAR:
                self._connection.execute(statement)
            self._connection.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'epoch'", (epoch,))
            self._apply(records)

    def load(self) -> Restored:
        """Everything that was written and not forgotten. Raises `JournalError` when it makes no sense."""
        with self._mutex:
            return _restore(self._connection, self._path)

    def next_epoch(self, now_ms: int) -> int:
        """An epoch above all before it, `now_ms` or later, safe on the disk itself. Raises `JournalError`."""
        with self._mutex:
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                with self._transaction():
                    (stored,) = self._connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
                    epoch = max(stored + 1, now_ms)
                    self._connection.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (epoch,))
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")
        return int(epoch)

    @property
    def byte_count(self) -> int:
        """What the database and its log take on the disk; room inside that is used again counts."""
        total = 0
        for path in (self._path, self._wal_path):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def close(self) -> None:
        """Move the log into the database and let another scheduler have the file."""
        with self._mutex, contextlib.suppress(sqlite3.Error):
            self._connection.close()
        self._lock.release()

    # --- transactions -------------------------------------------------------------------------------------------

    def _apply(self, records: Iterable[Record]) -> None:
        for record in records:
            for statement, rows in changes(record):
                self._connection.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit what the body does, or nothing of it."""
        with self._mutex, explained(self._path):
            self._check_files()
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:  # SQLite has rolled back by itself after some errors
                    self._connection.execute("ROLLBACK")
                if self._is_own_limit(error):
                    raise FullError(self._path, self._max_bytes) from error
                raise

    def _is_own_limit(self, error: BaseException) -> bool:
        """Whether it was `max_bytes` that stopped us: SQLite says the same of a disk that is full."""
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            return False
        return shutil.disk_usage(self._path.parent).free > _DISK_RESERVE_BYTES

    # --- the file -----------------------------------------------------------------------------------------------

    @property
    def _wal_path(self) -> Path:
        return Path(f"{self._path}-wal")

    def _find_files(self) -> dict[Path, Identity | None]:
        return {path: identity(path) for path in (self._path, self._wal_path, self._lock.path)}

    def _check_files(self) -> None:
        """Raise when a file was removed or replaced: nobody would ever find what is written to it."""
        for path, known in self._identities.items():
            if identity(path) != known:
                raise JournalError(
                    self._path, f"'{path.name}' was removed or replaced", "leave its files alone while a scheduler runs"
                )

    def _reopen(self) -> None:
        """Begin again with the file that is at the path now."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        if not self._lock.is_in_place:
            lock = FileLock(self._path)
            self._lock.release()
            self._lock = lock
        self._connection = self._connect()
        self._identities = self._find_files()

    def _connect(self) -> sqlite3.Connection:
        if not self._path.exists():
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # prompts are nobody else's business
        connection = _connection(self._path, "rw")
        try:
            is_new = _is_new(connection, self._path)  # before anything is written to a file that may not be ours
            self._configure(connection)
            if is_new:
                _create(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _configure(self, connection: sqlite3.Connection) -> None:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise JournalError(self._path, "its file system cannot share memory", "choose a path on a local disk")
        max_page_count = self._max_bytes // PAGE_BYTES
        wal_page_count = min(WAL_PAGE_COUNT, max_page_count // 4)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA max_page_count = {max_page_count}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {wal_page_count}")
        connection.execute(f"PRAGMA journal_size_limit = {wal_page_count * PAGE_BYTES}")
        # Some builds write zeroes over all that is deleted: a checkpoint would cost as much as all steps before it.
        connection.execute("PRAGMA secure_delete = FAST")


def _connection(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path))}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _restore(connection: sqlite3.Connection, path: Path) -> Restored:
    try:
        return restore(connection)
    except (KeyError, TypeError, ValueError) as error:  # somebody has written to it who is not a scheduler
        raise JournalError(path, f"it is damaged ({error})", "choose another path, or move the file away") from error


def _is_new(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty. Raises `JournalError` when it holds anything but a journal of our version."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (object_count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id == 0 and object_count == 0:
        if 0 < path.stat().st_size < _SMALLEST_DATABASE_BYTES:  # SQLite would take it for an empty one
            raise JournalError(path, "it is not an SQLite database", "choose another path")
        return True
    if application_id != APPLICATION_ID:
        raise JournalError(path, "it is a database of something else", "choose another path")
    (version,) = connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    if version != SCHEMA_VERSION:
        raise JournalError(
            path,
            f"its tables are of version {version}, and this release has version {SCHEMA_VERSION}",
            "start the release that made it, or move the file away: what it holds is forgotten then",
        )
    return False


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('schema', ?), ('epoch', 0)", (SCHEMA_VERSION,))
    connection.execute("COMMIT")

"""Why a journal cannot be used, in words that an operator can act on."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MOVE_AWAY = "choose another path, or move the file away: what it holds is forgotten then"

# Primary result code of SQLite -> the reason, and the way out.
_REASONS = {
    sqlite3.SQLITE_NOTADB: ("it is not an SQLite database", "choose another path"),
    sqlite3.SQLITE_CORRUPT: ("it is damaged", _MOVE_AWAY),
    sqlite3.SQLITE_CANTOPEN: ("it cannot be opened", "let this user write the file and its directory"),
    sqlite3.SQLITE_READONLY: ("it is read-only", "let this user write the file and its directory"),
    sqlite3.SQLITE_PERM: ("access is not permitted", "let this user write the file and its directory"),
    sqlite3.SQLITE_BUSY: ("another program is writing to it", "end that program"),
    sqlite3.SQLITE_FULL: ("the disk is full", "free some space, or choose a path on another disk"),
    sqlite3.SQLITE_IOERR: ("its disk failed", "look at the system's log, or choose a path on another disk"),
}


class JournalError(Exception):
    """A journal that cannot be used. The message names the path, the reason and the way out."""

    def __init__(self, path: Path, reason: str, way_out: str) -> None:
        """Put the message together."""
        super().__init__(f"cannot use the journal '{path}': {reason}; {way_out}")


class FullError(JournalError):
    """The journal has reached its own limit; forgetting something makes room."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Put the message together."""
        super().__init__(
            path, f"it has reached its limit of {max_bytes} bytes", "raise the limit, or keep results for less time"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into `JournalError`. What only a bug of ours can cause stays as it is."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError):
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest is SQLite's detail
        reason, way_out = _REASONS.get(code, ("SQLite refuses it", _MOVE_AWAY))
        raise JournalError(path, f"{reason} ({error})", way_out) from error
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _, way_out = _REASONS[sqlite3.SQLITE_FULL if is_full else sqlite3.SQLITE_CANTOPEN]
        raise JournalError(path, error.strerror or str(error), way_out) from error

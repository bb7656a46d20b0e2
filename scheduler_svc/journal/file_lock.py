"""Whose file it is: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from scheduler_svc.journal.errors import JournalError

Identity = tuple[int, int]
"""Device and inode: which file is at a path."""


class FileLock:
    """The right to write a journal, held through a file beside it that stays there when nobody holds it."""

    def __init__(self, journal_path: Path) -> None:
        """Take the lock. Raises `JournalError` when another scheduler has it, `OSError` when there can be none."""
        self._journal_path = journal_path
        self.path = Path(f"{journal_path}.lock")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise JournalError(
                journal_path,
                f"another scheduler (process {owner}) is using it",
                "end that one, or give this one a journal of its own",
            ) from None
        with contextlib.suppress(OSError):  # a full disk; the number is only for the message above
            os.truncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())

    @property
    def is_in_place(self) -> bool:
        """Whether the lock is still found at its path, so that others run into it."""
        status = os.fstat(self._file)
        return identity(self.path) == (status.st_dev, status.st_ino)

    def release(self) -> None:
        """Let another scheduler have the journal."""
        os.close(self._file)


def identity(path: Path) -> Identity | None:
    """Which file is there; None when there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino

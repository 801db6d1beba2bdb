"""Room on the disk for what the agent itself has to write, and what a full disk is called.

A step that fills the disk must not take the agent's memory with it. So the journal's files hold room of their own
(`preallocate`), a file beside them holds more that can be given up at any time (`ReserveFile`), and what still can't
be written becomes a clear, temporary error of whoever needed it (`disk_errors`).
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outrider.errors import TemporaryError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
# A file that can't grow: ENOSPC is FULL, other refusals of a write (a quota's among them) are IOERR_WRITE, and the
# index of the write-ahead log has a code of its own. Source: https://sqlite.org/rescode.html, os_unix.c.
_SQLITE_OUT_OF_SPACE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether ``error`` (of the system, or of SQLite) says that the disk has no room."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) in _SQLITE_OUT_OF_SPACE
    return isinstance(error, OSError) and error.errno in _OUT_OF_SPACE


def could_be_out_of_space(error: sqlite3.Error) -> bool:
    """Whether ``error`` may be that of a full disk: a file that can't be made is told like one that can't be opened."""
    return is_out_of_space(error) or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CANTOPEN


def disk_full(doing: str, path: Path | None = None, free: int = 0) -> TemporaryError:
    """The error of an operation that needs room which is not there; ``doing`` reads like "prepare step a"."""
    where = f" at {path} ({free // 1024} KiB left)" if path else ""
    return TemporaryError(
        f"the node's disk{where} is full: can't {doing}", code="disk_full", hint="free some space on the node"
    )


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turns "no space left" of the body into `disk_full`; other errors pass."""
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise disk_full(doing) from error
        raise


def free_bytes(path: Path) -> int:
    """What the agent's user can still write on the disk of ``path``."""
    found = os.statvfs(path)
    return found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)


class ReserveFile:
    """A file of ``size_bytes`` that only holds room, until somebody needs that room more."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self.size_bytes = size_bytes

    @property
    def held(self) -> bool:
        """Whether it is there in full."""
        with suppress(OSError):
            return self._path.stat().st_size >= self.size_bytes
        return False

    def keep(self) -> bool:
        """Make it if the disk has at least twice that room; whether it is there now. Never raises."""
        if self.held or not self.size_bytes:
            return True
        with suppress(OSError):
            if free_bytes(self._path.parent) < 2 * self.size_bytes:
                return False
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self.size_bytes)
            finally:
                os.close(descriptor)
            return True
        self.release()  # half of it helps nobody
        return False

    def release(self) -> bool:
        """Give the room up; whether there was any."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False


def preallocate(db: sqlite3.Connection, path: Path, size_bytes: int) -> None:
    """Have ``size_bytes`` free inside the database at ``path`` and about as much in its write-ahead log.

    What is written and deleted again leaves free pages in the one and length in the other: both are written over
    later, which needs no room. Does nothing while at least half of it is there. Raises sqlite3.Error if the disk has
    no room for it.
    """
    page_bytes = int(db.execute("PRAGMA page_size").fetchone()[0])
    free = int(db.execute("PRAGMA freelist_count").fetchone()[0]) * page_bytes
    log = path.with_name(f"{path.name}-wal")
    log_bytes = log.stat().st_size if log.exists() else 0
    if min(free, log_bytes) >= size_bytes // 2:
        return
    try:
        db.execute("CREATE TABLE IF NOT EXISTS room (filler BLOB)")
        db.execute("INSERT INTO room VALUES (zeroblob(?))", (size_bytes,))
    finally:
        # Also what a killed agent left of it.
        db.execute("DROP TABLE IF EXISTS room")
    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

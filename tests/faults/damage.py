"""What happens to files: torn, cut short, overwritten, emptied, removed; and a single bit that flips."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

PAGE = 4096
_SUFFIXES = ("-wal", "-shm")


def settle(path: Path) -> None:
    """Bring a database that nobody has open into its one file, so that damage to that file is damage to it."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    for suffix in _SUFFIXES:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def tear(path: Path, *, seed: int = 1) -> None:
    """Half of its pages are as they were written, the others are noise: what a dying disk leaves."""
    settle(path)
    noise = random.Random(seed)
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // PAGE):
        if noise.random() < 0.5:
            data[page * PAGE : (page + 1) * PAGE] = noise.randbytes(PAGE)
    path.write_bytes(data)


def cut(path: Path) -> None:
    """The second half is missing."""
    settle(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 // PAGE * PAGE + PAGE // 2])


def overwrite(path: Path) -> None:
    """It is no database any more."""
    settle(path)
    path.write_bytes(b"not a database" * 1000)


def empty(path: Path) -> None:
    """It is there, and nothing in it."""
    settle(path)
    path.write_bytes(b"")


def remove(path: Path) -> None:
    """It is not there."""
    settle(path)
    path.unlink()


def flip(path: Path, *, seed: int = 1) -> None:
    """One bit of one of the pages that hold its tables."""
    settle(path)
    data = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as db:
        roots = [row[0] for row in db.execute("SELECT rootpage FROM sqlite_master WHERE rootpage > 0")]
    page = random.Random(seed).choice(roots) - 1
    data[page * PAGE] ^= 0x40  # the page's type: the first byte of its header
    path.write_bytes(data)


def spoil_run(path: Path, run_id: str) -> None:
    """A row that SQLite finds nothing wrong with, and that says nothing any more."""
    with closing(sqlite3.connect(path)) as db, db:
        changed = db.execute("UPDATE runs SET command = ? WHERE run_id = ?", (b"\xff" * 40, run_id)).rowcount
        assert changed == 1


WAYS = {"torn": tear, "cut": cut, "overwritten": overwrite, "empty": empty, "removed": remove, "flipped": flip}

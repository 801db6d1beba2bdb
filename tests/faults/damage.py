"""What happens to files: torn, cut short, overwritten, emptied, removed; and a single bit that flips.

Either to the database itself, or to the log beside it that a killed process leaves and that has its newest history.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

PAGE = 4096
LOG_HEADER, LOG_FRAME = 32, 24 + PAGE
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


def leave(path: Path, target: Path) -> Path:
    """What a kill at this instant would leave of the database at ``path``, that is in use: put at ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith("-shm"):
            shutil.copyfile(file, target.with_name(target.name + file.name.removeprefix(path.name)))
    return target


def log_of(path: Path) -> Path:
    return Path(f"{path}-wal")


def current_frames(path: Path) -> int:
    """How many frames of its log count: those after them are of its former uses."""
    data = log_of(path).read_bytes()
    places = range(LOG_HEADER, len(data) - LOG_FRAME + 1, LOG_FRAME)
    return sum(data[place + 8 : place + 16] == data[16:24] for place in places)


def flip_in_log(path: Path, frame: int | None = None) -> None:
    """One bit of the page that a frame of its log holds (from 0 on; the one in the middle, if not said)."""
    data = bytearray(log_of(path).read_bytes())
    frame = current_frames(path) // 2 if frame is None else frame
    data[LOG_HEADER + frame * LOG_FRAME + 24 + 100] ^= 1
    log_of(path).write_bytes(data)


def flip_in_log_header(path: Path) -> None:
    """One bit of what says which frames count."""
    data = bytearray(log_of(path).read_bytes())
    data[20] ^= 1
    log_of(path).write_bytes(data)


def cut_log(path: Path) -> None:
    """The second half of what counts in its log is missing."""
    os.truncate(log_of(path), LOG_HEADER + current_frames(path) // 2 * LOG_FRAME + PAGE // 2)


def empty_log(path: Path) -> None:
    """Its log is there, and nothing in it."""
    os.truncate(log_of(path), 0)


def remove_log(path: Path) -> None:
    """Its log is not there."""
    log_of(path).unlink()


WAYS = {
    "torn": tear,
    "cut": cut,
    "overwritten": overwrite,
    "empty": empty,
    "removed": remove,
    "flipped": flip,
    "log flipped": flip_in_log,
    "log header flipped": flip_in_log_header,
    "log cut": cut_log,
    "log empty": empty_log,
    "log removed": remove_log,
}

"""Is the store's file what the server left behind? Asked before anything is written to it.

SQLite keeps no checksums of its pages: a flipped byte within a value reads as another value. So a server that
stops leaves a seal beside the file, its size and SHA-256, and the next start compares them. After a crash there is
no seal; then it is told whether commits are lost (see `outrider.sqlite_loss`), and SQLite's own quick check tells
damage of the structure.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

from sqlalchemy import Engine

from outrider.errors import InvalidInput
from outrider.sqlite_loss import COMMITS, commits_lost, damage_of_log, mark_of
from server_core.security.files import sync_directory, write_private

RESTORE_HINT = "restore a backup with `outrider server restore FILE`; the file is left as it is"

# What is read whole at start and stop: about a second for this much.
_SEALED_UP_TO_BYTES = 1024**3
# The structural check is slower: about half a second for this much.
_CHECKED_UP_TO_BYTES = 256 * 1024**2


def refuse_damaged_log(path: Path) -> None:
    """Raise InvalidInput if commits are lost from the store's write-ahead log. To be asked before SQLite opens it,
    and then throws away what it can't read."""
    if damage := damage_of_log(path):
        raise _loss(path, damage)


def refuse_damaged(path: Path, engine: Engine) -> None:
    """Raise InvalidInput unless the store is as it was left, as far as that can be told in about a second.

    A seal that fits makes the structural check needless. Raises the database's error where the structure is damaged.
    """
    if _is_as_sealed(path):
        return
    with engine.connect() as connection:
        if lost := commits_lost(path, int(connection.exec_driver_sql(COMMITS).scalar_one())):
            raise _loss(path, f"its last commits are not in it, {lost} of them")
        if path.stat().st_size > _CHECKED_UP_TO_BYTES:
            return
        result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if result != "ok":
        raise sqlite3.DatabaseError(f"malformed: {result}")


def break_seal(path: Path) -> None:
    """From now on the store is written to; or it is another one. Durable when this returns."""
    seal = _seal_of(path)
    if seal.exists():
        seal.unlink()
        sync_directory(path.parent)


def set_seal(path: Path) -> None:
    """Note what the file is, now that nobody writes to it any more. It is left out where there is no room for it."""
    wal = path.with_name(path.name + "-wal")
    size = path.stat().st_size
    if size > _SEALED_UP_TO_BYTES or (wal.exists() and wal.stat().st_size):
        return
    text = json.dumps({"size_bytes": size, "sha256": sha256_of(path)})
    try:
        write_private(_seal_of(path), text.encode() + b"\n")
    except OSError:
        return  # a full disk: the next start makes do with what it does after a crash
    mark_of(path).unlink(missing_ok=True)  # the seal says more, and goes with whoever puts another store in its place


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_as_sealed(path: Path) -> bool:
    seal = _seal_of(path)
    try:
        noted = json.loads(seal.read_bytes())
        size, digest = int(noted["size_bytes"]), str(noted["sha256"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise _refusal(path, f"its seal {seal.name} can't be read") from error
    if path.stat().st_size != size:
        raise _refusal(path, f"it has {path.stat().st_size} bytes instead of {size}")
    if sha256_of(path) != digest:
        raise _refusal(path, "its checksum is another")
    return True


def _refusal(path: Path, why: str) -> InvalidInput:
    return InvalidInput(
        f"the store {path} is not what the server left when it stopped: {why}",
        code="store_damaged",
        hint=f"{RESTORE_HINT}. If you changed it yourself, remove {_seal_of(path)} to have it taken as it is",
    )


def _loss(path: Path, what: str) -> InvalidInput:
    return InvalidInput(
        f"the store {path} has lost the end of its history: {what}",
        code="store_damaged",
        hint=f"{RESTORE_HINT}. If you put another store there, or want to go on without what is lost, remove {path}-wal"
        f" and {mark_of(path)}",
    )


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".seal")

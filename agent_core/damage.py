"""A journal that can't be trusted: found out before it is used, put aside, and said.

SQLite undoes by itself what a crash has left half-written. What remains is a file that was torn, overwritten, emptied
or removed, or whose newest commits are lost (see `outrider.sqlite_loss`): then the agent starts with a new journal,
keeps the old files for whoever wants to look at them, and `agent_core.rebuild` finds out what it can.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent_core.journal import Journal, distrust_file, is_damage, lenient_text
from agent_core.transitions import Transition
from outrider.errors import PermanentError
from outrider.sqlite_loss import COMMITS, MARK_SUFFIX, commits_lost, damage_of_log

log = structlog.get_logger(__name__)

REBUILD = "rebuild"
"""The journal's note, as JSON, that it took the place of one that was lost: why, and what has been done about it."""
_KEPT = 3  # damaged journals that are kept; an agent that starts and fails for ever must not fill the disk with them
_FILES = ("", "-wal", "-shm", MARK_SUFFIX)


@dataclass(frozen=True, slots=True)
class Damage:
    """What was wrong with the journal. ``aside``: where it is kept; None: there was nothing to keep."""

    reason: str
    aside: Path | None


def open_journal(
    path: Path, migrations: Sequence[str], *, reserve_bytes: int = 0, used: bool = False
) -> tuple[Journal, Damage | None]:
    """The journal at ``path``, or a new one in place of what can't be trusted, and what was wrong with that.

    ``used``: there are traces of an agent that has run here, so that a journal that is missing was lost. Raises
    PermanentError if the file can't be read at all, and what `Journal` raises.
    """
    reason = _examine(path, migrations, used)
    if not reason:
        return Journal(path, migrations, reserve_bytes=reserve_bytes), None
    path.parent.mkdir(parents=True, exist_ok=True)
    # It stays until the new journal itself says that it is to be rebuilt, whatever comes between.
    distrust_file(path).write_text(reason, encoding="utf-8")
    damage = Damage(reason, _put_aside(path))
    log.error("the journal is damaged: a new one is begun", reason=reason, kept=str(damage.aside or ""))
    journal = Journal(path, migrations, reserve_bytes=reserve_bytes)
    note = {"reason": reason, "kept": str(damage.aside or ""), "found_at": _now()}
    row = (REBUILD, json.dumps(note))
    sql = "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)"
    journal.submit(Transition.DAMAGE_NOTED, lambda db: db.execute(sql, row) and None).result()
    distrust_file(path).unlink(missing_ok=True)
    return journal, damage


def _examine(path: Path, migrations: Sequence[str], used: bool) -> str:
    """What is wrong with the journal, as a sentence; "": nothing."""
    with suppress(OSError):
        return distrust_file(path).read_text(encoding="utf-8") or "it was found to be damaged"
    if not path.exists():
        return "it is missing, though an agent has run here" if used else ""
    try:
        if reason := damage_of_log(path):
            return reason
        with closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as db:
            db.text_factory = lenient_text
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > len(migrations):
                return ""  # a newer agent's: that is refused, not put aside
            found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
            tables = _tables(db)
            lost = commits_lost(path, int(db.execute(COMMITS).fetchone()[0]))
    except UnicodeDecodeError:  # of SQLite's own message, which quotes what it has found
        return "what it is made of can't be read any more"
    except (sqlite3.Error, OSError) as error:
        if is_damage(error):
            return str(error)
        raise PermanentError(f"the journal {path} can't be read: {error}", code="journal_unreadable") from error
    if found != "ok":
        return found.replace("\n", " ")
    if version == 0 and not tables:
        return "it is empty, though an agent has run here" if used else ""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("".join(f"{script};" for script in migrations[:version]))
        expected = _tables(db)
    if any(tables.get(name) != columns for name, columns in expected.items()) or not expected:
        return "its tables are not those of an agent's journal"
    return f"its last commits are lost, {lost} of them" if lost else ""


def _tables(db: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    """The columns of each table: name, type and what else SQLite makes of the text that they were defined with."""
    names = [str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: db.execute("SELECT * FROM pragma_table_info(?)", (name,)).fetchall() for name in names}


def _now() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _put_aside(path: Path) -> Path | None:
    """Out of the way, under a name that says when; the oldest of too many go."""
    aside = path.with_name(f"{path.name}.damaged-{_now()}")
    for suffix in _FILES:
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    kept = sorted(each for each in path.parent.glob(f"{path.name}.damaged-*Z") if each.is_file())
    for old in kept[:-_KEPT]:
        for suffix in _FILES:
            Path(f"{old}{suffix}").unlink(missing_ok=True)
    return aside if aside.exists() else None

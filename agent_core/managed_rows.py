"""What the journal holds of managed containers: one row each, under the name that its container has in the engine.

While one takes another's place there are two rows (see `agent_core.replacing`):

=============  =========================  ==========================================================================
name           state                      what
=============  =========================  ==========================================================================
``game``       ``starting``               is about to be made, and counts for nothing until it is ready
``game``       ``ready``                  was ready once: it is somebody's game
``game.prev``  ``aside``, ``aside_idle``  stopped and set aside for the one above, to be brought back if that fails;
                                          ``aside_idle`` did not run when it was set aside
``game.next``  ``starting``               is made beside ``game``
``game.next``  ``switching``              is ready: from here on it takes that one's place, whatever happens
``game.prev``  ``leaving``                its place is taken; it is to be stopped and removed
=============  =========================  ==========================================================================
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_core.container_spec import NEXT, PREVIOUS, ContainerScope
from agent_core.journal import Journal
from agent_core.ports import release_lease, take_lease
from agent_core.transitions import Transition

MIGRATION = """
CREATE TABLE managed (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    state TEXT NOT NULL,
    run_id TEXT NOT NULL,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    object_ref TEXT,
    grace_s REAL NOT NULL
)
"""

SUPERVISION = """
ALTER TABLE managed ADD COLUMN supervision TEXT NOT NULL DEFAULT '{}'; -- JSON; see liveness.Supervision
ALTER TABLE managed ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0;    -- for want of liveness, since it worked last
ALTER TABLE managed ADD COLUMN reason TEXT NOT NULL DEFAULT '';        -- of the last of them
"""

LOG_SEEN = """
ALTER TABLE managed ADD COLUMN log_seen REAL NOT NULL DEFAULT 0; -- up to when its log was read for its liveness
"""


@dataclass(frozen=True, slots=True)
class ManagedRow:
    """One row."""

    name: str
    digest: str
    state: str
    run_id: str
    step: str
    attempt: int
    object_ref: str | None
    grace_s: float
    supervision: dict[str, Any]
    restarts: int
    reason: str
    log_seen: float


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be made: the row's content, whatever name it gets."""

    digest: str
    scope: ContainerScope
    grace_s: float
    supervision: str


class ManagedRows:
    """All reads and writes of the table. ``base`` is a container's name as the pipeline gave it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, name: str) -> ManagedRow | None:
        """The row of that name."""
        rows = self._journal.query_now("SELECT * FROM managed WHERE name = ?", (name,))
        return _row(rows[0]) if rows else None

    def all(self) -> list[ManagedRow]:
        """Every row."""
        return [_row(row) for row in self._journal.query_now("SELECT * FROM managed ORDER BY name")]

    def family(self, base: str) -> list[ManagedRow]:
        """The rows of one name: the container's own, and those of a replacement under way."""
        names = (base, base + NEXT, base + PREVIOUS)
        sql = "SELECT * FROM managed WHERE name IN (?, ?, ?) ORDER BY name"
        return [_row(row) for row in self._journal.query_now(sql, names)]

    def unfinished(self) -> list[ManagedRow]:
        """Those that are not simply ready."""
        return [_row(row) for row in self._journal.query_now("SELECT * FROM managed WHERE state != 'ready'")]

    def attempt_is_over(self, run_id: str, step: str, attempt: int) -> bool:
        """Whether the attempt can't go on any more with what it began."""
        sql = "SELECT phase FROM attempts WHERE run_id = ? AND step = ? AND attempt = ?"
        found = self._journal.query_now(sql, (run_id, step, attempt))
        return not found or found[0]["phase"] in ("exited", "done")

    async def starting(self, name: str, intent: Intent) -> None:
        """It is about to be made."""
        await self._journal.write(Transition.MANAGED_STARTING, lambda db: _put(db, name, intent))

    async def ready(self, name: str, supervision: str) -> None:
        """It was ready; from here on it is watched as ``supervision`` says.

        What one that was ready before has printed by now is nothing to a new rule.
        """
        sql = (
            "UPDATE managed SET log_seen = CASE WHEN state = 'ready' AND supervision != ? THEN ? ELSE log_seen END, "
            "state = 'ready', supervision = ?, restarts = 0, reason = '' WHERE name = ?"
        )
        await self._journal.execute(Transition.MANAGED_READY, sql, (supervision, time.time(), supervision, name))

    async def log_seen(self, name: str, digest: str, until: float) -> None:
        """Its log was read up to then (seconds of the epoch), and there was nothing in it."""
        sql = "UPDATE managed SET log_seen = max(log_seen, ?) WHERE name = ? AND digest = ?"
        await self._journal.execute(Transition.MANAGED_LOG_SEEN, sql, (until, name, digest))

    async def restarting(self, name: str, restarts: int, reason: str) -> None:
        """It does not work any more; ``restarts``: how often it has been restarted for that, this one counted."""
        sql = "UPDATE managed SET restarts = ?, reason = ? WHERE name = ?"
        await self._journal.execute(Transition.MANAGED_RESTARTING, sql, (restarts, reason, name))

    async def drop(self, name: str) -> None:
        """It is gone."""
        await self._journal.execute(Transition.MANAGED_REMOVED, "DELETE FROM managed WHERE name = ?", (name,))

    async def replacing(self, base: str, intent: Intent, *, runs: bool) -> None:
        """The one that is there is about to be stopped and set aside; what is made in its place has its ports."""

        def write(db: sqlite3.Connection) -> None:
            _rename(db, base, base + PREVIOUS, "aside" if runs else "aside_idle")
            _move_uses(db, base, base + PREVIOUS)
            _put(db, base, intent)

        await self._journal.write(Transition.MANAGED_REPLACING, write)

    async def brought_back(self, base: str, ports: Sequence[tuple[str, int, str]]) -> None:
        """The one set aside has its name again, and its ports (name, number, protocol), as far as nobody has them."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM managed WHERE name = ?", (base,))
            db.execute("DELETE FROM volume_uses WHERE container = ?", (base,))
            _rename(db, base + PREVIOUS, base, "ready")
            _move_uses(db, base + PREVIOUS, base)
            held = db.execute("SELECT port, protocol FROM port_leases WHERE owner = ?", (base,)).fetchall()
            for row in held:
                release_lease(db, row["port"], row["protocol"], base)
            for name, port, protocol in ports:
                taken = "SELECT 1 FROM port_leases WHERE port = ? AND protocol = ?"
                if not db.execute(taken, (port, protocol)).fetchone():
                    take_lease(db, port, protocol, base, name)

        await self._journal.write(Transition.MANAGED_BROUGHT_BACK, write)

    async def switching(self, base: str, supervision: str) -> None:
        """The one beside it is ready and takes its place, whatever happens from here on."""
        sql = "UPDATE managed SET state = 'switching', supervision = ? WHERE name = ?"
        await self._journal.execute(Transition.MANAGED_SWITCHING, sql, (supervision, base + NEXT))

    async def switched(self, base: str) -> None:
        """In the engine both have their new names: now here, too."""

        def write(db: sqlite3.Connection) -> None:
            for former, name, state in ((base, base + PREVIOUS, "leaving"), (base + NEXT, base, "ready")):
                _rename(db, former, name, state)
                _move_uses(db, former, name)
                db.execute("UPDATE OR REPLACE port_leases SET owner = ? WHERE owner = ?", (name, former))

        await self._journal.write(Transition.MANAGED_SWITCHED, write)


def _put(db: sqlite3.Connection, name: str, intent: Intent) -> None:
    scope = intent.scope
    db.execute(
        "INSERT INTO managed (name, digest, state, run_id, step, attempt, object_ref, grace_s, supervision) "
        "VALUES (?, ?, 'starting', ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, "
        "state = excluded.state, run_id = excluded.run_id, step = excluded.step, attempt = excluded.attempt, "
        "object_ref = excluded.object_ref, grace_s = excluded.grace_s, supervision = excluded.supervision, "
        "restarts = 0, reason = '', log_seen = 0",
        (
            name, intent.digest, scope.run_id, scope.step, scope.attempt, scope.object_ref, intent.grace_s,
            intent.supervision,
        ),
    )  # fmt: skip


def _rename(db: sqlite3.Connection, former: str, name: str, state: str) -> None:
    db.execute("DELETE FROM managed WHERE name = ? AND EXISTS (SELECT 1 FROM managed WHERE name = ?)", (name, former))
    db.execute("UPDATE managed SET name = ?, state = ? WHERE name = ?", (name, state, former))


def _move_uses(db: sqlite3.Connection, former: str, name: str) -> None:
    db.execute("UPDATE OR REPLACE volume_uses SET container = ? WHERE container = ?", (name, former))


def _row(row: sqlite3.Row) -> ManagedRow:
    try:
        supervision = json.loads(row["supervision"])
    except ValueError:
        supervision = {}
    return ManagedRow(
        name=str(row["name"]),
        digest=str(row["digest"]),
        state=str(row["state"]),
        run_id=str(row["run_id"]),
        step=str(row["step"]),
        attempt=int(row["attempt"]),
        object_ref=row["object_ref"],
        grace_s=float(row["grace_s"]),
        supervision=supervision if isinstance(supervision, dict) else {},
        restarts=int(row["restarts"]),
        reason=str(row["reason"]),
        log_seen=float(row["log_seen"]),
    )

"""Who the files belong to: one uid:gid per owner of volumes, from a range of the node's own.

An owner is an object or a run; its steps and its game run as the same user, so that they can work on the
same files, and two owners never can. Numbers are remembered for as long as anything of the owner is left.
"""

from __future__ import annotations

import os
import sqlite3

from agent_core.journal import Journal
from agent_core.transitions import Transition
from outrider.errors import PermanentError

MIGRATION = """
CREATE TABLE identities (
    owner TEXT PRIMARY KEY,
    uid INTEGER NOT NULL UNIQUE
)
"""

_LAST = "#last"
"""Stands as the owner of a number that is nobody's any more, and was the last one given."""
FIRST_UID = 200_001
LAST_UID = 265_535
SHARED_GID = 200_000
"""The group of what all owners of a node share: volumes of scope "node"."""


def owner_of(run_id: str, object_ref: str | None) -> str:
    """The owner of a run's volumes: its object if it has one (``kind/name``), else the run itself."""
    return f"object:{object_ref}" if object_ref else f"run:{run_id}"


class Identities:
    """Allots uid:gid pairs, durably."""

    def __init__(self, journal: Journal, *, first: int = FIRST_UID, last: int = LAST_UID) -> None:
        self._journal = journal
        self._first, self._last = first, last

    async def allot(self, owner: str) -> tuple[int, int]:
        """The uid and gid of ``owner`` (see `owner_of`), the same at every call until `release`.

        An agent that is not root can't give files away: everything then belongs to its own user.
        """
        if os.geteuid() != 0:
            return os.geteuid(), os.getegid()

        def take(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT uid FROM identities WHERE owner = ?", (owner,)).fetchone()
            if row:
                return int(row["uid"])
            uid = self._free(db)
            db.execute("INSERT INTO identities (owner, uid) VALUES (?, ?)", (owner, uid))
            return uid

        known = self._journal.query_now("SELECT uid FROM identities WHERE owner = ?", (owner,))
        uid = int(known[0]["uid"]) if known else await self._journal.write(Transition.IDENTITY_ALLOTTED, take)
        return uid, uid

    async def release(self, owner: str) -> None:
        """Give the number back: nothing on the disk may belong to ``owner`` any more. Idempotent."""

        def give_back(db: sqlite3.Connection) -> None:
            newest = db.execute("SELECT owner, uid FROM identities ORDER BY rowid DESC LIMIT 1").fetchone()
            db.execute("DELETE FROM identities WHERE owner = ?", (owner,))
            if newest is not None and newest["owner"] == owner:
                # The number that was given last is remembered, or the next owner would get this very one.
                db.execute("DELETE FROM identities WHERE owner = ?", (_LAST,))
                db.execute("INSERT INTO identities (owner, uid) VALUES (?, ?)", (_LAST, newest["uid"]))

        await self._journal.write(Transition.IDENTITY_RELEASED, give_back)

    def _free(self, db: sqlite3.Connection) -> int:
        """The next number after the one that was given last, round the range: one is reused as late as possible."""
        rows = db.execute("SELECT owner, uid FROM identities ORDER BY rowid").fetchall()
        taken = {int(row["uid"]) for row in rows if row["owner"] != _LAST}
        size = self._last - self._first + 1
        after = int(rows[-1]["uid"]) - self._first + 1 if rows else 0
        for step in range(size):
            uid = self._first + (after + step) % size
            if uid not in taken:
                db.execute("DELETE FROM identities WHERE owner = ?", (_LAST,))
                return uid
        raise PermanentError(
            f"all {self._last - self._first + 1} user ids of this node are allotted",
            code="identities_exhausted",
            hint="remove objects whose volumes are no longer needed",
        )

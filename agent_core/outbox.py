"""The outbox: what the server must learn, on disk until it says that it has it.

Three kinds go through it: run reports (acknowledged one by one on the control channel), write-backs (a call
each) and events (acknowledged up to a number). A row is added in the transaction that makes it true; the
numbers grow and are never used again.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent_core.journal import Journal
from agent_core.transitions import Transition
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

MIGRATION = """
CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,              -- run_report, write_back, event
    run_id TEXT NOT NULL,            -- "" if it is about no run
    body BLOB NOT NULL
) STRICT;
CREATE INDEX outbox_kind ON outbox (kind, sequence);
CREATE INDEX outbox_run ON outbox (run_id);
"""

IDENTITY = """
INSERT INTO meta (key, value) VALUES ('outbox_id', lower(hex(randomblob(12))));
"""
"""Numbers are only comparable within one outbox: a journal that was lost takes its numbers with it."""

Kind = Literal["run_report", "write_back", "event"]
MAX_EVENTS = 20_000
"""Events kept while the server is away; beyond them the oldest go. Run reports and write-backs are never dropped."""


@dataclass(frozen=True, slots=True)
class Item:
    sequence: int
    kind: Kind
    run_id: str
    body: bytes


class Outbox:
    """Rows in order. Changes are made by the writers' transactions; `notify` wakes who sends them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.id = str(journal.query_now("SELECT value FROM meta WHERE key = 'outbox_id'")[0]["value"])
        self._changed = asyncio.Event()
        self.urgent = False
        """Whether something urgent was told since whoever sends last looked, and reset it."""
        self._depth = self._count()
        self._rollbacks = journal.rollbacks

    @property
    def depth(self) -> int:
        """How many rows wait."""
        if self._rollbacks != self._journal.rollbacks:
            # A transaction was done a second time, and what it added was counted twice.
            self._rollbacks, self._depth = self._journal.rollbacks, self._count()
        return self._depth

    # Changes, to be handed to State.commit together with what they report.

    def run_report(self, report: pb.RunReport) -> Callable[[sqlite3.Connection], object]:
        return self._add("run_report", report.run_id, report.SerializeToString())

    def write_back(self, request: pb.WriteBackRequest) -> Callable[[sqlite3.Connection], object]:
        return self._add("write_back", request.run.run_id, request.SerializeToString())

    def event(
        self, type_: str, subject: str, data: Mapping[str, Any] | None = None, *, run_id: str = ""
    ) -> Callable[[sqlite3.Connection], object]:
        event = types.Event(type=type_, subject=subject, data_json=json.dumps(data or {}).encode())
        event.time.GetCurrentTime()
        return self._add("event", run_id, event.SerializeToString())

    async def emit(self, type_: str, subject: str, data: Mapping[str, Any] | None = None) -> None:
        """An event of its own."""
        change = self.event(type_, subject, data)
        await self._journal.write(Transition.EVENT_NOTED, lambda db: change(db) and None)
        self.notify()

    def notify(self, *, urgent: bool = False) -> None:
        """Something was committed: wake the senders. ``urgent``: somebody is waiting for just this, a run's end."""
        self.urgent = self.urgent or urgent
        self._changed.set()

    async def wait(self) -> None:
        """Until `notify` was called since the last wait."""
        await self._changed.wait()
        self._changed.clear()

    def read(self, kinds: Iterable[Kind], after: int = 0, limit: int = 200) -> list[Item]:
        """Rows of these kinds beyond ``after``, in order."""
        names = tuple(kinds)
        marks = ",".join("?" * len(names))
        rows = self._journal.query_now(
            f"SELECT * FROM outbox WHERE kind IN ({marks}) AND sequence > ?"  # noqa: S608 - question marks
            " ORDER BY sequence LIMIT ?",
            (*names, after, limit),
        )
        return [Item(row["sequence"], row["kind"], row["run_id"], bytes(row["body"])) for row in rows]

    async def acknowledge(self, sequences: Iterable[int]) -> None:
        """The server has these."""
        numbers = [(each,) for each in sequences]
        sql = "DELETE FROM outbox WHERE sequence = ?"
        await self._remove(Transition.OUTBOX_ACKNOWLEDGED, lambda db: db.executemany(sql, numbers).rowcount)

    async def acknowledge_events(self, up_to: int) -> None:
        """The server has every event up to this number."""
        sql = "DELETE FROM outbox WHERE kind = 'event' AND sequence <= ?"
        await self._remove(Transition.EVENTS_ACKNOWLEDGED, lambda db: db.execute(sql, (up_to,)).rowcount)

    async def _remove(self, transition: Transition, work: Callable[[sqlite3.Connection], int]) -> None:
        def counted(db: sqlite3.Connection) -> None:
            self._depth -= max(0, work(db))  # in the writer's thread, as every change of it

        await self._journal.write(transition, counted)

    def _count(self) -> int:
        return int(self._journal.query_now("SELECT count(*) FROM outbox")[0][0])

    def _add(self, kind: Kind, run_id: str, body: bytes) -> Callable[[sqlite3.Connection], object]:
        def change(db: sqlite3.Connection) -> object:
            # Counted in the writer's thread alone; it only feeds a gauge and a bound.
            if kind == "event" and self._depth > MAX_EVENTS:
                oldest = "DELETE FROM outbox WHERE sequence = (SELECT min(sequence) FROM outbox WHERE kind = 'event')"
                self._depth -= db.execute(oldest).rowcount
            self._depth += 1
            return db.execute("INSERT INTO outbox (kind, run_id, body) VALUES (?, ?, ?)", (kind, run_id, body))

        return change

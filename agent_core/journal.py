"""The journal: SQLite behind one writer thread, synced before anything is done about what it says.

Writers hand in a function that gets the connection; the thread runs as many as are waiting in one
transaction, commits (with full sync) and only then answers them all. Readers use connections of their own
and never wait for the writer.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from agent_core.transitions import Transition
from outrider.failpoints import failpoint

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
_Item = tuple[Transition, Work[object], Future[object]]

_MAX_GROUP = 500
_STOP = object()


@dataclass(frozen=True, slots=True)
class _Reader:
    """A thread's connection; ``lock`` is held while a query runs on it."""

    connection: sqlite3.Connection
    lock: threading.Lock


class Journal:
    """Durable state of one agent. ``migrations`` are SQL scripts, applied once each, in order, never edited."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        self.path = path
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[_Reader] = []
        self._readers_lock = threading.Lock()
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = self._open()
        os.chmod(path, 0o600)
        self._migrate(migrations)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    async def write(self, transition: Transition, work: Work[T]) -> T:
        """Run ``work(connection)`` in a transaction; returns when it is on the disk. What it raises rolls it back."""
        return await asyncio.wrap_future(self.submit(transition, work))

    async def execute(self, transition: Transition, sql: str, parameters: Sequence[object] = ()) -> int:
        """One changing statement; returns the number of rows changed."""
        return await self.write(transition, lambda db: db.execute(sql, parameters).rowcount)

    async def query(self, sql: str, parameters: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Rows as of the last commit."""
        return await asyncio.to_thread(self.query_now, sql, parameters)

    def query_now(self, sql: str, parameters: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Like `query`, for callers that are not on the event loop or read a handful of rows."""
        reader = self._reader()
        with reader.lock:
            return reader.connection.execute(sql, parameters).fetchall()

    def close(self) -> None:
        """Finish what was handed in, then close. Idempotent. A query after it raises sqlite3.ProgrammingError."""
        if self._thread.is_alive():
            self._queue.put(_STOP)
            self._thread.join()
        with self._readers_lock:
            self._closed = True
            for reader in self._readers:
                # A query whose caller was cancelled still runs in its thread: closing under it would crash the process.
                with reader.lock:
                    reader.connection.close()
            self._readers.clear()

    def submit(self, transition: Transition, work: Work[T]) -> Future[T]:
        """Like `write`, not waiting: what is written later is on the disk no earlier than this."""
        future: Future[T] = Future()
        self._queue.put((transition, work, future))
        return future

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _reader(self) -> _Reader:
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            with self._readers_lock:
                if self._closed:
                    raise sqlite3.ProgrammingError("the journal is closed")
                reader = _Reader(self._open(), threading.Lock())
                reader.connection.execute("PRAGMA query_only=ON")
                self._local.reader = reader
                self._readers.append(reader)
        return reader

    def _migrate(self, migrations: Sequence[str]) -> None:
        done = self._writer.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(migrations[done:], start=done + 1):
            self._writer.executescript(f"BEGIN; {script}; PRAGMA user_version={number}; COMMIT;")

    def _run(self) -> None:
        stopping = False
        while not stopping:
            group: list[_Item] = []
            item = self._queue.get()
            while True:
                if item is _STOP:
                    stopping = True
                else:
                    group.append(cast("_Item", item))
                if len(group) >= _MAX_GROUP or self._queue.empty():
                    break
                item = self._queue.get()
            if group:
                self._commit(group)
        self._writer.close()

    def _commit(self, group: list[_Item]) -> None:
        db = self._writer
        answers: list[tuple[Future[object], object, BaseException | None]] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            for _, work, future in group:
                if not future.set_running_or_notify_cancel():
                    continue
                db.execute("SAVEPOINT work")
                try:
                    answers.append((future, work(db), None))
                    db.execute("RELEASE work")
                except BaseException as error:  # the caller's, handed back to it
                    db.execute("ROLLBACK TO work")
                    db.execute("RELEASE work")
                    answers.append((future, None, error))
            for transition, _, _ in group:
                failpoint(transition.before)
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            answered = {id(future) for future, _, _ in answers}
            for _, _, future in group:
                if id(future) in answered or not future.done():
                    future.set_exception(error)
            return
        for transition, _, _ in group:
            failpoint(transition.after)
        for future, value, problem in answers:
            if problem is None:
                future.set_result(value)
            else:
                future.set_exception(problem)

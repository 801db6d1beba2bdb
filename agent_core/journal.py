"""The journal: SQLite behind one writer thread, synced before anything is done about what it says.

Writers hand in a function that gets the connection; the thread runs as many as are waiting in one
transaction, commits (with full sync) and only then answers them all. Readers use connections of their own
and never wait for the writer.

A full disk is nobody's error here. Room for what the agent has to remember is held ready (see `agent_core.room`); where
even that is used up, a write waits until there is some, and `blocked` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import structlog

from agent_core import rowsums
from agent_core.room import ReserveFile, could_be_out_of_space, is_out_of_space, preallocate
from agent_core.transitions import Transition
from outrider.errors import InvalidInput
from outrider.failpoints import failpoint
from outrider.sqlite_loss import COMMITS, CommitMark

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
_Item = tuple[Transition, Work[object], Future[object]]

RESERVE_BYTES = 6 * 1024**2  # SQLite begins its write-ahead log anew after 4 MiB
MIGRATED_BEFORE, MIGRATED_AFTER = "journal.migrated.before", "journal.migrated.after"  # failpoints, for each script
_MAX_GROUP = 500
_FULL_WAIT_S = 0.25
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_STOP = object()
_KEEP_ROOM = object()

log = structlog.get_logger(__name__)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite says that the file itself is not as it was written."""
    return isinstance(error, sqlite3.Error) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGE


def lenient_text(data: bytes) -> str:
    """A bit that flipped may leave what is no text: one damaged row must not keep all others from being read."""
    return data.decode("utf-8", "replace")


def distrust_file(path: Path) -> Path:
    """Where it is noted that the journal at ``path`` was found to be damaged; whoever opens it next looks there."""
    return path.with_name(f"{path.name}.distrusted")


@dataclass(frozen=True, slots=True)
class _Reader:
    """A thread's connection; ``lock`` is held while a query runs on it."""

    connection: sqlite3.Connection
    lock: threading.Lock


class Journal:
    """Durable state of one agent. ``migrations`` are SQL scripts, applied once each, in order, never edited.

    ``reserve_bytes`` are held free inside the journal, and twice as much beside it, for when the disk is full.
    ``rollbacks`` counts transactions that were undone and tried again: what changed with them in memory is to be
    looked up anew. ``damaged`` says what SQLite found to be wrong with the file while it was used, and ``on_damage`` is
    told of it, in whatever thread it was found.
    """

    def __init__(self, path: Path, migrations: Sequence[str], *, reserve_bytes: int = 0) -> None:
        self.path = path
        self.blocked = ""
        self.rollbacks = 0
        self.damaged = ""
        self.on_damage: Callable[[str], object] = lambda _reason: None
        self._reserve_bytes = reserve_bytes
        self._reserve = ReserveFile(path.with_name("reserve.bin"), 2 * reserve_bytes)
        self._closing = threading.Event()
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[_Reader] = []
        self._readers_lock = threading.Lock()
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._writer = self._open_and_migrate(migrations)
        except sqlite3.Error as error:
            # Opening it takes some room already.
            if not could_be_out_of_space(error) or not self._reserve.release():
                raise
            self._writer = self._open_and_migrate(migrations)
        self._keep_room()
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
        try:
            reader = self._reader()
            with reader.lock:
                return reader.connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            self._suspect(error)
            raise

    def close(self) -> None:
        """Finish what was handed in, then close. Idempotent. A query after it raises sqlite3.ProgrammingError."""
        if self._thread.is_alive():
            self._closing.set()
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

    def keep_room(self) -> None:
        """Fill up again what is held for a full disk, soon; for when the disk is not full."""
        self._queue.put(_KEEP_ROOM)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10)
        connection.row_factory = sqlite3.Row
        connection.text_factory = lenient_text
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA temp_store=MEMORY")  # what it keeps aside must not need the disk
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

    def _open_and_migrate(self, migrations: Sequence[str]) -> sqlite3.Connection:
        self._writer = self._open()
        try:
            os.chmod(self.path, 0o600)
            rowsums.prepare(self._writer)
            self._migrate(migrations)
            rowsums.guard(self._writer)
            self._mark = CommitMark(self.path, int(self._writer.execute(COMMITS).fetchone()[0]))
        except BaseException:
            self._writer.close()
            raise
        return self._writer

    def _migrate(self, migrations: Sequence[str]) -> None:
        done = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if done > len(migrations):
            self._writer.close()
            raise InvalidInput(
                f"the journal {self.path} was written by a newer version of the agent",
                code="journal_newer",
                hint="run that version; this one changes nothing in it, and containers go on",
            )
        for number, script in enumerate(migrations[done:], start=done + 1):
            forget = rowsums.forgetting(self._writer)
            self._writer.executescript(f"BEGIN; {forget} {script}; PRAGMA user_version={number};")
            failpoint(MIGRATED_BEFORE)
            self._writer.execute("COMMIT")
            failpoint(MIGRATED_AFTER)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            group: list[_Item] = []
            wants_room = False
            item = self._queue.get()
            while True:
                if item is _STOP:
                    stopping = True
                elif item is _KEEP_ROOM:
                    wants_room = True
                else:
                    group.append(cast("_Item", item))
                if len(group) >= _MAX_GROUP or self._queue.empty():
                    break
                item = self._queue.get()
            if group:
                self._commit(group)
            if wants_room and not stopping:
                self._keep_room()
        self._writer.close()
        self._mark.close()

    def _commit(self, waiting: list[_Item]) -> None:
        """One transaction for all of them; once more, and again, where the disk had no room for it."""
        group = [item for item in waiting if item[2].set_running_or_notify_cancel()]
        while True:
            try:
                answers = self._transaction(group)
                break
            except (sqlite3.Error, OSError) as error:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                self.rollbacks += 1
                self._suspect(error)
                if not is_out_of_space(error) or not self._make_room(error):
                    for _, _, future in group:
                        future.set_exception(error)
                    return
        for transition, _, _ in group:
            failpoint(transition.after)
        if self.blocked:
            log.info("the journal can be written again")
            self.blocked = ""
        for (_, _, future), (value, problem) in zip(group, answers, strict=True):
            if problem is None:
                future.set_result(value)
            else:
                future.set_exception(problem)

    def _transaction(self, group: list[_Item]) -> list[tuple[object, BaseException | None]]:
        db = self._writer
        answers: list[tuple[object, BaseException | None]] = []
        db.execute("BEGIN IMMEDIATE")
        changes = db.total_changes
        for _, work, _ in group:
            db.execute("SAVEPOINT work")
            try:
                answers.append((work(db), None))
                db.execute("RELEASE work")
            except BaseException as error:  # the caller's, handed back to it
                if is_out_of_space(error) or is_damage(error):
                    raise
                db.execute("ROLLBACK TO work")
                db.execute("RELEASE work")
                answers.append((None, error))
        for transition, _, _ in group:
            failpoint(transition.before)
        changed = db.total_changes != changes  # where nothing did, the commit writes and syncs nothing
        if changed:
            db.execute(self._mark.counting)
        db.execute("COMMIT")
        if changed:
            self._mark.committed()
        return answers

    def _suspect(self, error: BaseException) -> None:
        """The file itself is damaged: nothing that it says can be relied on any more, now or at the next start."""
        if is_damage(error) and not self.damaged:
            self.damaged = str(error)
            with contextlib.suppress(OSError):
                distrust_file(self.path).write_text(self.damaged, encoding="utf-8")
            log.error("the journal is damaged", path=str(self.path), error=self.damaged)
            self.on_damage(self.damaged)

    def _make_room(self, error: BaseException) -> bool:
        """Whether to try again: after a reserve was given up, or after a while. False: the journal is being closed."""
        with contextlib.suppress(sqlite3.Error):
            # What the log holds goes to the free pages of the database, and it begins anew.
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if self._reserve.release():
            log.warning("the disk is full: the journal takes the room that was held for it", error=str(error))
            return True
        if not self.blocked:
            self.blocked = f"the journal {self.path} can't be written: {error}"
            log.error("the disk is full: the journal waits for room", path=str(self.path), error=str(error))
        return not self._closing.wait(_FULL_WAIT_S)

    def _keep_room(self) -> None:
        if not self._reserve_bytes:
            return
        try:
            preallocate(self._writer, self.path, self._reserve_bytes)
        except sqlite3.Error as error:
            if not is_out_of_space(error):
                raise
            log.warning("there is no room on the disk to hold some for the journal", path=str(self.path))
        self._reserve.keep()

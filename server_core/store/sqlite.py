"""The embedded store: SQLite in WAL mode, one writer thread that commits in groups, a few readers.

One writer, because SQLite has one: with several connections that write, "database is locked" is what loses
work under load. Errors of SQLAlchemy and sqlite3 are translated here.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine, create_engine, event, exc
from sqlalchemy.pool import NullPool, QueuePool

from outrider.errors import Conflict, InvalidInput, OutriderError, PermanentError, TemporaryError
from outrider.failpoints import failpoint
from outrider.sqlite_loss import COMMITS, CommitMark, mark_of
from server_core.store import integrity, migrate
from server_core.store.commits import Commit

T = TypeVar("T")
Work = Callable[[Connection], T]

DAMAGED = "store_damaged"

_MAX_GROUP = 500
_READERS = 4
_ROOM_KNOWN_S = 0.5


class SqliteDatabase:
    """The `server_core.store.base.Database` of one file.

    Opening it brings its schema up to date. Raises InvalidInput if the file is no store, is damaged, or was
    written by a newer version. With less than ``reserve_bytes`` of free disk, commits that need room are refused.
    """

    def __init__(self, path: Path, *, reserve_bytes: int = 0) -> None:
        self._path = path
        self._reserve_bytes = reserve_bytes
        self._room: tuple[float, int] = (0.0, 0)
        self._damaged = False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            integrity.break_seal(path)  # that of a store which was moved away
            mark_of(path).unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._writer_engine = _engine(path, writing=True)
        self._reader_engine = _engine(path, writing=False)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._closed = False
        try:
            integrity.refuse_damaged_log(path)
            migrate.refuse_foreign(self._writer_engine)
            integrity.refuse_damaged(path, self._writer_engine)
            integrity.break_seal(path)
            migrate.upgrade(self._writer_engine, copy=path.with_name(path.name + ".former"))
            with self._writer_engine.connect() as connection:
                self._mark = CommitMark(path, int(connection.exec_driver_sql(COMMITS).scalar_one()))
        except (exc.DatabaseError, sqlite3.DatabaseError) as error:
            self._dispose()
            raise _unusable(path, error) from error
        except OutriderError:
            self._dispose()
            raise
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    async def write(self, commit: Commit, work: Work[T]) -> T:
        # Shielded: a caller that gives up must not make the writer skip half of a decision.
        return await asyncio.shield(asyncio.wrap_future(self._submit(commit, work)))

    def write_now(self, commit: Commit, work: Work[T]) -> T:
        """Like `write`, for callers that are not on an event loop."""
        return self._submit(commit, work).result()

    async def read(self, work: Work[T]) -> T:
        if self._closed:
            raise TemporaryError("the store is closed", code="unavailable")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._dispose()
        self._mark.close()
        if not self._damaged:
            integrity.set_seal(self._path)

    def _dispose(self) -> None:
        self._readers.shutdown(wait=True)
        self._reader_engine.dispose()
        self._writer_engine.dispose()

    def _submit(self, commit: Commit, work: Work[T]) -> Future[T]:
        if self._closed:
            raise TemporaryError("the store is closed", code="unavailable")
        if commit.needs_room:
            self._refuse_without_room()
        future: Future[T] = Future()
        self._queue.put(_Job(commit, work, future))
        return future

    def _refuse_without_room(self) -> None:
        now = time.monotonic()
        if now - self._room[0] > _ROOM_KNOWN_S:
            self._room = (now, shutil.disk_usage(self._path.parent).free)
        if self._room[1] < self._reserve_bytes:
            raise TemporaryError(
                f"the server's disk is nearly full: {mebibytes(self._room[1])} are free in {self._path.parent}, and "
                f"the last {mebibytes(self._reserve_bytes)} are kept for what runs report",
                code="store_disk_low",
                hint="make room there; what was acknowledged is safe, and nodes keep their logs until then",
            )

    def _read(self, work: Work[T]) -> T:
        try:
            with self._reader_engine.connect() as connection:
                return work(connection)
        except exc.DBAPIError as error:
            refusal = translate(error)
            self._damaged = self._damaged or _is_damage(refusal)
            raise refusal from error

    def _run(self) -> None:
        with self._writer_engine.connect() as connection:
            while True:
                group = self._next_group()
                ending = group[-1] is None
                jobs = cast("list[_Job]", group[:-1] if ending else group)
                if jobs:
                    _commit(connection, jobs, self._mark)
                    self._damaged = self._damaged or any(_is_damage(job.future.exception()) for job in jobs)
                if ending:
                    return

    def _next_group(self) -> list[_Job | None]:
        group = [self._queue.get()]
        while group[-1] is not None and len(group) < _MAX_GROUP:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group


@dataclass(frozen=True, slots=True)
class _Job:
    """Work that was handed in, and who waits for it."""

    commit: Commit
    work: Work[Any]
    future: Future[Any]


def _commit(connection: Connection, group: list[_Job], mark: CommitMark) -> None:
    """One transaction for all of ``group``, each in a savepoint; they are answered once it is on the disk."""
    answers: list[tuple[Any, BaseException | None]] = []
    try:
        with connection.begin():
            changes = _changes(connection)
            answers = [_carry_out(connection, job) for job in group]
            changed = _changes(connection) != changes  # where nothing did, the commit writes and syncs nothing
            if changed:
                connection.exec_driver_sql(mark.counting)
            _reach(job.commit.before for job in group)
        if changed:
            mark.committed()
        _reach(job.commit.after for job in group)
    except BaseException as error:
        answers = [(None, _refusal(error))] * len(group)
    for job, (value, problem) in zip(group, answers, strict=True):
        if problem is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(problem)


def _changes(connection: Connection) -> int:
    """How many rows were changed on it so far."""
    return cast("sqlite3.Connection", connection.connection.dbapi_connection).total_changes


def _carry_out(connection: Connection, job: _Job) -> tuple[Any, BaseException | None]:
    """One job's answer, or why it left no trace. Raises if with it the transaction of the whole group is gone."""
    try:
        with connection.begin_nested():
            return job.work(connection), None
    except BaseException as error:  # the caller's own, or the database's: handed back to the caller
        # A full disk makes SQLite roll back everything. What came before in the group is lost, too, and a commit
        # would find nothing to do and succeed: nobody may be told that it was done.
        if not connection.connection.dbapi_connection.in_transaction:  # type: ignore[union-attr]  # sqlite3's own
            raise
        return None, _refusal(error)


def _reach(names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        failpoint(name)


def _refusal(error: BaseException) -> BaseException:
    """What a caller is told. The first error counts: those that follow are of the attempt to roll back."""
    if isinstance(error, exc.DBAPIError):
        first, former = error, error.__context__
        while former is not None:
            first = former if isinstance(former, exc.DBAPIError) else first
            former = former.__context__
        return translate(first)
    if isinstance(error, OSError):
        return _unwritable(error.strerror or str(error))
    return error


def translate(error: exc.DBAPIError) -> OutriderError:
    """The OutriderError that a database error stands for."""
    text = str(error.orig)
    if isinstance(error, exc.IntegrityError):
        return Conflict(f"the store refused it: {text}")
    if "disk is full" in text or "disk I/O" in text:
        return _unwritable(text)
    if _speaks_of_damage(text):
        return PermanentError(f"the server's store is damaged: {text}", code=DAMAGED, hint=integrity.RESTORE_HINT)
    if isinstance(error, exc.OperationalError):
        return TemporaryError(f"the store failed: {text}", code="store_failed")
    return PermanentError(f"the store failed: {text}", code="store_failed")


def _unusable(path: Path, error: BaseException) -> InvalidInput:
    text = str(getattr(error, "orig", None) or error)
    if _speaks_of_damage(text):
        return InvalidInput(
            f"the store {path} is damaged or is not a store: {text}", code=DAMAGED, hint=integrity.RESTORE_HINT
        )
    return InvalidInput(
        f"the store {path} can't be opened: {text}",
        code="store_unusable",
        hint=f"{mebibytes(shutil.disk_usage(path.parent).free)} are free on its disk",
    )


def _speaks_of_damage(text: str) -> bool:
    return "not a database" in text or "malformed" in text


def _is_damage(error: BaseException | None) -> bool:
    return isinstance(error, OutriderError) and error.code == DAMAGED


def _unwritable(text: str) -> TemporaryError:
    return TemporaryError(
        f"the server's store can't be written: {text}",
        code="store_unwritable",
        hint="make room on the server's disk; what was acknowledged is safe",
    )


def mebibytes(count: int) -> str:
    return f"{count / 1024**2:.0f} MiB"


def _engine(path: Path, *, writing: bool) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=NullPool if writing else QueuePool,
        connect_args={"timeout": 10, "check_same_thread": False},
        **({} if writing else {"pool_size": _READERS, "max_overflow": 0}),
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}")
        if not writing:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine

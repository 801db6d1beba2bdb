"""The log spool: masked output of steps on disk, by run, step, attempt and stream, until the server has it.

Writing never waits for a disk on the event loop: a thread appends. What is handed in while too much is
queued, or while the spool is full, is not kept: the writer of the log hears of it and fetches it from the
engine's own log later, or cuts the log and records the gap in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from agent_core.journal import Journal
from agent_core.runtimes.base import StreamName
from agent_core.transitions import Transition
from outrider.v1 import types_pb2 as types

MIGRATION = """
CREATE TABLE logs (
    run_id TEXT NOT NULL,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    stream TEXT NOT NULL,            -- stdout, stderr
    acked INTEGER NOT NULL DEFAULT 0,
    length INTEGER,                  -- of the whole, gap included; NULL: still written
    gap INTEGER NOT NULL DEFAULT 0,  -- bytes missing at the end; -1: some, the number can't be known
    PRIMARY KEY (run_id, step, attempt, stream)
) STRICT;
"""

STREAMS: tuple[StreamName, ...] = ("stdout", "stderr")
WIRE_STREAM = {"stdout": types.LOG_STREAM_STDOUT, "stderr": types.LOG_STREAM_STDERR}
_QUEUE_BYTES = 8 * 1024**2


@dataclass(frozen=True, slots=True)
class LogKey:
    """A log is one stream of one attempt."""

    run_id: str
    step: str
    attempt: int
    stream: StreamName


class LogFile:
    """One log. ``accepted`` bytes were taken, ``written`` of them can be read back, ``acked`` the server has."""

    def __init__(self, key: LogKey, path: Path, acked: int = 0) -> None:
        self.key = key
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        self.accepted = size
        self.written = size
        self.acked = acked
        self.length: int | None = None
        self.gap = 0
        self.sent = acked  # of the present stream to the server; begins anew with each
        self.gap_sent = False
        self.aside = False  # the server has no run for it; it is offered again in the next session
        self.broken = False  # the disk refused a write: what comes after it would stand in the wrong place
        self.descriptor: int | None = None

    @property
    def done(self) -> bool:
        """Nothing will be added."""
        return self.length is not None

    @property
    def settled(self) -> bool:
        """Done, and the server has all of it, or will never have it."""
        if self.length is None:
            return False
        return self.aside or (self.acked >= self.length and (self.gap_sent or self.gap >= 0))

    @property
    def unsent(self) -> bool:
        """There is something to send: bytes, or the gap at the end."""
        if self.aside:
            return False
        return self.sent < self.written or (self.length is not None and bool(self.gap) and not self.gap_sent)


class Spool:
    """All logs under ``root``. ``max_bytes`` bounds what waits here for the server."""

    def __init__(self, root: Path, journal: Journal, *, max_bytes: int = 1024**3) -> None:
        self._root = root
        self._journal = journal
        self._max_bytes = max_bytes
        self._logs: dict[LogKey, LogFile] = {}
        self._bytes = 0
        self._queued = 0
        self._queue: queue.SimpleQueue[tuple[LogFile, bytes] | Future[None] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._load()
        self._thread = threading.Thread(target=self._write, name="spool", daemon=True)
        self._thread.start()

    @property
    def size_bytes(self) -> int:
        """Bytes kept for the server."""
        return self._bytes

    @property
    def owed_bytes(self) -> int:
        """Bytes that the server has not acknowledged; a gap that it has not heard of counts as one."""
        owed = 0
        for log in self._logs.values():
            if not log.aside and not log.settled:
                owed += max(log.accepted - log.acked, 1 if log.done else 0)
        return owed

    async def open(self, run_id: str, step: str, attempt: int) -> dict[StreamName, LogFile]:
        """Both logs of an attempt, new or as they were when the agent stopped."""
        keys = [LogKey(run_id, step, attempt, stream) for stream in STREAMS]
        missing = [key for key in keys if key not in self._logs]
        for key in missing:
            self._logs[key] = LogFile(key, self._path(key))
        if missing:
            rows = [(key.run_id, key.step, key.attempt, key.stream) for key in missing]
            sql = "INSERT OR IGNORE INTO logs (run_id, step, attempt, stream) VALUES (?, ?, ?, ?)"
            # Not awaited: the log's row needs to be there before its end is recorded, and the writer keeps the order.
            self._journal.submit(Transition.LOG_OPENED, lambda db: db.executemany(sql, rows) and None)
        return {key.stream: self._logs[key] for key in keys}

    def has_file(self, run_id: str, step: str, attempt: int) -> bool:
        """Whether something of this attempt lies here, known or not."""
        return any(self._path(LogKey(run_id, step, attempt, stream)).exists() for stream in STREAMS)

    def append(self, log: LogFile, data: bytes) -> bool:
        """Take ``data``, or refuse it (False): too much is queued, or the spool is full. Never waits."""
        if log.broken or self.full(len(data)) or self._queued + len(data) > _QUEUE_BYTES:
            return False
        log.accepted += len(data)
        self._queued += len(data)
        self._bytes += len(data)
        self._queue.put((log, data))
        return True

    def full(self, size: int = 1) -> bool:
        """Whether ``size`` more bytes are too many until the server has taken some."""
        return self._bytes + size > self._max_bytes

    async def flush(self) -> None:
        """Until everything taken so far can be read back."""
        future: Future[None] = Future()
        self._queue.put(future)
        await asyncio.wrap_future(future)

    def mend(self, log: LogFile) -> None:
        """Go on with a log that the disk refused, once it is flushed: what was refused counts as not taken."""
        self._bytes -= log.accepted - log.written
        log.accepted = log.written
        log.broken = False

    def finished(self, log: LogFile, *, gap: int = 0) -> Callable[[sqlite3.Connection], object]:
        """The log has ended and is flushed (a change for `State.commit`); ``gap`` bytes are missing, -1: unknown."""
        if log.written < log.accepted and gap >= 0:
            gap += log.accepted - log.written
        log.accepted = log.written
        log.gap = gap
        log.length = log.accepted + max(0, gap)
        key = (log.key.run_id, log.key.step, log.key.attempt, log.key.stream)
        if log.settled:  # it is empty, or the server has kept up
            self._drop(log)
            sql = "DELETE FROM logs WHERE run_id = ? AND step = ? AND attempt = ? AND stream = ?"
            return lambda db: db.execute(sql, key)
        row = (log.length, gap, *key)
        self._changed.set()
        return lambda db: db.execute(
            "UPDATE logs SET length = ?, gap = ? WHERE run_id = ? AND step = ? AND attempt = ? AND stream = ?", row
        )

    def abandon(self, run_id: str) -> list[Callable[[sqlite3.Connection], object]]:
        """Nobody will write on the logs of this run any more: what they lack can't be known (changes for a commit)."""
        open_logs = [log for log in self._logs.values() if log.key.run_id == run_id and not log.done]
        return [self.finished(log, gap=-1) for log in open_logs]

    async def sync(self, logs: Iterable[LogFile]) -> None:
        """Put them on the disk: from then on the engine's copy is not needed any more."""
        paths = [log.path for log in logs if log.path.exists()]
        await asyncio.to_thread(_sync, paths)

    def pending(self) -> list[LogFile]:
        """Logs that have something to send, the oldest first."""
        return [log for log in self._logs.values() if log.unsent]

    def read(self, log: LogFile, offset: int, limit: int) -> bytes:
        """Bytes from ``offset``, at most ``limit``; none beyond what is written."""
        count = min(limit, log.written - offset)
        if count <= 0:
            return b""
        with log.path.open("rb") as file:
            return os.pread(file.fileno(), count, offset)

    async def acknowledge(self, key: LogKey, offset: int) -> None:
        """The server has everything before ``offset``. A log that is done and all there is forgotten."""
        log = self._logs.get(key)
        if log is None:
            return
        log.acked = max(offset, log.acked)
        log.sent = max(log.sent, log.acked)
        if not log.settled:
            return
        self._drop(log)
        row = (key.run_id, key.step, key.attempt, key.stream)
        sql = "DELETE FROM logs WHERE run_id = ? AND step = ? AND attempt = ? AND stream = ?"
        await self._journal.write(Transition.LOG_ACKNOWLEDGED, lambda db: db.execute(sql, row) and None)

    async def forget_settled(self) -> None:
        """Drop the logs that have ended and are all there, on both sides."""
        for log in [each for each in self._logs.values() if each.settled]:
            await self.acknowledge(log.key, log.acked)

    def rewind(self) -> None:
        """Send again from what is acknowledged."""
        for log in self._logs.values():
            log.sent = log.acked
            log.gap_sent = False
            log.aside = False
        self._changed.set()

    def go_back(self, key: LogKey, offset: int) -> None:
        """The server has only what is before ``offset``, whatever it said before: it was restored from a backup."""
        log = self._logs.get(key)
        if log is not None:
            log.acked = log.sent = offset
            log.gap_sent = False
            self._changed.set()

    def set_aside(self, run_id: str) -> None:
        """The server does not know this run: send nothing of it in this session. What is done of it is forgotten."""
        for log in self._logs.values():
            if log.key.run_id == run_id:
                log.aside = True

    async def wait(self) -> None:
        """Until something was written or ended since the last wait."""
        await self._changed.wait()
        self._changed.clear()

    def remove_strays(self, keep: Collection[str]) -> None:
        """Drop the directories of runs that are neither in ``keep`` nor have a log that is still wanted."""
        wanted = {*keep, *(key.run_id for key in self._logs)}
        for entry in self._root.iterdir():
            if entry.name not in wanted:
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        """Write what was taken, then stop."""
        self._queue.put(None)
        self._thread.join()
        for log in self._logs.values():
            self._close(log)

    def _path(self, key: LogKey) -> Path:
        return self._root / key.run_id / key.step / f"{key.attempt}.{key.stream}"

    def _load(self) -> None:
        for row in self._journal.query_now("SELECT * FROM logs ORDER BY rowid"):
            key = LogKey(row["run_id"], row["step"], row["attempt"], cast("StreamName", row["stream"]))
            log = LogFile(key, self._path(key), row["acked"])
            if row["length"] is not None:
                log.length, log.gap = row["length"], row["gap"]
                present = log.length - max(0, log.gap)
                if log.accepted < present:  # the machine lost power before the file was on the disk
                    log.gap = log.length - log.accepted
            self._logs[key] = log
            self._bytes += log.accepted

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Future):
                # By way of the loop, behind the counters of what was written before it.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(item.set_result, None)
                continue
            log, data = item
            written = 0
            try:
                if log.descriptor is None:
                    log.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                    log.descriptor = os.open(log.path, flags, 0o600)
                while not log.broken and written < len(data):
                    written += os.write(log.descriptor, memoryview(data)[written:])
            except OSError:
                log.broken = True  # the disk is full; what is missing is told as a gap at the end
            # The loop may be closed by now: the agent is ending, and the next one looks at the file.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wrote, log, len(data), written)

    def _wrote(self, log: LogFile, taken: int, written: int) -> None:
        self._queued -= taken
        log.written += written
        self._changed.set()

    def _drop(self, log: LogFile) -> None:
        self._logs.pop(log.key, None)
        self._bytes -= log.accepted
        self._close(log)
        log.path.unlink(missing_ok=True)
        # Each by itself: an agent that was killed at the wrong moment has left the outer one alone.
        for folder in (log.path.parent, log.path.parent.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _close(self, log: LogFile) -> None:
        if log.descriptor is not None:
            os.close(log.descriptor)
            log.descriptor = None


def _sync(paths: list[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

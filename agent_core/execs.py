"""Programs that are run inside managed containers, each once.

What is asked for has an id of the caller's; the engine's id of the execution is journalled before it is started, and
the engine starts no execution twice: whoever asks again with the same id gets the end of the one that there was. Its
output is kept for that only while this agent lives, the last of it only, and it is always read to its end, because a
program whose output nobody reads stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import sqlite3
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from agent_core.journal import Journal
from agent_core.runtimes.base import Runtime, StreamName
from agent_core.transitions import Transition
from outrider._model_errors import problems_of
from outrider.errors import Conflict, ErrorClass, InvalidInput, NotFound, OperationTimeout, OutriderError
from outrider.masking import Masker

MIGRATION = """
CREATE TABLE execs (
    key TEXT PRIMARY KEY,            -- run/step/attempt/id
    digest TEXT NOT NULL,            -- of the request
    container_id TEXT NOT NULL,
    execution TEXT NOT NULL,         -- the engine's id
    noted_at REAL NOT NULL
)
"""

_KEPT_BYTES = 256 * 1024  # of the output of each
_KEPT_OVER = 64  # that have ended
_SETTLE_S = 0.05
_SETTLES = 100
_LOOK_S = 0.5
Piece = tuple[StreamName, bytes]

log = logging.getLogger(__name__)


class ExecRequest(BaseModel):
    """A program to run inside a managed container. ``id``: asked again with it, it is not run again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    args: Annotated[tuple[str, ...], Field(min_length=1, max_length=1024)]
    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    env: dict[str, str] = Field(default_factory=dict)
    workdir: Annotated[str, StringConstraints(pattern=r"^/")] | None = None
    user: str | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0

    @field_validator("env")
    @classmethod
    def _env(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
        return env

    @classmethod
    def parse(cls, document: Any) -> ExecRequest:
        """The model from JSON; InvalidInput lists every problem."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = list(problems_of(error, cls))
            raise InvalidInput(f"the program to run is not valid: {'; '.join(map(str, problems))}", problems) from error


@dataclass(frozen=True, slots=True)
class Executed:
    """How it ended. ``whole``: whether all of its output was handed out."""

    exit_code: int
    whole: bool = True


@dataclass
class _Running:
    digest: str
    execution: str
    task: asyncio.Task[int] | None = None
    kept: deque[Piece] = field(default_factory=deque)
    kept_bytes: int = 0
    dropped: int = 0  # pieces that are not kept any more
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, piece: Piece) -> None:
        self.kept.append(piece)
        self.kept_bytes += len(piece[1])
        while self.kept_bytes > _KEPT_BYTES and len(self.kept) > 1:
            self.kept_bytes -= len(self.kept.popleft()[1])
            self.dropped += 1
        self.notify()

    def notify(self) -> None:
        former, self.changed = self.changed, asyncio.Event()
        former.set()


class Execs:
    """The executions of one node."""

    def __init__(self, runtime: Runtime, journal: Journal) -> None:
        self._runtime = runtime
        self._journal = journal
        self._running: dict[str, _Running] = {}

    async def run(
        self, owner: str, container_id: str, request: ExecRequest, secret_values: Sequence[str]
    ) -> AsyncGenerator[Piece | Executed, None]:
        """Run it, or find the one of this id: its output, and `Executed` last. ``owner``: run/step/attempt.

        Raises Conflict for an id that something else was asked with, OperationTimeout (a permanent one) if it takes too
        long (it is killed then), NotFound if it was carried out and nobody knows how it ended, because its container is
        gone.
        """
        key = f"{owner}/{request.id or secrets.token_hex(8)}"
        digest = _digest(container_id, request)
        running = self._running.get(key)
        known = None if running else self._known(key)
        if digest not in ((running.digest,) if running else (known["digest"],) if known else (digest,)):
            raise Conflict(
                f"with the id {request.id} something else was asked to be run", code="id_reused", hint="use another id"
            )
        if running is None:
            running = await self._begin(key, digest, container_id, request, secret_values, known)
        position = running.dropped
        whole = position == 0
        while True:
            changed = running.changed
            if position < running.dropped:
                position, whole = running.dropped, False
            while position - running.dropped < len(running.kept):
                yield running.kept[position - running.dropped]
                position += 1
                if position < running.dropped:
                    position, whole = running.dropped, False
            assert running.task is not None
            if running.task.done() and position - running.dropped >= len(running.kept):
                yield Executed(running.task.result(), whole)
                return
            if changed is running.changed:
                await changed.wait()

    async def end(self, owner: str) -> None:
        """The attempt is over: what it runs inside containers is killed, and forgotten."""
        prefix = f"{owner}/"
        rows = await self._journal.query(
            "SELECT key, execution FROM execs WHERE substr(key, 1, ?) = ?", (len(prefix), prefix)
        )
        for row in rows:
            try:
                await kill(self._runtime, str(row["execution"]))
            except NotFound:
                continue
            except OutriderError as error:
                log.warning("a program in a container could not be ended: %s", error)
        for key in [key for key in self._running if key.startswith(prefix)]:
            found = self._running.pop(key)
            if found.task is not None:
                found.task.cancel()
        if rows:
            sql = "DELETE FROM execs WHERE substr(key, 1, ?) = ?"
            await self._journal.execute(Transition.EXEC_FORGOTTEN, sql, (len(prefix), prefix))

    def owners(self) -> set[str]:
        """The attempts that have run something."""
        return {str(row["key"]).rpartition("/")[0] for row in self._journal.query_now("SELECT key FROM execs")}

    async def aclose(self) -> None:
        """The agent stops; the programs go on."""
        tasks = [each.task for each in self._running.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running.clear()

    # Inside.

    async def _begin(
        self,
        key: str,
        digest: str,
        container_id: str,
        request: ExecRequest,
        secret_values: Sequence[str],
        known: sqlite3.Row | None,
    ) -> _Running:
        # Before anything is waited for: two that ask at once are one.
        running = self._running[key] = _Running(digest, "" if known is None else str(known["execution"]))
        running.task = asyncio.create_task(
            self._see_through(key, digest, container_id, request, secret_values, running), name=f"exec {key}"
        )

        def done(task: asyncio.Task[int]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self._running.pop(key, None)  # asked again, it is looked up anew
            running.notify()
            over = [each for each, other in self._running.items() if other.task is not None and other.task.done()]
            for each in over[:-_KEPT_OVER]:
                self._running.pop(each)

        running.task.add_done_callback(done)
        return running

    async def _see_through(
        self,
        key: str,
        digest: str,
        container_id: str,
        request: ExecRequest,
        secret_values: Sequence[str],
        running: _Running,
    ) -> int:
        if not running.execution:
            running.execution = await self._runtime.exec_create(
                container_id, request.args, env=request.env, workdir=request.workdir, user=request.user
            )
            await self._note(key, digest, container_id, running.execution)
        maskers: dict[StreamName, Masker] = {"stdout": Masker(secret_values), "stderr": Masker(secret_values)}
        try:
            async with asyncio.timeout(request.timeout_s):
                try:
                    async with self._runtime.exec_start(running.execution) as pieces:
                        async for stream, data in pieces:
                            if masked := maskers[stream].feed(data):
                                running.add((stream, masked))
                except Conflict as error:
                    if error.code != "exec_started":
                        raise
                    running.dropped += 1  # a former agent had its output
                for stream, masker in maskers.items():
                    if rest := masker.flush():
                        running.add((stream, rest))
                return await self._ended(running.execution)
        except TimeoutError:
            killed = await kill(self._runtime, running.execution)
            over = OperationTimeout(
                f"{request.args[0]} did not end within {request.timeout_s:g} s"
                f"{', and was killed' if killed else ' and could not be killed'}",
                code="exec_timeout",
            )
            # Nothing is left to look up: it was begun, and how much of it was done nobody knows. The next attempt
            # has ids of its own, and would do that once more.
            over.error_class = ErrorClass.PERMANENT
            raise over from None

    async def _ended(self, execution: str) -> int:
        looks = 0
        while True:
            info = await self._runtime.exec_inspect(execution)
            if not info.running and info.exit_code is not None:
                return info.exit_code
            looks += 1
            # The end of the output comes a moment before the engine knows the exit code.
            await asyncio.sleep(_SETTLE_S if looks < _SETTLES else _LOOK_S)

    async def _note(self, key: str, digest: str, container_id: str, execution: str) -> None:
        # It goes with its attempt, whose end may be long in coming, and by no age.
        sql = "INSERT OR REPLACE INTO execs (key, digest, container_id, execution, noted_at) VALUES (?, ?, ?, ?, ?)"
        row = (key, digest, container_id, execution, time.time())
        await self._journal.execute(Transition.EXEC_INTENDED, sql, row)

    def _known(self, key: str) -> sqlite3.Row | None:
        rows = self._journal.query_now("SELECT * FROM execs WHERE key = ?", (key,))
        return rows[0] if rows else None


async def run_briefly(
    runtime: Runtime, container: str, args: Sequence[str], *, timeout_s: float
) -> tuple[int | None, bytes]:
    """Run a program inside a container: its exit code, and the last 4 KiB of what it printed.

    None: it did not end within ``timeout_s`` and was killed. Raises what the engine raises.
    """
    execution = await runtime.exec_create(container, args)
    said = b""
    try:
        async with asyncio.timeout(timeout_s):
            async with runtime.exec_start(execution) as pieces:
                async for _, data in pieces:
                    said = (said + data)[-4096:]
            while True:
                info = await runtime.exec_inspect(execution)
                if not info.running and info.exit_code is not None:
                    return info.exit_code, said
                await asyncio.sleep(_SETTLE_S)
    except TimeoutError:
        with contextlib.suppress(NotFound):
            await kill(runtime, execution)
        return None, said


async def kill(runtime: Runtime, execution: str) -> bool:
    """SIGKILL to the process of an execution, which the engine has no call for; whether it was sent.

    Its number may be another process's by now. So the process is held by a descriptor first, and then the engine is
    asked once more: does it still run with that number, the descriptor is its own.
    """
    info = await runtime.exec_inspect(execution)
    if not info.running or info.pid <= 1:
        return False
    try:
        descriptor = os.pidfd_open(info.pid)
    except OSError:
        return False
    try:
        if await runtime.exec_inspect(execution) != info:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError as error:
        log.warning("a program in a container can't be killed: %s", error.strerror)
        return False
    finally:
        os.close(descriptor)
    return True


def _digest(container_id: str, request: ExecRequest) -> str:
    document = {"container": container_id, **request.model_dump(mode="json", exclude={"id", "timeout_s"})}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

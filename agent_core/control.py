"""The control socket of one attempt: HTTP with JSON on a Unix socket, beside the attempt's other files.

Every request is answered on behalf of the attempt's scope; what a request does is journalled by `Containers`
and idempotent, so that a program may simply ask again when its connection breaks (the agent was restarted).

    GET    /v1/containers                        the managed containers of this run or object
    POST   /v1/containers                        start; the body is a `ManagedSpec`, with "replace" beside it
    GET    /v1/containers/{name}
    DELETE /v1/containers/{name}?force=1
    POST   /v1/containers/{name}/stop|restart    body {"grace_s": 10}
    POST   /v1/containers/{name}/exec            run a program inside it; the body is an `ExecRequest`
    POST   /v1/containers/{name}/wait            answers when it has ended; body {"timeout_s": 60}
    GET    /v1/containers/{name}/logs?tail=100   the log, as bytes; the last 4 MiB of it at most
    GET    /v1/containers/{name}/logs?all=1      the whole log, and with follow=1 what comes, as a stream

With ``Accept: application/x-ndjson`` start and exec answer at once with lines of JSON: progress of the pull, or what
the program prints, and at last ``{"result": …}`` or ``{"error": …}``. docs/control-socket.md is for authors.

Errors have the body ``{"error": "one sentence", "code", "hint", "temporary", "problems"}``.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from agent_core.container_spec import ContainerScope, ManagedSpec, Replace
from agent_core.containers import Containers, Started
from agent_core.execs import ExecRequest, Executed
from agent_core.images import Tell
from agent_core.runtimes.base import ContainerInfo
from outrider.errors import (
    Conflict,
    ErrorClass,
    InvalidInput,
    NotFound,
    OperationTimeout,
    OutriderError,
    PermissionDenied,
    PolicyViolation,
    TemporaryError,
)

SOCKET_NAME = "control.sock"
_MAX_BODY = 1024**2
_MAX_LOG_TAIL = 10_000
_MAX_LOG_BYTES = 4 * 1024**2
_MAX_EXEC_BYTES = 64 * 1024  # of each stream, in an answer in one piece
_PROGRESS_S = 0.5
_LINES = "application/x-ndjson"
_REPLACE: Mapping[str | bool, Replace] = {
    False: "no", "no": "no", True: "stop-first", "stop-first": "stop-first", "start-first": "start-first"
}  # fmt: skip
_MAX_CONNECTIONS = 32  # of one attempt; each takes one of the agent's descriptors

_STATUS: tuple[tuple[type[OutriderError], int], ...] = (
    (InvalidInput, 400),
    (NotFound, 404),
    (Conflict, 409),
    (PermissionDenied, 403),
    (PolicyViolation, 403),
    (TemporaryError, 503),
    (OperationTimeout, 504),
)


class ControlSocket:
    """Serves one attempt in ``directory`` (the one mounted at /outrider), from `start` until `aclose`."""

    def __init__(self, containers: Containers, scope: ContainerScope, directory: Path) -> None:
        self._containers = containers
        self._scope = scope
        self._directory = directory
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._starts: set[asyncio.Task[Started]] = set()

    async def start(self) -> None:
        """Bind; a socket left by a former agent in the same directory is replaced."""
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[_errors])
        app.add_routes(
            [
                web.get("/v1/containers", self._list),
                web.post("/v1/containers", self._start),
                web.get("/v1/containers/{name}", self._inspect),
                web.delete("/v1/containers/{name}", self._remove),
                web.post("/v1/containers/{name}/stop", self._stop),
                web.post("/v1/containers/{name}/restart", self._restart),
                web.post("/v1/containers/{name}/exec", self._exec),
                web.post("/v1/containers/{name}/wait", self._wait),
                web.get("/v1/containers/{name}/logs", self._logs),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        listener = await asyncio.to_thread(self._bind)
        try:
            served = runner.server
            assert served is not None

            def accept() -> asyncio.BaseProtocol:
                return _Refusal() if len(served.connections) >= _MAX_CONNECTIONS else served()

            self._listening = await asyncio.get_running_loop().create_unix_server(accept, sock=listener, backlog=16)
        except BaseException:
            listener.close()
            await runner.cleanup()
            raise
        self._runner = runner

    async def aclose(self, *, attempt_over: bool) -> None:
        """Stop serving. With ``attempt_over``, undo what the attempt began to start and did not finish; without
        (the agent stops), everything is left for the next agent."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        # The server forgets a request whose connection is gone, and the program that asked mostly is by now. Left to
        # itself its container might get ready, and would be kept, after the attempt that wanted it.
        await _cancelled(self._starts)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if attempt_over:
            await self._containers.end_attempt(self._scope)

    def _bind(self) -> socket.socket:
        """A listening socket that the step's user alone may use.

        Bound through the directory's descriptor: the path of a Unix socket is limited to 107 bytes, that of a
        state directory is not.
        """
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET_NAME, dir_fd=directory)
            listener.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            os.chmod(f"/proc/self/fd/{directory}/{SOCKET_NAME}", 0o600)
            if os.geteuid() == 0:
                os.chown(SOCKET_NAME, self._scope.uid, self._scope.gid, dir_fd=directory, follow_symlinks=False)
            listener.setblocking(False)
            listener.listen(16)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(directory)
        return listener

    async def _list(self, request: web.Request) -> web.Response:
        found = await self._containers.list(self._scope)
        return web.json_response({"containers": [describe(info) for info in found]})

    async def _start(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        again = body.pop("replace", "no")
        strategy = _REPLACE.get(again) if isinstance(again, str | bool) else None
        if strategy is None:
            raise InvalidInput(
                f"replace: {again!r} is no way to replace a container", hint='"no", "stop-first" or "start-first"'
            )
        spec = ManagedSpec.parse(body)
        if _wants_lines(request):
            return await _Lines(request).answer(lambda lines: self._start_telling(spec, strategy, lines))
        async with self._starting(spec, strategy) as starting:
            return web.json_response(asdict(await starting))

    @contextlib.asynccontextmanager
    async def _starting(
        self, spec: ManagedSpec, strategy: Replace, tell: Tell | None = None
    ) -> AsyncIterator[asyncio.Task[Started]]:
        """A start under way, which ends with the context. What was begun then is undone when the attempt is over."""
        start = self._containers.start(spec, self._scope, replace=strategy, tell=tell)
        task = asyncio.create_task(start, name=f"start {spec.name}")
        self._starts.add(task)
        try:
            yield task
        finally:
            await _cancelled({task})
            self._starts.discard(task)

    async def _start_telling(self, spec: ManagedSpec, strategy: Replace, lines: _Lines) -> dict[str, Any]:
        """Start, and tell how the pull goes on: the newest state, as often as the reader takes it."""
        pulled = _Newest()
        async with self._starting(spec, strategy, pulled.set) as starting:
            while not starting.done():
                news = asyncio.create_task(pulled.next())
                await asyncio.wait({starting, news}, return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    done, total, sentence = news.result()
                    if sentence:
                        await lines.send({"pull": {"done": done, "total": total or None, "message": sentence}})
                    await asyncio.wait({starting}, timeout=_PROGRESS_S)
                else:
                    news.cancel()
            return asdict(starting.result())

    async def _inspect(self, request: web.Request) -> web.Response:
        return web.json_response(describe(await self._containers.inspect(_name(request), self._scope)))

    async def _remove(self, request: web.Request) -> web.Response:
        await self._containers.remove(_name(request), force=_flag(request, "force"), scope=self._scope)
        return web.json_response({})

    async def _stop(self, request: web.Request) -> web.Response:
        grace_s = await _grace(request)
        return web.json_response(
            describe(await self._containers.stop(_name(request), grace_s=grace_s, scope=self._scope))
        )

    async def _restart(self, request: web.Request) -> web.Response:
        grace_s = await _grace(request)
        return web.json_response(
            describe(await self._containers.restart(_name(request), grace_s=grace_s, scope=self._scope))
        )

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        wanted, name = ExecRequest.parse(await _body(request)), _name(request)
        if _wants_lines(request):
            return await _Lines(request).answer(lambda lines: self._exec_telling(name, wanted, lines))
        kept: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        truncated = False
        async with contextlib.aclosing(self._containers.execute(name, wanted, self._scope)) as items:
            async for item in items:
                if isinstance(item, Executed):
                    return web.json_response(
                        {
                            "exit_code": item.exit_code,
                            **{stream: data.decode("utf-8", "replace") for stream, data in kept.items()},
                            "truncated": truncated or not item.whole,
                        }
                    )
                stream, data = item
                kept[stream] += data
                if len(kept[stream]) > _MAX_EXEC_BYTES:
                    truncated = True
                    del kept[stream][:-_MAX_EXEC_BYTES]
        raise OutriderError(f"how {wanted.args[0]} ended is not known", code="exec_lost")

    async def _exec_telling(self, name: str, wanted: ExecRequest, lines: _Lines) -> dict[str, Any]:
        decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in ("stdout", "stderr")}
        async with contextlib.aclosing(self._containers.execute(name, wanted, self._scope)) as items:
            async for item in items:
                if isinstance(item, Executed):
                    return {"exit_code": item.exit_code, "truncated": not item.whole}
                stream, data = item
                await lines.send({stream: decoders[stream].decode(data)})
        raise OutriderError(f"how {wanted.args[0]} ended is not known", code="exec_lost")

    async def _wait(self, request: web.Request) -> web.Response:
        timeout_s = _seconds(await _body(request), "timeout_s", 86400)
        try:
            async with asyncio.timeout(timeout_s):
                end = await self._containers.wait(_name(request), self._scope)
        except TimeoutError:
            raise OperationTimeout(
                f"the container {_name(request)} has not ended within {timeout_s:g} s", code="wait_timeout"
            ) from None
        return web.json_response(
            {"exit_code": end.exit_code, "oom_killed": end.oom_killed, "engine_stopped": end.engine_stopped}
        )

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        if _flag(request, "all"):
            return await self._all_logs(request)
        tail = request.query.get("tail", "100")
        if not tail.isdecimal() or int(tail) > _MAX_LOG_TAIL:
            raise InvalidInput(f"tail={tail}: a number of lines up to {_MAX_LOG_TAIL}")
        data = bytearray()
        async with contextlib.aclosing(
            self._containers.logs(_name(request), tail=int(tail), scope=self._scope)
        ) as pieces:
            async for _, piece in pieces:
                data += piece
                if len(data) > 2 * _MAX_LOG_BYTES:
                    del data[:-_MAX_LOG_BYTES]
        return web.Response(body=bytes(data[-_MAX_LOG_BYTES:]), content_type="application/octet-stream")

    async def _all_logs(self, request: web.Request) -> web.StreamResponse:
        """As it comes, and no faster than it is read; what ends too early ends without its last chunk."""
        source = self._containers.logs(_name(request), follow=_flag(request, "follow"), scope=self._scope)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        async with contextlib.aclosing(source) as pieces:
            async for _, piece in pieces:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(piece)
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        return response


async def _cancelled(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Newest:
    """Of many values the newest, for who comes for it from time to time."""

    def __init__(self) -> None:
        self._value: tuple[int, int, str] | None = None
        self._there = asyncio.Event()

    def set(self, done: int, total: int, sentence: str) -> None:
        self._value = (done, total, sentence)
        self._there.set()

    async def next(self) -> tuple[int, int, str]:
        await self._there.wait()
        self._there.clear()
        assert self._value is not None
        return self._value


class _Lines:
    """An answer as lines of JSON: its status is 200 before anything is known, and its last line says how it went."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={"Content-Type": _LINES})

    async def answer(self, work: Callable[[_Lines], Awaitable[dict[str, Any]]]) -> web.StreamResponse:
        """Send what ``work`` sends, and at last its result or its error."""
        await self._response.prepare(self._request)
        try:
            await self.send({"result": await work(self)})
        except OutriderError as error:
            await self.send({"error": error_body(error), "status": status_of(error)})
        await self._response.write_eof()
        return self._response

    async def send(self, document: dict[str, Any]) -> None:
        """One line."""
        await self._response.write(json.dumps(document).encode() + b"\n")


def describe(info: ContainerInfo) -> dict[str, Any]:
    """A container as JSON; the same for every program that asks."""
    return {
        "id": info.id,
        "name": info.name,
        "image": info.image,
        "state": info.state,
        "exit_code": info.exit_code,
        "oom_killed": info.oom_killed,
        "restart_count": info.restart_count,
        "health": info.health,
        "ports": {port.name or f"{port.container}/{port.protocol}": port.host for port in info.ports},
        "started_at": info.started_at.isoformat() if info.started_at else None,
    }


def _name(request: web.Request) -> str:
    return request.match_info["name"]


async def _body(request: web.Request) -> dict[str, Any]:
    data = await request.read()
    if not data:
        return {}
    try:
        body = json.loads(data.decode())  # UTF-8, whatever the client says: JSON has no other
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object")
    return body


async def _grace(request: web.Request) -> float | None:
    return _seconds(await _body(request), "grace_s", 3600)


def _seconds(body: dict[str, Any], name: str, most: int) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InvalidInput(f"{name} must be a number of seconds from 0 to {most}")
    return float(value)


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "0") not in ("", "0", "false")


def _wants_lines(request: web.Request) -> bool:
    return _LINES in request.headers.get("Accept", "")


class _Refusal(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _failure(error.status, OutriderError(f"{request.method} {request.path}: {error.reason}", code="http"))
    except OutriderError as error:
        return _failure(status_of(error), error)


def status_of(error: OutriderError) -> int:
    """HTTP's status for an error."""
    return next((number for kind, number in _STATUS if isinstance(error, kind)), 422)


def error_body(error: OutriderError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "error": error.message,
        "code": error.code,
        "hint": error.hint,
        "temporary": error.error_class is not ErrorClass.PERMANENT,
        "problems": [str(problem) for problem in getattr(error, "problems", ())],
    }


def _failure(status: int, error: OutriderError) -> web.Response:
    return web.json_response(error_body(error), status=status)

"""The control socket of one attempt: HTTP with JSON on a Unix socket, beside the attempt's other files.

Every request is answered on behalf of the attempt's scope; what a request does is journalled by `Containers`
and idempotent, so that a program may simply ask again when its connection breaks (the agent was restarted).

    GET    /v1/containers                        the managed containers of this run or object
    POST   /v1/containers                        start; the body is a `ManagedSpec`, with "replace" beside it
    GET    /v1/containers/{name}
    DELETE /v1/containers/{name}?force=1
    POST   /v1/containers/{name}/stop|restart    body {"grace_s": 10}
    POST   /v1/containers/{name}/wait            answers when it has ended
    GET    /v1/containers/{name}/logs?tail=100   the log, as bytes; the last 4 MiB of it at most

Errors have the body ``{"error": "one sentence", "code", "hint", "temporary", "problems"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from agent_core.container_spec import ContainerScope, ManagedSpec
from agent_core.containers import Containers
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

    async def _start(self, request: web.Request) -> web.Response:
        body = await _body(request)
        again = body.pop("replace", False)
        if not isinstance(again, bool):
            raise InvalidInput("replace must be true or false")
        started = await self._containers.start(ManagedSpec.parse(body), self._scope, replace=again)
        return web.json_response(
            {
                "id": started.id,
                "name": started.name,
                "image": started.image,
                "ports": started.ports,
                "address": started.address,
                "adopted": started.adopted,
            }
        )

    async def _inspect(self, request: web.Request) -> web.Response:
        return web.json_response(describe(await self._containers.inspect(_name(request), self._scope)))

    async def _remove(self, request: web.Request) -> web.Response:
        force = request.query.get("force", "0") not in ("", "0", "false")
        await self._containers.remove(_name(request), force=force, scope=self._scope)
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

    async def _wait(self, request: web.Request) -> web.Response:
        end = await self._containers.wait(_name(request), self._scope)
        return web.json_response(
            {"exit_code": end.exit_code, "oom_killed": end.oom_killed, "engine_stopped": end.engine_stopped}
        )

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        tail = request.query.get("tail", "100")
        if not tail.isdigit() or int(tail) > _MAX_LOG_TAIL:
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
    grace_s = (await _body(request)).get("grace_s")
    if grace_s is None:
        return None
    if isinstance(grace_s, bool) or not isinstance(grace_s, int | float) or not 0 <= grace_s <= 3600:
        raise InvalidInput("grace_s must be a number of seconds from 0 to 3600")
    return float(grace_s)


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
        return _failure(next((number for kind, number in _STATUS if isinstance(error, kind)), 422), error)


def _failure(status: int, error: OutriderError) -> web.Response:
    return web.json_response(
        {
            "error": error.message,
            "code": error.code,
            "hint": error.hint,
            "temporary": error.error_class is not ErrorClass.PERMANENT,
            "problems": [str(problem) for problem in getattr(error, "problems", ())],
        },
        status=status,
    )

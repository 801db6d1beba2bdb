"""HTTP to a container engine at a Unix socket, on the event loop.

Calls and streams alike are made with aiohttp: a call that hangs holds a connection of its own and nobody else.
Connections of calls are kept and used again; an answer that streams has one to itself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import docker.utils

from agent_core.runtimes import _docker_wire as wire
from agent_core.runtimes._docker_wire import Json
from outrider.errors import OperationTimeout, PermanentError

_VERSIONS = ("1.41", "1.44")  # the oldest that has all we use; the oldest that engines from 29 on still speak
_KEEP_S = 5.0


class EngineHttp:
    """One engine's API. Every error is an OutriderError; ``doing`` and ``subject`` word it ("start", a name)."""

    def __init__(self, socket_path: str, *, timeout_s: float) -> None:
        self.url = f"unix://{socket_path}"
        self._socket = socket_path
        self._timeout_s = timeout_s
        self._version = ""
        self._calls: aiohttp.ClientSession | None = None
        self._streams: aiohttp.ClientSession | None = None

    async def call(
        self,
        method: str,
        path: str,
        *,
        doing: str,
        subject: str,
        parameters: Mapping[str, object] | None = None,
        body: Json | None = None,
        within_s: float = 0.0,
    ) -> Any:
        """The decoded answer, None if it is empty. ``within_s``: what the call takes by nature, beside its timeout."""
        prefix = await self.prefix()
        return await self._exchange(method, prefix + path, doing, subject, parameters, body, within_s)

    async def prefix(self) -> str:
        """How paths begin, with the version that the engine speaks."""
        if not self._version:
            answer = await self._exchange("GET", "/version", "ask about itself", "", None, None, 0.0)
            spoken = str((answer or {}).get("ApiVersion") or _VERSIONS[0])
            self._version = spoken if docker.utils.version_lt(spoken, _VERSIONS[1]) else _VERSIONS[1]
        return f"/v{self._version}"

    def forget_version(self) -> None:
        """Ask again with the next call: another engine may stand behind the socket."""
        self._version = ""

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, object] | Sequence[tuple[str, str]],
        doing: str,
        *,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
        data: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer without an end in sight; errors while it is read are translated too. ``data``: what is sent."""
        prefix = await self.prefix()
        if self._streams is None:
            connector = aiohttp.UnixConnector(self._socket, force_close=True, limit=0)
            self._streams = aiohttp.ClientSession(connector=connector, read_bufsize=2**18, auto_decompress=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_s)
        try:
            async with self._streams.request(
                method,
                f"http://docker{prefix}{path}",
                params=query(parameters) if isinstance(parameters, Mapping) else list(parameters),
                data=data,
                headers=headers,
                timeout=timeout,
            ) as response:
                if response.status >= 400:
                    raise wire.translate_answer(response.status, _message(response, await response.read()), doing, "")
                yield response
        except aiohttp.ClientPayloadError as error:
            raise wire.unavailable(self.url, "it closed the connection") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise wire.unavailable(self.url, error) from error

    async def aclose(self) -> None:
        for session in (self._calls, self._streams):
            if session is not None:
                await session.close()
        self._calls = self._streams = None

    async def _exchange(
        self,
        method: str,
        path: str,
        doing: str,
        subject: str,
        parameters: Mapping[str, object] | None,
        body: Json | None,
        within_s: float,
    ) -> Any:
        if self._calls is None:
            connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=_KEEP_S)
            self._calls = aiohttp.ClientSession(connector=connector)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._calls.request(
                method,
                f"http://docker{path}",
                params=query(parameters or {}),
                data=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._timeout_s + within_s, sock_connect=10),
            ) as response:
                data = await response.read()
        except TimeoutError as error:
            raise OperationTimeout(
                f"the container engine did not answer in time: {doing} {subject}".rstrip()
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise wire.unavailable(self.url, error) from error
        if response.status >= 400:
            raise wire.translate_answer(response.status, _message(response, data), doing, subject)
        try:
            return json.loads(data) if data.strip() else None
        except ValueError as error:
            raise PermanentError(
                f"the container engine's answer can't be understood ({doing} {subject}): {error}"
            ) from error


def query(parameters: Mapping[str, object]) -> dict[str, str]:
    """Query parameters; mappings as JSON, the way the engine wants filters."""
    return {
        name: json.dumps(value) if isinstance(value, dict | list) else str(value) for name, value in parameters.items()
    }


def _message(response: aiohttp.ClientResponse, data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode("utf-8", "replace").strip() or str(response.reason)

"""The engine's streams on the event loop: output frames, hijacked connections, chunked answers.

A stream in a thread costs a thread each and can't be cancelled; these are plain non-blocking sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import aiohttp

from agent_core.runtimes._docker_wire import Json
from agent_core.runtimes.base import StreamName
from outrider.errors import EngineUnavailable, OperationTimeout, PermanentError

_CHUNK = 256 * 1024
_HEADER = struct.Struct(">BxxxI")
_STREAMS: dict[int, StreamName] = {0: "stdout", 1: "stdout", 2: "stderr"}


class Demultiplexer:
    """Takes the engine's stream apart: frames of an 8-byte header (stream, big-endian length) and a payload.

    Source: Docker Engine API, "Attach to a container", stream format. What belongs to one stream and came in
    one piece is handed on in one piece; a frame need not be complete to be handed on.
    """

    def __init__(self) -> None:
        self._header = b""
        self._stream: StreamName = "stdout"
        self._left = 0

    def feed(self, data: bytes) -> list[tuple[StreamName, bytes]]:
        """The payloads in ``data``, in order."""
        pieces: list[tuple[StreamName, bytearray]] = []
        position, end = 0, len(data)
        while position < end:
            if self._left == 0:
                taken = min(_HEADER.size - len(self._header), end - position)
                self._header += data[position : position + taken]
                position += taken
                if len(self._header) < _HEADER.size:
                    break
                number, self._left = _HEADER.unpack(self._header)
                self._header = b""
                if number not in _STREAMS:
                    raise PermanentError(f"the container engine sent output in an unknown format (stream {number})")
                self._stream = _STREAMS[number]
                continue
            taken = min(self._left, end - position)
            if pieces and pieces[-1][0] == self._stream:
                pieces[-1][1].extend(data[position : position + taken])
            else:
                pieces.append((self._stream, bytearray(data[position : position + taken])))
            position += taken
            self._left -= taken
        return [(stream, bytes(piece)) for stream, piece in pieces]


@contextlib.asynccontextmanager
async def hijack(
    socket_path: str, target: str, timeout_s: float, body: Json | None = None
) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
    """POST ``target`` and take the connection over: yields what the container writes until it ends.

    Raises OperationTimeout if the engine has not handed it over after ``timeout_s``.
    """
    reader, writer = await connect(socket_path)
    try:
        payload = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"POST {target} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        try:
            async with asyncio.timeout(timeout_s):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except TimeoutError as error:
            raise OperationTimeout("the container engine did not answer in time: attach to a container") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EngineUnavailable("the container engine closed the connection while attaching") from error
        status = head.split(" ", 2)[1]
        if status not in ("101", "200"):
            raise HijackRefused(int(status), (await reader.read(4096)).decode("utf-8", "replace"))
        yield _frames(reader)
    finally:
        writer.close()


class HijackRefused(Exception):
    """The engine did not hand the connection over; its status and message."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(body)
        self.status = status
        try:
            self.message = str(json.loads(body[body.index("{") : body.rindex("}") + 1])["message"])
        except (ValueError, KeyError):
            self.message = body.strip()


async def connect(socket_path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the engine; OSError if there is none."""
    return await asyncio.open_unix_connection(socket_path, limit=_CHUNK)


async def answers(socket_path: str, timeout_s: float = 5.0) -> bool:
    """Whether the engine takes a new connection and answers on it."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await connect(socket_path)
            try:
                writer.write(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def output(response: aiohttp.ClientResponse, *, raw: bool) -> AsyncGenerator[tuple[StreamName, bytes], None]:
    """The frames of a log answer; ``raw``: of a container with a terminal, whose output has none."""
    frames = Demultiplexer()
    async for chunk in response.content.iter_any():
        if raw:
            yield "stdout", chunk
            continue
        for piece in frames.feed(chunk):
            yield piece


async def json_lines(response: aiohttp.ClientResponse) -> AsyncGenerator[Json, None]:
    """JSON objects, one after another, as events and pulls send them."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)


def boot_identity(socket_path: str) -> str:
    """What changes when the engine restarts: its process' number and start time, and the machine's boot.

    The process is the one at the other end of the socket (``SO_PEERCRED``), or, where an init system holds
    the socket, the one named in the engine's pid file. Blocking, but only for a connect.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        probe.connect(socket_path)
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid <= 1:  # an init system's, or one in another pid namespace
        with contextlib.suppress(OSError, ValueError):
            pid = int(Path(socket_path).with_suffix(".pid").read_text(encoding="ascii"))
    machine = started = ""
    with contextlib.suppress(OSError):
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # proc(5): the start time is field 22; the name in field 2 may hold spaces and ends with ")".
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return f"{machine}/{pid}/{started}"


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[StreamName, bytes]]:
    frames = Demultiplexer()
    while chunk := await _read(reader):
        for piece in frames.feed(chunk):
            yield piece


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_CHUNK)
    except ConnectionError:
        return b""  # the engine went away; how the container ended is told by `exited`

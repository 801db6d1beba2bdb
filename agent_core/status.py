"""The local status: JSON on a Unix socket in the state directory, for `outrider agent status`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from outrider.errors import Unavailable

SOCKET_NAME = "agent.sock"
_TIMEOUT_S = 5.0


@asynccontextmanager
async def serve_status(state_dir: Path, describe: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[None]:
    """Answer every connection with what ``describe`` says, as one JSON document. Only the agent's user may ask."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                writer.write(json.dumps(await describe()).encode())
                await writer.drain()
        writer.close()

    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # By way of the descriptor: a Unix socket's path is 107 bytes at most, a state directory's may be longer.
        path = f"/proc/self/fd/{directory}/{SOCKET_NAME}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        server = await asyncio.start_unix_server(answer, path)
        os.chmod(path, 0o600)
        async with server:
            yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(SOCKET_NAME, dir_fd=directory)
        os.close(directory)


def read_status(state_dir: Path) -> dict[str, Any]:
    """What the agent on ``state_dir`` says of itself. Raises Unavailable if none runs there."""
    sentence = f"no agent runs on the state directory {state_dir}"
    try:
        directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{sentence}: {error.strerror}", code="agent_not_running") from error
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            with connection.makefile("rb") as answer:
                status: dict[str, Any] = json.loads(answer.read())
                return status
    except (OSError, ValueError) as error:
        raise Unavailable(sentence, code="agent_not_running", hint="start it with 'outrider agent run'") from error
    finally:
        os.close(directory)

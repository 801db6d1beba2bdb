"""A TCP proxy that treats what passes through it as badly as networks do.

It stands between agent and server and runs in a thread of its own:

    with Proxy() as proxy:                      # the agent dials proxy.address
        proxy.target = ("127.0.0.1", port)
        proxy.delay_s = 0.2                     # each way, order kept
        proxy.stall("up")                       # one way: nothing more gets through, and nobody is told
        proxy.flow()
        proxy.reset_every_s = 3.0               # RST to both sides of every connection, so long after it began
        proxy.truncate_after = 4000             # so many bytes each way, then the end, in the middle of a record
        proxy.hold_back()                       # what is under way now arrives later than all that is sent after it
        proxy.let_go()
        proxy.cut()                             # RST to all, now
        proxy.replay()                          # everything that was ever sent to the server, sent to it again

What it carries is TLS within TCP: the order of bytes can't be changed without ending the connection, that of
connections can: `hold_back` delivers an old one's bytes when a new one has long been there. A repeated connection is
a replay of its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T")
Way = Literal["up", "down"]  # to the server, to the agent

_CHUNK = 64 * 1024
_REPLAY_ANSWER_S = 3.0
_LINGER_NONE = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send RST


class Proxy:
    """One listener before one server. Attributes may be changed at any time, from any thread."""

    def __init__(self) -> None:
        self.target = ("127.0.0.1", 0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._links: set[_Link] = set()
        self._stalled: set[Way] = set()
        self._server: asyncio.Server | None = None
        self.delay_s = 0.0
        self.reset_every_s: float | None = None
        self.truncate_after: int | None = None
        self.refusing = False
        self.recording = False
        self.recorded: list[bytes] = []
        """What each recorded connection sent to the server."""
        self.port = 0
        self.connections = 0
        self.resets = 0
        self.truncated = 0
        self.bytes = {"up": 0, "down": 0}

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.port = self._call(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def address(self) -> str:
        """What an agent is given for the server's."""
        return f"127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def stalled(self, way: Way) -> bool:
        return way in self._stalled

    def stall(self, *ways: Way) -> None:
        """Nothing passes that way until `flow`; what comes is kept in order. No ways: both."""
        self._stalled |= set(ways or ("up", "down"))

    def flow(self) -> None:
        """End every stall."""
        self._stalled.clear()

    def hold_back(self) -> int:
        """Keep what the present connections carry until `let_go`; new ones pass. How many there are."""
        links = list(self._links)
        for link in links:
            link.held = True
        return len(links)

    def let_go(self) -> None:
        """Deliver what was held back, to whoever still listens."""
        for link in list(self._links):
            link.held = False

    def cut(self) -> int:
        """RST to both sides of all connections; how many there were."""
        return self._call(self._cut)

    def replay(self) -> list[bytes]:
        """Send the bytes of every recorded connection to the server again; what it answers to each."""
        return self._call(self._replay)

    # In the proxy's own thread.

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        self.resets += len(links)
        return len(links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _reset(writer)
            return
        link = _Link(self, (reader, writer), (far_reader, far_writer))
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)

    async def _replay(self) -> list[bytes]:
        return [await self._replay_one(sent) for sent in list(self.recorded)]

    async def _replay_one(self, sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self.target)
        writer.write(sent)
        answer = b""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_REPLAY_ANSWER_S):
                while piece := await reader.read(_CHUNK):
                    answer += piece
        _reset(writer)
        return answer

    def _call(self, work: Callable[[], object]) -> T:  # type: ignore[type-var]  # a coroutine function's result
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(30)  # type: ignore[arg-type]


class _Link:
    """One connection and its other half."""

    def __init__(
        self,
        proxy: Proxy,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._near, self._far = near, far
        self._record: bytearray | None = bytearray() if proxy.recording else None
        self.held = False

    async def run(self) -> None:
        ways = [
            asyncio.ensure_future(self._carry("up", self._near[0], self._far[1])),
            asyncio.ensure_future(self._carry("down", self._far[0], self._near[1])),
        ]
        reset_after_s = self._proxy.reset_every_s
        try:
            _, running = await asyncio.wait(ways, timeout=reset_after_s, return_when=asyncio.FIRST_COMPLETED)
            if len(running) == len(ways):
                self._proxy.resets += 1
                self.reset()
            else:
                # One side has ended; what the other still has to say gets through.
                while self.held:
                    await asyncio.sleep(0.02)
                await asyncio.wait(ways, timeout=1.0)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (self._near[1], self._far[1]):
                writer.close()
            if self._record is not None:
                self._proxy.recorded.append(bytes(self._record))

    def reset(self) -> None:
        for writer in (self._near[1], self._far[1]):
            _reset(writer)

    async def _carry(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(256)

        async def read() -> None:
            data: bytes | None = b"-"
            while data:
                try:
                    data = await reader.read(_CHUNK)
                except OSError:
                    data = None  # a reset, which goes on like what came before it
                await queue.put((loop.time() + self._proxy.delay_s, data))

        reading = asyncio.ensure_future(read())
        carried = 0
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                while self.held or self._proxy.stalled(way):
                    await asyncio.sleep(0.02)
                if data is None:
                    self.reset()
                    return
                limit = self._proxy.truncate_after
                if limit is not None and carried + len(data) > limit:
                    self._proxy.truncated += 1
                    writer.write(data[: limit - carried])
                    data = b""
                if not data:
                    writer.write_eof()
                    return
                if way == "up" and self._record is not None:
                    self._record += data
                writer.write(data)
                await writer.drain()
                carried += len(data)
                self._proxy.bytes[way] += len(data)
        except (OSError, RuntimeError):
            return  # the other side is gone, or the link was reset
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    writer.transport.abort()

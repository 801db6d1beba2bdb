"""Pipes between two calls: what an agent streams up is streamed down to the operator who asked for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from outrider import wire
from outrider.errors import NotFound, OutriderError, Unavailable
from outrider.v1 import node_service_pb2

_BATCHES = 16


class Pipe:
    """One stream of a node's. Bounded: an operator who reads slowly makes the agent wait, never the container."""

    def __init__(self, node_id: str) -> None:
        self.stream_id = "s" + secrets.token_hex(10)
        self.node_id = node_id
        self.opened = False
        self._items: asyncio.Queue[node_service_pb2.ContainerLogBatch | OutriderError | None] = asyncio.Queue(_BATCHES)
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fill(self, batches: AsyncIterator[node_service_pb2.ContainerLogBatch]) -> None:
        """The agent's side: pass on what comes, until it ends or nobody reads any more."""
        self.opened = True
        ending: OutriderError | None = Unavailable(f"the connection of node {self.node_id} was lost", code="node_lost")
        try:
            async for batch in batches:
                if not await self._put(batch):
                    return
            ending = None
        finally:
            await self._put(ending)

    async def fail(self, error: OutriderError) -> None:
        """The stream will not come."""
        await self._put(error)

    async def read(self) -> AsyncIterator[node_service_pb2.ContainerLogBatch]:
        """The operator's side. Raises the agent's failure, or Unavailable if its connection was cut."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, OutriderError):
                raise item
            if item.HasField("failure"):
                raise wire.error_of(item.failure)
            yield item

    def leave(self) -> None:
        """Nobody reads any more."""
        if not self._left.done():
            self._left.set_result(None)

    async def _put(self, item: node_service_pb2.ContainerLogBatch | OutriderError | None) -> bool:
        put = asyncio.ensure_future(self._items.put(item))
        try:
            await asyncio.wait({put, self._left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not put.done():
                put.cancel()
        return not self._left.done()


class Pipes:
    """All open pipes of this server, by stream id."""

    def __init__(self) -> None:
        self._pipes: dict[str, Pipe] = {}

    @contextmanager
    def make(self, node_id: str) -> Iterator[Pipe]:
        pipe = Pipe(node_id)
        self._pipes[pipe.stream_id] = pipe
        try:
            yield pipe
        finally:
            del self._pipes[pipe.stream_id]
            pipe.leave()

    def of(self, node_id: str, stream_id: str) -> Pipe:
        """The pipe that the server asked this node to fill."""
        pipe = self._pipes.get(stream_id)
        if pipe is None or pipe.node_id != node_id:
            raise NotFound("nobody reads this stream any more", code="unknown_stream")
        return pipe

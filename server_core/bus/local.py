"""The bus within one process. Used from the event loop's thread alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from outrider.errors import Unavailable


class _Subscription:
    def __init__(self, bus: LocalBus) -> None:
        self._bus = bus
        self.changed = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> bool:
        if not self._bus.closed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.changed.wait()
            except TimeoutError:
                return False
        if self._bus.closed:
            raise Unavailable("the server is stopping", code="server_stopping")
        self.changed.clear()
        return True


class LocalBus:
    """The `server_core.bus.base.Bus` of a single server."""

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[_Subscription]] = defaultdict(set)
        self.closed = False

    def publish(self, topic: str) -> None:
        for watcher in self._watchers.get(topic, ()):
            watcher.changed.set()

    @contextmanager
    def subscribe(self, *topics: str) -> Iterator[_Subscription]:
        watcher = _Subscription(self)
        for topic in topics:
            self._watchers[topic].add(watcher)
        try:
            yield watcher
        finally:
            for topic in topics:
                self._watchers[topic].discard(watcher)
                if not self._watchers[topic]:
                    del self._watchers[topic]

    def close(self) -> None:
        self.closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

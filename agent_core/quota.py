"""Watches the volumes that have a size: says when one has grown over it, and when it fits again.

Nothing is stopped for it: a game that loses its saves to a limit is worse off than a disk that fills up, and the
node's reserve (`Volumes.allot`) keeps new volumes away before that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent_core.volumes import Volumes
from outrider.errors import OutriderError

INTERVAL_S = 60.0
# A node with millions of small files must not spend its time on counting them.
_REST_FACTOR = 20.0

Emit = Callable[[str, str, Mapping[str, Any] | None], Awaitable[None]]

log = logging.getLogger(__name__)


class VolumeWatch:
    """``emit(type, subject, data)`` gets the events ``volume.over_size`` and ``volume.within_size``."""

    def __init__(self, volumes: Volumes, emit: Emit, *, interval_s: float = INTERVAL_S) -> None:
        self._volumes = volumes
        self._emit = emit
        self._interval_s = interval_s
        self._over: set[str] = set()

    async def run(self) -> None:
        """For ever."""
        while True:
            started = time.monotonic()
            try:
                await self.once()
            except (OutriderError, OSError) as error:
                log.warning("the volumes can't be measured now: %s", error)
            await asyncio.sleep(max(self._interval_s, (time.monotonic() - started) * _REST_FACTOR))

    async def once(self) -> None:
        """Measure all volumes that have a size, and tell what has changed."""
        over = {usage.host_path: usage for usage in await self._volumes.over_quota()}
        for path, usage in over.items():
            if path not in self._over:
                log.warning(
                    "the volume %s at %s holds %d bytes, more than its size of %d",
                    usage.name,
                    path,
                    usage.used_bytes,
                    usage.size_bytes,
                )
                data = {
                    "host_path": path,
                    "used_bytes": usage.used_bytes,
                    "size_bytes": usage.size_bytes,
                    "quota": usage.quota,
                }
                await self._emit("volume.over_size", usage.name, data)
        for path in self._over - set(over):
            await self._emit("volume.within_size", path.rpartition("/")[2], {"host_path": path})
        self._over = set(over)

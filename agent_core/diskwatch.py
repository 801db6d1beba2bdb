"""Watches the disks that a node lives on: says when one gets full, has room made, keeps the last of it for the agent.

Two marks. Below the reserve (the policy's `disk_reserve_bytes`) nothing large is begun: no volume is allotted, and
what nobody needs any more is collected at once instead of by and by. Below the floor no run is taken on and no step
begun, because it could not even say what became of it; both fail with a sentence, and the agent goes on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from agent_core.room import disk_full, free_bytes
from outrider.errors import OutriderError

INTERVAL_S = 5.0
FLOOR_BYTES = 8 * 1024**2
_RELIEVE_S = 60.0  # between two collections for want of room

Level = Literal["ok", "low", "full"]
Emit = Callable[[str, str, Mapping[str, Any] | None], Awaitable[None]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk, by a directory on it, and how it is."""

    path: Path
    free_bytes: int
    level: Level


class DiskWatch:
    """The disks of ``paths``; the first is the state directory's. ``more`` tells further paths, known only later."""

    def __init__(
        self,
        *paths: Path,
        reserve_bytes: int,
        more: Callable[[], Path | None] = lambda: None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._paths = paths
        self._more = more
        self._interval_s = interval_s
        self.reserve_bytes = reserve_bytes
        self.floor_bytes = min(reserve_bytes, FLOOR_BYTES)
        self._levels: dict[Path, Level] = {}

    def disks(self) -> list[Disk]:
        """Each disk once, as it is now."""
        seen: dict[int, Disk] = {}
        extra = self._more()
        for path in (*self._paths, *([extra] if extra else [])):
            try:
                device, free = os.stat(path).st_dev, free_bytes(path)
            except OSError:
                continue  # the engine's directory need not be one of this machine's
            level: Level = "full" if free < self.floor_bytes else "low" if free < self.reserve_bytes else "ok"
            seen.setdefault(device, Disk(path, free, level))
        return list(seen.values())

    def full_now(self) -> bool:
        """Whether a disk has less than the floor left."""
        return any(disk.level == "full" for disk in self.disks())

    def check(self, doing: str) -> None:
        """Raises TemporaryError (``disk_full``) if the disk has no room for ``doing``, as in "run step a"."""
        for disk in self.disks():
            if disk.level == "full":
                raise disk_full(doing, disk.path, disk.free_bytes)

    def describe(self) -> list[dict[str, object]]:
        """For `outrider agent status`."""
        return [
            {"path": str(disk.path), "free_bytes": disk.free_bytes, "level": disk.level, "reserve": self.reserve_bytes}
            for disk in self.disks()
        ]

    async def run(self, emit: Emit, relieve: Callable[[], Awaitable[None]], keep_room: Callable[[], None]) -> None:
        """For ever. ``relieve`` makes room, ``keep_room`` is called while there is some."""
        relieved_at = -_RELIEVE_S
        loop = asyncio.get_running_loop()
        while True:
            disks = self.disks()
            for disk in disks:
                await self._tell(disk, emit)
            if any(disk.level != "ok" for disk in disks):
                if loop.time() - relieved_at >= _RELIEVE_S:
                    relieved_at = loop.time()
                    try:
                        await relieve()
                    except (OutriderError, OSError) as error:
                        log.warning("room can't be made on the disk now", error=str(error))
            else:
                keep_room()
            await asyncio.sleep(self._interval_s)

    async def _tell(self, disk: Disk, emit: Emit) -> None:
        before = self._levels.get(disk.path, "ok")
        self._levels[disk.path] = disk.level
        if disk.level == before:
            return
        log.warning("the disk", path=str(disk.path), level=disk.level, free_bytes=disk.free_bytes)
        data = {"free_bytes": disk.free_bytes, "reserve_bytes": self.reserve_bytes}
        await emit(f"disk.{disk.level}", str(disk.path), data)

"""Volumes of objects go with their object, which is removed at the server: so the node asks.

It asks from time to time and not once, so that nothing has to be kept for a node that is away, and nothing is lost
if either side is killed in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence

import structlog

from agent_core.volumes import Volumes
from outrider.errors import OutriderError

INTERVAL_S = 600.0
_AT_A_TIME = 500

log = structlog.get_logger(__name__)

Ask = Callable[[Sequence[tuple[str, str]]], Awaitable[set[tuple[str, str]]]]


class RemovedObjects:
    """`run` asks for ever. ``ask``: see `Session.removed_objects`. ``busy``: objects that runs on this node are for."""

    def __init__(self, volumes: Volumes, ask: Ask, busy: Callable[[], Collection[str]]) -> None:
        self._volumes = volumes
        self._ask = ask
        self._busy = busy

    async def run(self) -> None:
        while True:
            try:
                await self.once()
            except (OutriderError, OSError) as error:
                # A server that is older than this agent does not know the question, either.
                log.info("volumes of removed objects are looked for later", error=str(error))
            await asyncio.sleep(INTERVAL_S)

    async def once(self) -> None:
        """Remove the volumes of objects that are gone; what a container still mounts goes with that."""
        refs = [(kind, name) for kind, _, name in (ref.partition("/") for ref in await self._volumes.objects())]
        for first in range(0, len(refs), _AT_A_TIME):
            for kind, name in sorted(await self._ask(refs[first : first + _AT_A_TIME])):
                log.info("the object is gone, and so are its volumes", object=f"{kind}/{name}")
                await self._volumes.release_object(f"{kind}/{name}", busy=self._busy)

"""The log of one attempt: what its container writes, masked, on its way into the spool.

The reader never waits, because a reader that stops freezes the container. What the spool does not take at
that moment is fetched from the engine's own log once the container has ended; the same way serves an agent
that was restarted: the log is read from its beginning, masked again, and what is there already is skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing

import structlog

from agent_core.runtimes.base import StreamName
from agent_core.spool import LogFile, Spool
from agent_core.state import Change
from outrider.errors import OutriderError
from outrider.masking import Masker

log = structlog.get_logger(__name__)
Chunks = AsyncIterator[tuple[StreamName, bytes]]


class _Stream:
    def __init__(self, file: LogFile, secrets: Iterable[str]) -> None:
        self.file = file
        self.masker = Masker(secrets)
        self.position = 0  # masked bytes seen so far, whether kept or not


class StepLog:
    """Takes both streams of one attempt. ``max_bytes`` is its hard cap, of both together.

    ``withheld``: what is to be masked is not known, so nothing is taken; the log ends with a gap.
    """

    def __init__(
        self,
        spool: Spool,
        files: Mapping[StreamName, LogFile],
        secrets: Iterable[str],
        *,
        max_bytes: int,
        on_limit: Callable[[], None],
        withheld: bool = False,
    ) -> None:
        self._spool = spool
        self._files = files
        self._secrets = list(secrets)
        self._max_bytes = max_bytes
        self._on_limit = on_limit
        self._withheld = withheld
        self.over_limit = False
        self._raw = self._lost = 0
        self._streams: dict[StreamName, _Stream] = {}
        self._begin()

    async def pump(self, chunks: Chunks, *, patient: bool = False) -> None:
        """Take all of ``chunks``, which begin at the log's first byte.

        ``patient`` readers wait for the spool where it is busy; the one that is attached to a container must not.
        """
        self._begin()
        async for stream, data in chunks:
            room = self._max_bytes - self._raw
            self._raw += len(data)
            if self._raw > self._max_bytes:
                self._lost += min(len(data), self._raw - self._max_bytes)
                if not self.over_limit:
                    self.over_limit = True
                    self._on_limit()
                data = data[: max(0, room)]
            if data and not self._withheld:
                await self._take(stream, self._streams[stream].masker.feed(data), patient)

    @property
    def complete(self) -> bool:
        """Whether all that was pumped is in the spool."""
        return all(each.position <= each.file.accepted for each in self._streams.values())

    async def finish(self, ended: bool, engine_log: Callable[[], Chunks], *, lacking: bool = False) -> list[Change]:
        """Close both logs; ``ended``: the reader came to the end. Fetches what is missing from the engine's log.

        ``lacking``: nobody knows whether the engine's log is whole. Returns changes for `State.commit`.
        """
        unknown = self._withheld or lacking
        if ended:
            await self._flush()
        await self._spool.flush()
        for file in self._files.values():
            if file.broken:
                self._spool.mend(file)  # the disk was full then; the engine still has it all
        if not (ended and self.complete) and not self._withheld:
            seen = self._streams, self._raw, self._lost
            try:
                async with asyncio.timeout(60), aclosing(engine_log()) as chunks:  # type: ignore[type-var]
                    await self.pump(chunks, patient=True)
                    await self._flush()
            except (OutriderError, TimeoutError) as error:
                log.warning("a step's log can't be completed from the engine's", error=str(error))
                if ended:
                    self._streams, self._raw, self._lost = seen  # how much there was is known all the same
                else:
                    unknown = True
        await self._spool.flush()
        changes = []
        for name, each in self._streams.items():
            gap = -1 if unknown else max(0, each.position - each.file.accepted)
            if gap >= 0 and self._lost and name == self._noisiest():
                gap += self._lost
            changes.append(self._spool.finished(each.file, gap=gap))
        return changes

    def lengths(self) -> tuple[int, int]:
        """Bytes of stdout and stderr, known once finished."""
        return self._files["stdout"].length or 0, self._files["stderr"].length or 0

    async def sync(self) -> None:
        """On the disk: the engine's copy may go."""
        await self._spool.sync(self._files.values())

    async def _flush(self) -> None:
        # Only at the very end: before it, what the masker holds back may be the beginning of a secret.
        for name, each in self._streams.items():
            await self._take(name, each.masker.flush(), patient=False)

    def _begin(self) -> None:
        self._raw = self._lost = 0
        self._streams = {name: _Stream(file, self._secrets) for name, file in self._files.items()}

    def _noisiest(self) -> StreamName:
        return max(self._streams, key=lambda name: self._streams[name].position)

    async def _take(self, stream: StreamName, masked: bytes, patient: bool) -> None:
        each = self._streams[stream]
        start = each.position
        each.position += len(masked)
        # Beyond what was accepted something is missing: adding to it would put bytes in the wrong place.
        if start > each.file.accepted or each.position <= each.file.accepted:
            return
        fresh = masked[each.file.accepted - start :]
        if self._spool.append(each.file, fresh):
            return
        while patient and not self._spool.full(len(fresh)) and not each.file.broken:
            await self._spool.flush()
            if self._spool.append(each.file, fresh):
                return

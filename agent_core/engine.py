"""Watches whether the container engine answers: the agent stays up without it, says so, and goes on when it returns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from agent_core.outbox import Outbox
from agent_core.runtimes.base import EngineInfo, Runtime
from outrider.errors import EngineUnavailable, OutriderError

log = structlog.get_logger(__name__)

_CHECK_S = 15.0  # while it answers; work that meets a missing engine says so at once
_RETRY_S = 1.0
_ANSWER_S = 20.0  # to a question about itself, however busy it is


class EngineWatch:
    """``ok`` and ``error`` for the brief state; `available` to wait for it."""

    def __init__(self, runtime: Runtime, outbox: Outbox, *, on_return: Callable[[], Awaitable[None]] | None = None):
        self._runtime = runtime
        self._outbox = outbox
        self._on_return = on_return
        self._up = asyncio.Event()
        self._doubt = asyncio.Event()
        self.asked = asyncio.Event()  # it has answered, or not, for the first time
        self.stuck: dict[str, str] = {}  # containers that it hangs on, and what it did not answer
        self.info: EngineInfo | None = None
        self.error = "the container engine has not been asked yet"

    @property
    def ok(self) -> bool:
        """Whether it answered last time."""
        return self._up.is_set()

    @property
    def boot(self) -> str:
        """The identity of its present start, "" before it has answered for the first time."""
        return self.info.boot if self.info else ""

    def doubt(self, error: OutriderError) -> None:
        """A call found it missing: look now, and let those who wait wait."""
        if self._up.is_set():
            self._up.clear()
            self.error = str(error)
            log.warning("the container engine does not answer", error=str(error))
        self._doubt.set()

    async def hangs(self, container: str, error: OutriderError) -> None:
        """It did not answer in time about this container; it may answer about all others."""
        self._doubt.set()
        if container not in self.stuck:
            self.stuck[container] = str(error)
            log.warning("the container engine hangs on a container", container=container, error=str(error))
            await self._outbox.emit("engine.hangs", container, {"error": str(error)})

    async def answers(self, container: str) -> None:
        """It answers about this container; nothing is said where it always did."""
        if self.stuck.pop(container, None) is not None:
            log.info("the container engine answers about the container again", container=container)
            await self._outbox.emit("engine.answers", container, {})

    def look_again(self) -> None:
        """Something happened to it (its events had a gap): ask it now."""
        self._doubt.set()

    async def available(self) -> None:
        """Until it answers."""
        await self._up.wait()

    async def run(self) -> None:
        """Ask it from time to time, for ever. What follows its return is done before anybody is let through."""
        was_up: bool | None = None
        boot = ""
        while True:
            try:
                info = await self._ask()
                if not self._up.is_set() or info.boot != boot:
                    if self._on_return is not None:
                        await self._on_return()
                    if was_up is False:
                        log.info("the container engine answers again", version=info.version)
                        await self._outbox.emit("engine.back", info.name, {"version": info.version})
                was_up, boot, self.info, self.error = True, info.boot, info, ""
                self._up.set()
            except OutriderError as error:
                self.doubt(error)  # an engine that hangs as a whole is as good as away
                self.error = str(error)
                if was_up is not False:
                    was_up = False
                    await self._outbox.emit("engine.lost", self.info.name if self.info else "", {"error": str(error)})
            self.asked.set()
            if self._up.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_S):
                        await self._doubt.wait()
            else:
                await asyncio.sleep(_RETRY_S)
            self._doubt.clear()

    async def _ask(self) -> EngineInfo:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._runtime.info()
        except TimeoutError as error:
            raise EngineUnavailable(
                f"the container engine has not answered for {_ANSWER_S:.0f} s", hint="look whether it hangs"
            ) from error

"""Liveness of managed containers, for as long as they are there: the step that started one is long over by then.

One task for each container that has something to be asked, in the agent's own care from the moment that it was ready,
through restarts of the agent (the journal has what to ask) and of the container. What does not work any more is
restarted by the engine's restart call, since a killed one would stay down; at once the first time, later and later when
that does not help, and only where its restart policy says that it is to be restarted at all. What somebody stopped
stays stopped. An engine that does not answer says nothing about a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_core.container_spec import ManagedSpec, Restart
from agent_core.managed_rows import ManagedRow, ManagedRows
from agent_core.probes import Liveness, ask
from agent_core.runtimes.base import ContainerInfo, EngineEvent, Runtime, run_began
from outrider.errors import Conflict, NotFound, OutriderError

if TYPE_CHECKING:
    from agent_core.containers import Containers

_ENGINE_S = 5.0  # between two questions to an engine that does not answer
_LOOK_S = 60.0  # at one that does not run, in case its start was not told
_TOLD = 500  # characters of a reason
_SEEN_EVERY_S = 10.0  # between two notes of how far a log was read
_SEEN_MARGIN_S = 2.0  # what was printed so shortly before may still be on its way to the reader

log = logging.getLogger(__name__)
Emit = Callable[[str, str, Mapping[str, Any]], Awaitable[object]]


class Supervision(BaseModel):
    """What a container is watched by, as the journal and its label keep it. ``numbers``: the ports at its own address,
    by name."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    live: Liveness
    restart: Restart = Restart()
    numbers: dict[str, int] = Field(default_factory=dict)


def supervision_of(spec: ManagedSpec, ports: Mapping[str, int]) -> str:
    """How the container is to be watched, as JSON; "{}": not at all."""
    if spec.live is None:
        return "{}"
    found = Supervision(live=spec.live, restart=spec.restart, numbers=spec.numbers(ports))
    return json.dumps(found.model_dump(mode="json", exclude_none=True), sort_keys=True)


class _Changed(Exception):
    """It was started, stopped or removed: what was known of it does not hold any more."""


class Supervisor:
    """`run` watches all of one node. ``emit`` tells the server; ``available`` returns once the engine answers."""

    def __init__(
        self,
        runtime: Runtime,
        containers: Containers,
        emit: Emit,
        available: Callable[[], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._containers = containers
        self._rows: ManagedRows = containers.rows
        self._emit = emit
        self._available = available
        self._watches: dict[str, _Watch] = {}
        self._look = asyncio.Event()
        containers.changed = self.changed

    def changed(self, name: str) -> None:
        """A container was started, replaced or removed."""
        if name in self._watches:
            self._watches[name].wake()
        self._look.set()

    def heard(self, event: EngineEvent) -> None:
        """Something happened in the engine."""
        if event.action == "resync":
            for watch in self._watches.values():
                watch.wake()
        elif event.action in ("start", "die", "destroy", "rename", "pause", "unpause") and event.name in self._watches:
            self._watches[event.name].wake()

    async def run(self) -> None:
        """For ever. First what a former agent left in the middle of is gone on with."""
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    await self._available()
                    try:
                        await self._containers.recover()
                        break
                    except OutriderError as error:
                        log.info("what a former agent left of managed containers is looked at later: %s", error)
                        await asyncio.sleep(_ENGINE_S)
                while True:
                    self._look.clear()
                    self._adjust(group)
                    await self._look.wait()
            finally:
                for watch in self._watches.values():
                    watch.end()

    def _adjust(self, group: asyncio.TaskGroup) -> None:
        """A watch for each container that has something to be asked, and no other."""
        wanted: dict[str, tuple[ManagedRow, Supervision]] = {}
        for row in self._rows.all():
            if row.state == "ready" and row.supervision:
                try:
                    wanted[row.name] = (row, Supervision.model_validate(row.supervision))
                except ValidationError as error:
                    log.warning("how the container %s is to be watched can't be read: %s", row.name, error)
        for name, watch in list(self._watches.items()):
            if name not in wanted or watch.supervision != wanted[name][1] or watch.digest != wanted[name][0].digest:
                watch.end()
                del self._watches[name]
                self._containers.health.pop(name, None)
        for name, (row, supervision) in wanted.items():
            if name not in self._watches:
                watch = _Watch(self, row, supervision)
                self._watches[name] = watch
                watch.task = group.create_task(watch.run(), name=f"liveness {name}")


class _Watch:
    """One container's."""

    def __init__(self, supervisor: Supervisor, row: ManagedRow, supervision: Supervision) -> None:
        self._runtime = supervisor._runtime
        self._containers = supervisor._containers
        self._rows = supervisor._rows
        self._emit = supervisor._emit
        self._available = supervisor._available
        self.name, self.digest = row.name, row.digest
        self.supervision = supervision
        self._restarts = row.restarts
        self._seen, self._noted = row.log_seen, float("-inf")
        self._wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Look at it anew."""
        self._wake.set()

    def end(self) -> None:
        """Watch it no more."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """For as long as it is somebody's to watch."""
        try:
            while True:
                self._wake.clear()
                try:
                    info = await self._runtime.inspect(self.name)
                    if info.state == "running":
                        await self._watch(info)
                    else:
                        self._is("")
                        await self._sleep(_LOOK_S)
                except _Changed:
                    continue
                except NotFound:
                    self._is("")
                    with contextlib.suppress(_Changed):
                        await self._sleep(_LOOK_S)
                except OutriderError as error:
                    log.info("the liveness of %s is not known now: %s", self.name, error)
                    await asyncio.sleep(_ENGINE_S)
                    await self._available()
        finally:
            self._is("")

    async def _watch(self, info: ContainerInfo) -> None:
        """One run of it, from its start until something happens to it."""
        live, clock = self.supervision.live, asyncio.get_running_loop().time
        # After a restart of the agent nobody knows how long it has run already, and it is given its time anew.
        begun = clock()
        worked, failures = 0.0, 0
        self._is("starting")
        while True:
            reason = await self._asked(info)
            if not reason:
                failures = 0
                worked = worked or clock()
                self._is("live")
                if self._restarts and clock() - worked >= self.supervision.restart.calm_s:
                    self._restarts = 0
                continue
            failures += 1
            if not worked and clock() - begun < live.grace_s and live.log is None:
                failures = 0
                continue
            self._is("failing")
            if failures >= live.failures or live.log is not None:
                await self._failed(info, reason)

    async def _asked(self, info: ContainerInfo) -> str:
        """What is wrong with it now, once it is due to be asked again; "" if nothing is."""
        live = self.supervision.live
        if live.log is not None:
            return await self._logged(info, live.log.encode(), live.interval_s)
        await self._sleep(live.interval_s)
        address = info.ip_address or "127.0.0.1"
        try:
            return await ask(self._runtime, info.id, address, self.supervision.numbers, live, timeout_s=live.timeout_s)
        except Conflict as error:
            raise _Changed from error  # it does not run any more

    async def _logged(self, info: ContainerInfo, wanted: bytes, within_s: float) -> str:
        """Whether the text comes up in its log, which is read for as long as it goes on, and never attached to."""
        reading = asyncio.create_task(self._read(info, wanted))
        waking = asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({reading, waking}, return_when=asyncio.FIRST_COMPLETED)
            if waking.done():
                raise _Changed
            if reading.result():
                return f"its log says {wanted.decode()!r}"
            await self._sleep(within_s)  # the log has ended, and with it the container, which is about to be told
            return ""
        finally:
            for task in (reading, waking):
                task.cancel()
            await asyncio.gather(reading, waking, return_exceptions=True)

    async def _read(self, info: ContainerInfo, wanted: bytes) -> bool:
        """From the beginning of this run of it, or from where it was read before, by a former agent too.

        What is read a second time had nothing in it, and what had is of a former run as soon as it was restarted: no
        line counts twice.
        """
        self._is("live")
        window, since = b"", self._unseen_since(info)
        async with contextlib.aclosing(self._runtime.logs(info.id, follow=True, since=since)) as chunks:
            async for _, chunk in chunks:
                window += chunk
                if wanted in window:
                    return True
                window = window[-len(wanted) :]
                await self._saw()
        return False

    def _unseen_since(self, info: ContainerInfo) -> datetime | None:
        began = run_began(info)
        seen = datetime.fromtimestamp(self._seen, UTC)
        if seen > datetime.now(UTC):
            return began  # the clock was set back
        return seen if self._seen and (began is None or seen > began) else began

    async def _saw(self) -> None:
        """Remember how far the log was read; on the disk only now and then."""
        self._seen = time.time() - _SEEN_MARGIN_S
        if (now := asyncio.get_running_loop().time()) - self._noted >= _SEEN_EVERY_S:
            self._noted = now
            await self._rows.log_seen(self.name, self.digest, self._seen)

    async def _failed(self, run: ContainerInfo, reason: str) -> None:
        restart, reason = self.supervision.restart, reason[:_TOLD]
        gives_up = restart.policy == "no" or bool(restart.max and self._restarts >= restart.max)
        if not gives_up:
            wait_s = self._wait_s()
            if wait_s:
                self._is("failing: restarted later")
                await self._sleep(wait_s)
                if self.supervision.live.log is None and not await self._asked(run):
                    return  # it has come to itself
        counted = self._restarts + (0 if gives_up else 1)
        after = await self._containers.restart_failed(
            self.name, run, restarts=counted, reason=reason, restart=not gives_up
        )
        if after is None:
            raise _Changed
        self._restarts = counted
        if gives_up:
            log.warning("the container %s does not work, and is not restarted: %s", self.name, reason)
            await self._emit("container.unhealthy", self.name, {"reason": reason, "restarts": self._restarts})
            self._is("failed")
            while True:  # until somebody does something about it
                await self._sleep(_LOOK_S)
        log.warning("the container %s did not work and was restarted: %s", self.name, reason)
        await self._emit("container.restarted", self.name, {"reason": reason, "restarts": self._restarts})
        raise _Changed

    def _wait_s(self) -> float:
        restart = self.supervision.restart
        if not self._restarts:
            return 0.0
        return min(restart.first_wait_s * 2.0 ** min(self._restarts - 1, 30), restart.longest_wait_s)

    async def _sleep(self, seconds: float) -> None:
        """Raises _Changed as soon as something happens to the container."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
            raise _Changed

    def _is(self, health: str) -> None:
        if health:
            self._containers.health[self.name] = health
        else:
            self._containers.health.pop(self.name, None)

"""Exits of all containers, known from one event stream.

While the stream stands, every end arrives on it. Whenever it has been down, what is waited for is inspected,
because the engine replays little and after its own restart nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from agent_core.runtimes._docker_wire import Json
from agent_core.runtimes.base import ContainerInfo, EngineEvent, Exit
from outrider.errors import EngineUnavailable, NotFound, OutriderError
from outrider.retry import FOREVER, RetryPolicy

_REMEMBERED = 4096
_QUEUE = 10_000
_KILLED = 137
_EXPLAIN_S = 10.0  # how long an engine that hangs may delay the news of an end that is known
# The kernel's notice of memory running out and that of the end reach the engine by two ways.
_OOM_LATE_S = 0.2
_OOM_LATEST_S = 1.0  # where nothing else explains a SIGKILL

ACTIONS = (
    "create", "start", "die", "oom", "kill", "stop", "restart", "destroy", "pause", "unpause", "rename",
    "health_status",
)  # fmt: skip

T = TypeVar("T")
Stream = Callable[[], AsyncGenerator[Json, None]]
Inspect = Callable[[str], Awaitable[ContainerInfo]]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiter:
    boot: str
    generation: int  # of the event stream when the wait began; 0: before the first
    future: asyncio.Future[Exit]


class Exits:
    """One reader of the engine's events: tells ends to who waits, and events to who subscribes.

    ``stream()`` yields events from its first item on, which is an empty object sent when it stands;
    ``boot()`` is the engine's boot identity and whether containers survive its restart; ``alive()`` says
    whether it takes new calls.
    """

    def __init__(
        self,
        stream: Stream,
        inspect: Inspect,
        boot: Callable[[], Awaitable[tuple[str, bool]]],
        alive: Callable[[], Awaitable[bool]],
        *,
        retry: RetryPolicy = FOREVER,
    ) -> None:
        self._stream = stream
        self._inspect = inspect
        self._boot = boot
        self._alive = alive
        self._retry = retry
        self._waiters: dict[str, list[_Waiter]] = {}
        self._ended: OrderedDict[str, Exit] = OrderedDict()
        self._watched: OrderedDict[str, int] = OrderedDict()
        self._dying: dict[str, asyncio.Task[None]] = {}
        self._out_of_memory: OrderedDict[str, None] = OrderedDict()
        self._signalled: OrderedDict[str, None] = OrderedDict()
        self._looks: set[asyncio.Task[None]] = set()
        self._subscribers: set[asyncio.Queue[EngineEvent]] = set()
        self._generation = 0
        self._up = asyncio.Event()
        self._back = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._current_boot = ""
        self._survives = False

    def start(self) -> None:
        """Begin to read; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine-events")

    async def aclose(self) -> None:
        tasks = [*self._dying.values(), *self._looks, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    def created(self, container: str) -> None:
        """A container was just created: as long as the stream stands, its end can't be missed."""
        if self._up.is_set():
            _remember(self._watched, container, self._generation)

    def engine_answers(self) -> None:
        """Something else found the engine there: an end that is not heard has to be looked for, so listen at once."""
        if not self._up.is_set():
            self._back.set()

    async def wait(self, container: str, boot: str) -> Exit:
        """The end of a container, by id. Waits through any absence of the engine."""
        self.start()
        waiter = _Waiter(boot or self._current_boot, self._generation, asyncio.get_running_loop().create_future())
        self._waiters.setdefault(container, []).append(waiter)
        look: asyncio.Task[None] | None = None
        try:
            if container in self._ended:
                return await self._explained(self._ended[container])
            # Before the engine's identity is known nothing can be said of an end: it is asked when the stream stands.
            if self._current_boot and (self._watched.get(container) != self._generation or not self._up.is_set()):
                # Beside the wait: where the engine hangs on this one, an event may still tell its end.
                look = self._look_at(container)
            return await waiter.future
        finally:
            if look is not None:
                look.cancel()
            left = self._waiters.get(container, [])
            if waiter in left:
                left.remove(waiter)
            if not left:
                self._waiters.pop(container, None)

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        """Events from now on; "resync" where some may be missing."""
        self.start()
        queue: asyncio.Queue[EngineEvent] = asyncio.Queue(_QUEUE)
        self._subscribers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    async def _run(self) -> None:
        retry = 0
        while True:
            stood = False
            try:
                async for item in self._stream():
                    if not stood:
                        stood, retry = True, 0
                        await self._stands()
                    if item:
                        await self._heard(item)
            except OutriderError as error:
                # Once: it is tried again for as long as it takes.
                log.log(logging.WARNING if retry == 0 else logging.DEBUG, "no events from the engine: %s", error)
            self._up.clear()
            self._back.clear()
            retry += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(self._retry.wait_s(retry)):
                    await self._back.wait()

    async def _stands(self) -> None:
        boot, survives = await self._boot()
        first = self._generation == 0
        self._generation += 1
        self._survives = survives
        self._current_boot = boot
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.boot = waiter.boot or boot
        self._ended.clear()
        self._up.set()
        if not first:
            self._publish(EngineEvent("resync", "", "", {}, datetime.now(UTC)))
        # Aside: one container that the engine hangs on must keep neither the others nor the events waiting.
        for container in list(self._waiters):
            self._look_at(container)

    def _look_at(self, container: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._look(container))
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)
        return task

    async def _look(self, container: str) -> None:
        """Ask about one container for as long as it is waited for; answers its waiters if it has ended."""
        retry = 0
        while True:
            try:
                info = await self._inspect(container)
                break
            except NotFound as error:
                self._fail(container, error)
                return
            except EngineUnavailable:
                return  # asked again when the stream stands
            except OutriderError as error:
                retry += 1
                log.log(logging.WARNING if retry == 1 else logging.DEBUG, "%s", error)
                await asyncio.sleep(self._retry.wait_s(retry))
            if container not in self._waiters:
                return
        if info.state in ("exited", "dead") and info.started_at is not None:
            if not self._up.is_set():
                # Which engine has just been asked is not known yet, or not any more.
                try:
                    self._current_boot, self._survives = await self._boot()
                except OutriderError:
                    return
            end = Exit(info.id, info.exit_code or 0, info.oom_killed)
            for waiter in self._waiters.get(container, ()):
                unseen = waiter.boot not in ("", self._current_boot)
                self._answer(waiter, replace(end, engine_stopped=self._stopped_since(waiter.boot), unseen=unseen))
        elif self._up.is_set():
            _remember(self._watched, container, self._generation)
            if info.state == "running":
                # It has survived what was before: from here on this engine has its output and sees its end.
                for waiter in self._waiters.get(container, ()):
                    waiter.boot = self._current_boot

    def _stopped_since(self, boot: str) -> bool:
        """Whether what was started by the engine of that identity can have been stopped with it."""
        if not boot or boot == self._current_boot:
            return False
        # No setting of the engine makes containers survive the end of the machine's boot, the identity's first part.
        same_machine_boot = boot.partition("/")[0] == self._current_boot.partition("/")[0]
        return not (self._survives and same_machine_boot)

    async def _heard(self, item: Json) -> None:
        actor: Json = item.get("Actor") or {}
        attributes = {str(name): str(value) for name, value in (actor.get("Attributes") or {}).items()}
        container = str(actor.get("ID") or item.get("id") or "")
        action = str(item.get("Action") or "").partition(":")[0]
        code = int(attributes["exitCode"]) if attributes.get("exitCode", "").isdigit() else None
        if action == "start":
            if dying := self._dying.get(container):
                dying.add_done_callback(lambda _: self._ended.pop(container, None))
            self._ended.pop(container, None)
            self._out_of_memory.pop(container, None)
            self._signalled.pop(container, None)
        elif action == "oom":
            _remember(self._out_of_memory, container, None)
        elif action == "kill":
            _remember(self._signalled, container, None)
        elif action == "die":
            # Aside: an engine that hangs on one container must not hold up what is told about others.
            task = asyncio.create_task(self._died(container, code or 0))
            self._dying[container] = task
            task.add_done_callback(lambda done: self._dying.pop(container, None))
        elif action == "destroy":
            self._watched.pop(container, None)
            if container not in self._dying:  # whose end is just being told
                self._fail(container, NotFound(f"the container {attributes.get('name', container[:12])} was removed"))
        self._publish(
            EngineEvent(
                action=action,
                container_id=container,
                name=attributes.get("name", ""),
                labels=attributes,  # the engine mixes labels with its own attributes
                time=datetime.fromtimestamp(int(item.get("timeNano") or 0) / 1e9, UTC),
                exit_code=code,
            )
        )

    async def _died(self, container: str, code: int) -> None:
        if not await self._alive():
            # An engine that stops takes no calls any more, and then ends its containers, while this stream
            # still stands: what killed this one is told when the engine is back.
            return
        end = Exit(
            container,
            code,
            oom_killed=container in self._out_of_memory,
            signalled=container in self._signalled,
        )
        if container in self._waiters:
            end = await self._explained(end)
        _remember(self._ended, container, end)
        for waiter in self._waiters.get(container, ()):
            self._answer(waiter, end)

    async def _explained(self, end: Exit) -> Exit:
        """Who killed it: the kernel for want of memory, or somebody who was removing it; neither: somebody else."""
        if end.exit_code == 0 or end.oom_killed or end.removed:
            return end
        if end.exit_code != _KILLED:
            # One of its processes may have run out of memory, and this one have made something else of that.
            await asyncio.sleep(_OOM_LATE_S)
            return replace(end, oom_killed=end.container_id in self._out_of_memory)
        try:
            async with asyncio.timeout(_EXPLAIN_S):
                for wait_s in (0.0, _OOM_LATE_S, *(() if end.signalled else (_OOM_LATEST_S,))):
                    await asyncio.sleep(wait_s)
                    info = await self._inspect(end.container_id)
                    if info.state == "removing":
                        return replace(end, removed=True)
                    if info.oom_killed or end.container_id in self._out_of_memory:
                        return replace(end, oom_killed=True)
        except NotFound:
            return replace(end, removed=True)
        except (OutriderError, TimeoutError):
            log.info("the engine can't say what killed the container %s", end.container_id[:12])
        return end

    def _answer(self, waiter: _Waiter, end: Exit) -> None:
        if not waiter.future.done():
            waiter.future.set_result(replace(end, gap=waiter.generation not in (0, self._generation)))

    def _fail(self, container: str, error: NotFound) -> None:
        for waiter in self._waiters.get(container, ()):
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _publish(self, event: EngineEvent) -> None:
        for queue in self._subscribers:
            if queue.full():
                # Somebody does not keep up: better told to look again than held back or fed without end.
                while not queue.empty():
                    queue.get_nowait()
                event = replace(event, action="resync", container_id="", name="", labels={})
            queue.put_nowait(event)


def _remember(known: OrderedDict[str, T], container: str, value: T) -> None:
    known[container] = value
    while len(known) > _REMEMBERED:
        known.popitem(last=False)

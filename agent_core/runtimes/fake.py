"""A container engine in memory: the official seam for tests that must be fast or provoke what a real one won't.

A container's program is a coroutine, chosen by image; without one it ends at once with exit code 0::

    async def program(process: FakeProcess) -> int:
        process.write(b"hello\\n")
        await process.signalled.wait()
        return 143

    runtime = FakeRuntime(programs={"game:1": program})
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from agent_core.runtimes.base import (
    ContainerInfo,
    ContainerSpec,
    EngineEvent,
    EngineInfo,
    ExecInfo,
    Exit,
    ImageInfo,
    NetworkGuard,
    PullProgress,
    StreamName,
    secrets_in,
)
from outrider.errors import Conflict, EngineUnavailable, NotFound, OperationTimeout, PermanentError


@dataclass
class FakeProcess:
    """What a program sees of its container. ``signalled`` is set by the stop signal; killing cancels it."""

    spec: ContainerSpec
    signalled: asyncio.Event = field(default_factory=asyncio.Event)
    log: list[tuple[StreamName, bytes]] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)  # of what is in the log
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, data: bytes, stream: StreamName = "stdout") -> None:
        """Output, as a program would print it."""
        self.log.append((stream, data))
        self.times.append(_now())
        self.notify()

    def notify(self) -> None:
        """Something changed: wake all who read. Each change has an event of its own, so that no reader misses one."""
        former, self.changed = self.changed, asyncio.Event()
        former.set()


class _Clock:
    """The time, never the same twice: two microseconds apart, so that a moment fits between any two."""

    def __init__(self) -> None:
        self._last = datetime.min.replace(tzinfo=UTC)

    def __call__(self) -> datetime:
        self._last = max(datetime.now(UTC), self._last + timedelta(microseconds=2))
        return self._last


_now = _Clock()

Program = Callable[[FakeProcess], Awaitable[int]]
Executed = Callable[[FakeProcess, Sequence[str]], Awaitable[tuple[int, bytes]]]
"""A program run inside a container: exit code and what it prints."""


@dataclass
class _Container:
    info: ContainerInfo
    process: FakeProcess
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    engine_stopped: bool = False
    removed: bool = False
    forgotten: bool = False


@dataclass
class _Execution:
    container: _Container
    args: tuple[str, ...]
    started: bool = False
    exit_code: int | None = None


class FakeRuntime:
    """Keeps the `Runtime` protocol. ``images``: what exists beside the keys of ``programs``; ``None``: every image.

    ``calls`` has every method call in order; `stop_engine` and `start_engine` do what they say. Calls about a container
    whose name is in ``hangs_on`` time out; a call in ``unanswered`` (method, name) does so once, having been carried
    out or, with False, not.
    """

    def __init__(self, programs: Mapping[str, Program] | None = None, *, images: set[str] | None = None) -> None:
        self.programs: dict[str, Program] = dict(programs or {})
        self.executed: dict[str, Executed] = {}  # by the first argument; without one it ends at once with code 0
        self.private_networks: dict[str, dict[str, str]] = {}  # labels by name
        self.connections: dict[str, dict[str, tuple[str, ...]]] = {}  # aliases by container's name, by network
        self._executions: dict[str, _Execution] = {}
        self.images = images
        self.registry: set[str] = set()  # what can be pulled beside them
        self.tags: dict[str, str] = {}  # further names of images
        self.oci_runtimes: tuple[str, ...] = ()
        self.failing_oci_runtimes: set[str] = set()  # what is started with one of these can't be started
        self.networks: set[str] = set()
        self.guards: dict[str, NetworkGuard] = {}
        self.calls: list[tuple[str, str]] = []
        self._containers: dict[str, _Container] = {}
        self._ids = itertools.count(1)
        self.hangs_on: set[str] = set()
        self.unanswered: dict[tuple[str, str], bool] = {}
        self._boot = 1
        self._available = True
        self._subscribers: set[asyncio.Queue[EngineEvent]] = set()

    # -- what tests do to it

    def stop_engine(self) -> None:
        """The engine dies, and every container with it."""
        self._available = False
        for container in self._containers.values():
            if container.info.state == "running":
                container.engine_stopped = True
                if container.task is not None:
                    container.task.cancel()

    def stop_engine_in_start(self, container: str) -> None:
        """The engine dies in the middle of this container's start, whose program runs on, and forgets it; the others
        die with it."""
        found = self._find(container)
        found.forgotten = True
        found.info = replace(found.info, state="created", started_at=None)
        self.stop_engine()

    def start_engine(self) -> None:
        """The engine is back: another boot, containers as they were left."""
        self._available = True
        self._boot += 1
        self._publish("resync", None)

    def spec_of(self, container: str) -> ContainerSpec:
        """What a container was created from."""
        return self._find(container).process.spec

    # -- the protocol

    async def info(self) -> EngineInfo:
        self._call("info", "")
        return EngineInfo("fake", "1", "fake-engine", f"boot-{self._boot}", "/fake", "memory", self.oci_runtimes)

    async def find_image(self, image: str) -> ImageInfo:
        self._call("find_image", image)
        name = self.tags.get(image, image)
        if self.images is not None and name not in self.images and name not in self.programs:
            raise NotFound(f"the image {image} is not on this node", code="image_not_found")
        return ImageInfo(f"sha256:{name}", tags=(image,))

    async def pull_image(self, image: str, *, on_progress: PullProgress | None = None) -> ImageInfo:
        self._call("pull_image", image)
        if self.images is not None and image not in self.images | self.registry and image not in self.programs:
            raise NotFound(f"the image {image} is not on this node and no registry has it", code="image_not_found")
        if self.images is not None:
            self.images.add(image)
        if on_progress is not None:
            on_progress(1000, 1000)
        return await self.find_image(image)

    async def tag_image(self, image_id: str, name: str, tag: str) -> None:
        self._call("tag_image", f"{name}:{tag}")
        self.tags[f"{name}:{tag}"] = image_id.removeprefix("sha256:")

    async def ensure_network(self, name: str, *, labels: Mapping[str, str]) -> None:
        self._call("ensure_network", name)
        self.networks.add(name)

    async def guard_network(self, name: str, guard: NetworkGuard) -> None:
        self._call("guard_network", name)
        if name not in self.networks:
            raise NotFound(f"there is no network {name}", code="network_not_found")
        self.guards[name] = guard

    async def ensure_private_network(self, name: str, *, labels: Mapping[str, str], subnets: Sequence[str]) -> None:
        self._call("ensure_private_network", name)
        self.private_networks.setdefault(name, dict(labels))

    async def connect(self, network: str, container: str, *, aliases: Sequence[str]) -> None:
        self._call("connect", container)
        if network not in self.private_networks:
            raise NotFound(f"there is no network {network}", code="network_not_found")
        self.connections.setdefault(network, {})[self._find(container).info.name] = tuple(aliases)

    async def remove_network(self, name: str) -> None:
        self._call("remove_network", name)
        self.private_networks.pop(name, None)
        self.connections.pop(name, None)

    async def list_networks(self, *, labels: Mapping[str, str]) -> list[str]:
        self._call("list_networks", "")
        return [name for name, have in self.private_networks.items() if all_labels(have, labels)]

    async def create(self, spec: ContainerSpec) -> str:
        self._call("create", spec.name)
        await self.find_image(spec.image)
        if any(container.info.name == spec.name for container in self._containers.values()):
            raise Conflict(f"there is a container named {spec.name} already", code="name_taken")
        container_id = f"{next(self._ids):064x}"
        info = ContainerInfo(
            id=container_id,
            name=spec.name,
            image=spec.image,
            state="created",
            labels=dict(spec.labels),
            created_at=datetime.now(UTC),
            ports=spec.ports,
            mounts=spec.mounts,
            restart_policy=spec.restart_policy,
            secrets=secrets_in(spec.env, spec.labels),
        )
        self._containers[container_id] = _Container(info, FakeProcess(spec))
        self._answer("create", spec.name)
        return container_id

    async def start(self, container: str) -> None:
        self._call("start", container)
        found = self._find(container)
        if found.info.state == "running":
            return
        former = found.process
        if former.spec.oci_runtime in self.failing_oci_runtimes:
            raise PermanentError(f"{container} can't be started", code="cannot_start")
        found.process = FakeProcess(former.spec, log=former.log, times=former.times)
        found.ended.clear()
        found.engine_stopped = False
        found.info = replace(found.info, state="running", started_at=_now(), exit_code=None)
        former.notify()
        self._publish("start", found)
        found.task = asyncio.create_task(self._run(found))
        # One that is cancelled before it has begun ends its container nowhere else.
        found.task.add_done_callback(lambda task: self._end(found, 137) if task.cancelled() else None)
        self._answer("start", container)

    async def forgotten(self, container: str, *, boot: str = "") -> bool:
        self._call("forgotten", container)
        return self._find(container).forgotten

    async def end_forgotten(self, container: str) -> None:
        self._call("end_forgotten", container)
        found = self._find(container)
        if found.task is not None:
            found.task.cancel()

    async def stop(self, container: str, *, grace_s: float) -> None:
        self._call("stop", container)
        found = self._find(container)
        if found.info.state != "running":
            return
        found.process.signalled.set()
        try:
            await asyncio.wait_for(found.ended.wait(), grace_s)
        except TimeoutError:
            await self.kill(container)

    async def restart(self, container: str, *, grace_s: float) -> None:
        await self.stop(container, grace_s=grace_s)
        await self.start(container)

    async def kill(self, container: str, *, signal: str = "SIGKILL") -> None:
        self._call("kill", container)
        found = self._find(container)
        if found.info.state != "running":
            raise Conflict(f"the container {found.info.name} is not running", code="container_not_running")
        if signal != "SIGKILL":
            found.process.signalled.set()
            return
        if found.task is not None:
            found.task.cancel()
        await found.ended.wait()

    async def remove(self, container: str, *, force: bool = False) -> None:
        self._call("remove", container)
        try:
            found = self._find(container)
        except NotFound:
            return
        if found.info.state == "running":
            if not force:
                raise Conflict(f"the container {found.info.name} is running", code="container_running")
            found.removed = True
            await self.kill(container)
        self._containers.pop(found.info.id, None)
        found.process.notify()
        self._publish("destroy", found)

    async def rename(self, container: str, name: str) -> None:
        self._call("rename", container)
        found = self._find(container)
        if any(each.info.name == name for each in self._containers.values()):
            raise Conflict(f"there is a container named {name} already", code="name_taken")
        found.info = replace(found.info, name=name)
        self._answer("rename", name)

    async def inspect(self, container: str) -> ContainerInfo:
        self._call("inspect", container)
        return self._find(container).info

    async def list(self, *, labels: Mapping[str, str] | None = None, all: bool = True) -> list[ContainerInfo]:
        self._call("list", "")
        wanted = labels or {}
        return [
            container.info
            for container in self._containers.values()
            if (all or container.info.state == "running") and all_labels(container.info.labels, wanted)
        ]

    @asynccontextmanager
    async def attach(self, container: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        self._call("attach", container)
        found = self._find(container)
        yield self._output(found, position=len(found.process.log), follow=True)

    async def logs(
        self, container: str, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        self._call("logs", container)
        found = self._find(container)
        position = 0 if tail is None else max(0, len(found.process.log) - tail)
        if since is not None:
            position = max(position, bisect_left(found.process.times, since))
        async for item in self._output(found, position=position, follow=follow):
            yield item

    async def exec_create(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Mapping[str, str] = MappingProxyType({}),
        workdir: str | None = None,
        user: str | None = None,
    ) -> str:
        self._call("exec_create", container)
        found = self._find(container)
        if found.info.state != "running":
            raise Conflict(f"the container {found.info.name} is not running", code="container_busy")
        execution = f"{next(self._ids):064x}"
        self._executions[execution] = _Execution(found, tuple(args))
        return execution

    @asynccontextmanager
    async def exec_start(self, execution: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        found = self._executions[execution]
        self._call("exec_start", found.container.info.name)
        if found.started:
            raise Conflict("it was started before", code="exec_started")
        found.started = True
        yield self._carry_out(found)

    async def exec_inspect(self, execution: str) -> ExecInfo:
        found = self._executions.get(execution)
        if found is None:
            raise NotFound("no such execution", code="exec_not_found")
        self._call("exec_inspect", found.container.info.name)
        running = found.started and found.exit_code is None
        return ExecInfo(found.container.info.id, running, found.exit_code, 0)

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        found = self._find(container)
        if found.info.state in ("created", "running"):
            await found.ended.wait()
        return Exit(
            found.info.id, found.info.exit_code or 0, found.info.oom_killed, found.engine_stopped, found.removed
        )

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)

    async def aclose(self) -> None:
        tasks = [container.task for container in self._containers.values() if container.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- inside

    async def _run(self, container: _Container) -> None:
        spec = container.process.spec
        program = self.programs.get(spec.image)
        try:
            code = 0 if program is None else await program(container.process)
        except asyncio.CancelledError:
            code = 137
        except Exception as error:  # a program that breaks is a program that fails
            container.process.write(f"{type(error).__name__}: {error}\n".encode(), "stderr")
            code = 1
        self._end(container, code)

    def _end(self, container: _Container, code: int) -> None:
        if not container.forgotten:
            container.info = replace(container.info, state="exited", exit_code=code, finished_at=_now())
        container.ended.set()
        container.process.notify()
        self._publish("die", container)

    async def _carry_out(self, execution: _Execution) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        program = self.executed.get(execution.args[0])
        code, said = (0, b"") if program is None else await program(execution.container.process, execution.args)
        execution.exit_code = code
        if said:
            yield "stdout", said

    async def _output(
        self, container: _Container, *, position: int, follow: bool
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        log = container.process.log
        while True:
            changed = container.process.changed
            while position < len(log):
                yield log[position]
                position += 1
            gone = container.info.id not in self._containers
            if not follow or gone or container.info.state not in ("created", "running"):
                return
            if changed is container.process.changed:
                await changed.wait()

    def _find(self, container: str) -> _Container:
        for found in self._containers.values():
            if container == found.info.name or found.info.id == container:
                return found
        raise NotFound(f"there is no container {container} on this node", code="container_not_found")

    def _call(self, name: str, subject: str) -> None:
        self.calls.append((name, subject))
        container = self._name(subject)
        if container in self.hangs_on or self.unanswered.get((name, container)) is False:
            self.unanswered.pop((name, container), None)
            raise OperationTimeout(f"the container engine did not answer in time: {name} {container}")
        if not self._available:
            raise EngineUnavailable(
                "the container engine is not running", hint="start it; the agent recovers by itself"
            )

    def _answer(self, name: str, subject: str) -> None:
        container = self._name(subject)
        if self.unanswered.pop((name, container), False):
            raise OperationTimeout(f"the container engine did not answer in time: {name} {container}")

    def _name(self, subject: str) -> str:
        found = self._containers.get(subject)
        return found.info.name if found else subject

    def _publish(self, action: str, container: _Container | None) -> None:
        info = container.info if container else None
        event = EngineEvent(
            action=action,
            container_id=info.id if info else "",
            name=info.name if info else "",
            labels=info.labels if info else {},
            time=datetime.now(UTC),
            exit_code=info.exit_code if info else None,
        )
        for queue in self._subscribers:
            queue.put_nowait(event)


def all_labels(have: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether ``have`` has all of ``wanted``; an empty value asks for the label alone."""
    return all(name in have and value in ("", have[name]) for name, value in wanted.items())

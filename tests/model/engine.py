"""The node's container engine in the model, and a dead or living agent's connection to it.

The engine outlives agents, keeps a book of every program that ever ran, and carries out what it was asked for even
when who asked has died meanwhile: a start that was on its way is done later, as a real engine does it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_OBJECT,
    LABEL_RUN,
    LABEL_STEP,
    ContainerInfo,
    ContainerSpec,
    EngineEvent,
    EngineInfo,
    Exit,
    ImageInfo,
    NetworkGuard,
    PullProgress,
    StreamName,
)
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import EngineUnavailable, OutriderError
from tests.agent_rig import BASE_IMAGE
from tests.model.virtual import PROCESS, Process

REQUEST_S = 0.003
Ended = Literal["", "by itself", "stopped", "killed"]


@dataclass
class Execution:
    """One time that a program ran: of which attempt, what it wrote, how it ended."""

    run_id: str
    step: str
    attempt: int
    object_ref: str
    process: FakeProcess
    written: bytes = b""
    ended: Ended = ""
    exit_code: int | None = None
    meddled: bool = False  # somebody else killed or removed it, or the engine stopped under it
    told: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def key(self) -> tuple[str, str, int]:
        return self.run_id, self.step, self.attempt


class Engine(FakeRuntime):
    """A FakeRuntime whose programs do as the model says. ``stubborn`` runs ignore the stop signal."""

    def __init__(self) -> None:
        super().__init__({BASE_IMAGE: self._step, "outrider/pause:1": _hold, "game:1": _hold})
        self.executions: list[Execution] = []
        self.collisions: list[tuple[object, object]] = []
        self.stubborn = False
        self.late_s = 0.0  # how long the next start takes to get through
        self.forgets = False  # the next start of a step is the last that this engine does, and in no book of it
        self._requests: dict[asyncio.Task[Any], Coroutine[Any, Any, Any]] = {}
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, None)

    @property
    def up(self) -> bool:
        return self._available

    def running(self) -> list[Execution]:
        """What runs now, the oldest first."""
        return [each for each in self.executions if not each.ended]

    def request(self, work: Coroutine[Any, Any, Any], after_s: float = REQUEST_S) -> asyncio.Task[Any]:
        """Carry ``work`` out a moment later, whatever becomes of who asked for it."""

        async def later() -> Any:
            await asyncio.sleep(after_s)
            return await work

        task = asyncio.get_running_loop().create_task(later(), context=self._context.copy())
        self._requests[task] = work
        task.add_done_callback(self._answered)
        return task

    def _answered(self, request: asyncio.Task[Any]) -> None:
        self._requests.pop(request).close()
        if not request.cancelled():
            request.exception()

    def stop_engine(self) -> None:
        for each in self.running():
            each.meddled = True
        for request in list(self._requests):
            request.cancel()
        super().stop_engine()

    async def start(self, container: str) -> None:
        spec = self.spec_of(container)
        missing = [mount.source for mount in spec.mounts if not Path(mount.source).exists()]
        if missing:
            # The engine's own refusal of a bind mount whose source has been renamed.
            raise OutriderError(f"invalid mount config: bind source path does not exist: {missing[0]}")
        await super().start(container)
        if self.forgets and spec.labels.get(LABEL_KIND) == "step":
            self.forgets = False
            await asyncio.sleep(0)  # its program begins
            self.stop_engine_in_start(container)

    def power_off(self) -> None:
        """The machine goes off: also what no engine knows of ends."""
        for each in self._containers.values():
            if each.forgotten and each.task is not None:
                each.task.cancel()
        if self.up:
            self.stop_engine()

    async def meddle(self, name: str, *, remove: bool) -> None:
        """Somebody on the node kills or removes a container by hand."""
        for each in self.running():
            if each.process is self._find(name).process:
                each.meddled = True
        await (super().remove(name, force=True) if remove else super().kill(name))

    async def _step(self, process: FakeProcess) -> int:
        labels = process.spec.labels
        run = Execution(
            labels[LABEL_RUN], labels[LABEL_STEP], int(labels[LABEL_ATTEMPT]), labels.get(LABEL_OBJECT, ""), process
        )
        others = [each for each in self.running() if run.object_ref and each.object_ref == run.object_ref]
        self.collisions += [(each.key, run.key) for each in others if each.run_id != run.run_id]
        self.executions.append(run)
        signalled = asyncio.ensure_future(process.signalled.wait())
        try:
            await asyncio.wait({run.told} if self.stubborn else {run.told, signalled}, return_when="FIRST_COMPLETED")
            if run.told.done():
                run.ended, run.exit_code = "by itself", run.told.result()
            else:
                run.ended, run.exit_code = "stopped", 143
        except asyncio.CancelledError:
            run.ended, run.exit_code = "killed", 137
            raise
        finally:
            signalled.cancel()
        return run.exit_code

    def write(self, run: Execution, data: bytes) -> None:
        """The program prints."""
        run.process.write(data)
        run.written += data

    def outputs(self, run: Execution, line: str) -> None:
        """The program appends to its outputs."""
        directory = next(mount.source for mount in run.process.spec.mounts if mount.target == "/outrider")
        with suppress(FileNotFoundError), (Path(directory) / "outputs").open("a") as file:
            file.write(line + "\n")

    def step_containers(self) -> list[ContainerInfo]:
        return [each.info for each in self._containers.values() if each.info.labels.get(LABEL_KIND) == "step"]

    def all_containers(self) -> list[ContainerInfo]:
        return [each.info for each in self._containers.values()]


async def _hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


class Connection:
    """The `Runtime` of one agent process: its requests reach the engine, its answers reach it only while it lives."""

    def __init__(self, engine: Engine, process: Process) -> None:
        self._engine = engine
        self._process = process

    async def _ask(self, name: str, work: Coroutine[Any, Any, Any], after_s: float = REQUEST_S) -> Any:
        try:
            self._process.instant(f"engine.{name}.before")
        except asyncio.CancelledError:
            work.close()
            raise
        request = self._engine.request(work, after_s)
        try:
            answer = await asyncio.shield(request)
        except asyncio.CancelledError:
            if not request.cancelled():
                raise
            raise EngineUnavailable("the engine stopped before it answered") from None
        self._process.instant(f"engine.{name}.after")
        return answer

    async def info(self) -> EngineInfo:
        return await self._ask("info", self._engine.info())  # type: ignore[no-any-return]

    async def find_image(self, image: str) -> ImageInfo:
        return await self._ask("find_image", self._engine.find_image(image))  # type: ignore[no-any-return]

    async def pull_image(self, image: str, *, on_progress: PullProgress | None = None) -> ImageInfo:
        return await self._ask("pull_image", self._engine.pull_image(image))  # type: ignore[no-any-return]

    async def tag_image(self, image_id: str, name: str, tag: str) -> None:
        await self._ask("tag_image", self._engine.tag_image(image_id, name, tag))

    async def ensure_network(self, name: str, *, labels: Mapping[str, str]) -> None:
        await self._ask("ensure_network", self._engine.ensure_network(name, labels=labels))

    async def guard_network(self, name: str, guard: NetworkGuard) -> None:
        await self._ask("guard_network", self._engine.guard_network(name, guard))

    async def create(self, spec: ContainerSpec) -> str:
        return await self._ask("create", self._engine.create(spec))  # type: ignore[no-any-return]

    async def start(self, container: str) -> None:
        after_s, self._engine.late_s = max(REQUEST_S, self._engine.late_s), 0.0
        await self._ask("start", self._engine.start(container), after_s)

    async def forgotten(self, container: str, *, boot: str = "") -> bool:
        return await self._ask("forgotten", self._engine.forgotten(container, boot=boot))  # type: ignore[no-any-return]

    async def end_forgotten(self, container: str) -> None:
        await self._ask("end_forgotten", self._engine.end_forgotten(container))

    async def stop(self, container: str, *, grace_s: float) -> None:
        await self._ask("stop", self._engine.stop(container, grace_s=grace_s))

    async def restart(self, container: str, *, grace_s: float) -> None:
        await self._ask("restart", self._engine.restart(container, grace_s=grace_s))

    async def kill(self, container: str, *, signal: str = "SIGKILL") -> None:
        await self._ask("kill", self._engine.kill(container, signal=signal))

    async def remove(self, container: str, *, force: bool = False) -> None:
        await self._ask("remove", self._engine.remove(container, force=force))

    async def inspect(self, container: str) -> ContainerInfo:
        return await self._ask("inspect", self._engine.inspect(container))  # type: ignore[no-any-return]

    async def list(self, *, labels: Mapping[str, str] | None = None, all: bool = True) -> list[ContainerInfo]:
        return await self._ask("list", self._engine.list(labels=labels, all=all))  # type: ignore[no-any-return]

    @asynccontextmanager
    async def attach(self, container: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        async with self._engine.attach(container) as chunks:
            yield chunks

    async def logs(
        self, container: str, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        async for item in self._engine.logs(container, follow=follow, tail=tail, since=since):
            yield item

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        end = await self._engine.exited(container, boot=boot)
        self._process.instant("engine.exited")
        return end

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        async for event in self._engine.events():
            yield event

    async def aclose(self) -> None:
        """The engine stays."""

    def __getattr__(self, name: str) -> Any:
        # What the protocol gains without touching the model's own part of it.
        return getattr(self._engine, name)

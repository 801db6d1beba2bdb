"""One attempt of a step: one container with a name derived from (run, step, attempt), from intent to exit.

The intent is journalled before anything is created. Finding the container already there means: adopt it.
What is only `created` after a restart of the agent is fenced first, because a start request of the dead
agent may still be on its way; so is what the engine did not answer the start of in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import structlog

from agent_core.container_spec import ContainerScope, GrantedVolume
from agent_core.control import ControlSocket
from agent_core.networks import told_to_step
from agent_core.orders import AttemptOrder, AttemptResult
from agent_core.outcome import (
    UNKNOWN_EXIT,
    Uncertain,
    Why,
    container_gone,
    end_unseen,
    engine_stopped,
    failure,
    start_forgotten,
    stopped,
)
from agent_core.room import disk_errors
from agent_core.runtimes.base import LABEL_BOOT, LABEL_PLAN, ContainerInfo, Exit
from agent_core.services import Services
from agent_core.state import AttemptRecord, Phase
from agent_core.stepfiles import MAX_DIRECTORY_BYTES, ProgressLine, StepDirectory
from agent_core.steplog import StepLog
from agent_core.transitions import Transition
from outrider.errors import Conflict, EngineUnavailable, NotFound, OperationTimeout, OutriderError
from outrider.retry import RetryPolicy

log = structlog.get_logger(__name__)
T = TypeVar("T")

_DRAIN_S = 5.0  # between the exit and the end of the output; then the engine's own log is asked
_PROGRESS_S = 0.25
_CUT_S = 2.0  # between the end of the output and the exit; then the output was cut off, and goes on somewhere
_ENGINE_LOG_FACTOR = 16  # its file has a record around each write: short lines take that much more room
_FIRST_ANSWER_S = 1.0  # of an engine that has not been asked yet; then the step says what it waits for
_HANGS_S = 1.0  # between two questions to an engine that let the former time out


class _Stopped(Exception):
    """`stop` was called before the container ran."""


class _NamespaceGone(Exception):
    """The pause container whose network the step joins does not run any more."""


class _StartUnclear(Exception):
    """The engine did not answer the start in time: it may have been carried out, or be still on its way."""


class Attempt:
    """Runs one order. ``begin`` journals the intent; ``on_waiting`` hears what it waits for, "" if nothing."""

    def __init__(
        self,
        services: Services,
        order: AttemptOrder,
        *,
        begin: Callable[[], Coroutine[Any, Any, None]],
        on_waiting: Callable[[str], Coroutine[Any, Any, None]],
        on_progress: Callable[[ProgressLine], None],
    ) -> None:
        self._services = services
        self._order = order
        self._begin = begin
        self._on_waiting = on_waiting
        self._on_progress = on_progress
        path = services.attempts_dir / order.run_id / order.step / str(order.number) / "outrider"
        self._directory = StepDirectory(path)
        self._stopping = asyncio.Event()
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._over = False
        self._why: Why | None = None
        self._grace_s = 0.0
        self._pause: str | None = None
        self._log: StepLog | None = None
        self._created: Future[None] | None = None
        self._fenced = False  # the container that a former agent left had never run, and was done away with

    def stop(self, why: Why, grace_s: float) -> None:
        """End it: stop signal, then kill. The first reason counts."""
        if self._why is None:
            self._why, self._grace_s = why, grace_s
            self._stopping.set()

    async def run(self, former: AttemptRecord | None = None) -> AttemptResult:
        """Carry it out; ``former``: how far the journal says a former agent came with it."""
        order, services = self._order, self._services
        files = await services.spool.open(order.run_id, order.step, order.number)
        cap = services.policy.limits.step_log_bytes
        self._log = StepLog(
            services.spool,
            files,
            order.secrets,
            max_bytes=cap,
            on_limit=lambda: self.stop("output_limit", 0),
            withheld=order.unavailable is not None,
        )
        grace_s = services.config.cancel_grace_s
        timer = asyncio.get_running_loop().call_later(order.timeout_s, self.stop, "timeout", grace_s)
        result = AttemptResult()
        drained, unseen = True, False
        try:
            async with AsyncExitStack() as stack:
                if former is not None and former.exit_code is not None:
                    end, drained = await self._seen(former), False
                else:
                    # Not to be broken off: what a former agent started may be running, and ends by being stopped.
                    found = None
                    if former is not None:
                        drained = False  # what a container that is gone had written can't be known
                        found = await self._recover(former.phase)
                    drained = found is None
                    obtaining = self._obtain(former, found, stack)
                    with services.removals.held_back():
                        container, running = await (obtaining if found else self._interruptible(obtaining))
                    drained = False
                    end, drained = await self._see_through(container, running)
                unseen = end.unseen
                result.exit_code = end.exit_code
                self._judge(end, result)
                self._over = True
        except _Stopped:
            result.error = self._stopped_error()
        except OutriderError as error:
            result.error, result.uncertain = error, isinstance(error, Uncertain)
        finally:
            timer.cancel()
            if self._pause is not None:
                services.netpool.give_back(order.run_id, self._pause)
        result.cancelled = self._why == "cancelled" and result.error is not None
        result.changes = await self._log.finish(drained, lambda: services.runtime.logs(order.container), lacking=unseen)
        result.log_bytes = self._log.lengths()
        return result

    async def discard(self) -> None:
        """Remove container and directory; only after the result is on the disk. Its log is synced first."""
        if self._log is not None:
            await self._log.sync()
        services = self._services
        await services.operations.run(
            "container.remove", RetryPolicy(), lambda: services.runtime.remove(self._order.container, force=True)
        )
        await asyncio.to_thread(self._directory.remove)

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``, or _Stopped as soon as `stop` is called. For what can be left undone at any point."""
        async with _beside(self._stopping.wait()) as (stopping,):
            task = asyncio.ensure_future(work)
            try:
                await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise _Stopped
                return task.result()
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError, OutriderError):
                    await task

    async def _seen(self, former: AttemptRecord) -> Exit:
        """The end that a former agent saw; its output is fetched from the engine's log, if the container is there."""
        with suppress(NotFound):
            await self._interruptible(self._with_engine(lambda: self._services.runtime.inspect(former.container)))
        await self._interruptible(self._services.engine.available())
        assert former.exit_code is not None
        unseen = former.engine_boot not in ("", self._services.engine.boot)
        return Exit(former.container, former.exit_code, former.oom_killed, unseen=unseen)

    async def _recover(self, phase: Phase) -> ContainerInfo | None:
        """What a former agent left of this attempt, if it was started. Waits for the engine as long as it takes."""
        info = await self._with_engine(lambda: self._find(fence=True))
        if info is None and phase != "intended" and not self._fenced:
            raise container_gone(self._order.step)
        if info is None:
            self._directory.unfence()
        return info

    async def _obtain(
        self, former: AttemptRecord | None, info: ContainerInfo | None, stack: AsyncExitStack
    ) -> tuple[str, bool]:
        """The container of this attempt, and whether it has been started already. Waits for the engine."""
        if info is None and self._order.unavailable is not None:
            raise self._order.unavailable
        if info is None:
            self._services.disk.check(f"run step {self._order.step}")
            with disk_errors(f"prepare step {self._order.step}"):
                await asyncio.to_thread(self._directory.prepare, self._order.inputs, *self._order.runs_as)
            await self._services.volumes.share(self._order.shared, self._order.gid)
        await self._serve_control(stack)
        if info is None:
            if former is None:
                await self._know_the_engine()
                await self._begin()
            info = await self._with_engine(self._create)
        return info.id, info.started_at is not None

    async def _know_the_engine(self) -> None:
        """The intent names the engine: without it, an end by that engine's restart could not be told from another."""
        if self._services.engine.info is not None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ANSWER_S):
                await self._services.engine.available()
            return
        await self._on_waiting("engine")
        await self._services.engine.available()
        await self._on_waiting("")

    async def _create(self, *, pulled: bool = False) -> ContainerInfo:
        order, services = self._order, self._services
        if self._pause is None:
            self._pause = await services.netpool.lease(order.run_id, order.plan.network)
        spec = order.spec(
            node_id=services.config.node_id,
            directory=self._directory.path,
            network=f"container:{self._pause}",
            told=told_to_step(services.policy, order.plan.network),
            log_max_bytes=services.policy.limits.step_log_bytes * _ENGINE_LOG_FACTOR,
            oci_runtime=services.netpool.oci_runtime,
            engine_boot=services.engine.boot,
        )
        image_id = await services.images.before_create(order.plan.image, run=order.run_id, tell=self._pulling)
        try:
            container = await services.runtime.create(replace(spec, image_id=image_id))
            self._created = self._mark("created")
        except Conflict:
            # Ours, if the answer to a former request was lost: the name is the attempt's.
            info = await self._find(fence=False)
            if info is None:  # a create that the engine was hanging on; it is there soon, or its name is free again
                raise OperationTimeout(f"the container engine holds the name {spec.name} without a container") from None
            self._created = self._mark("created")
            return info
        except OutriderError as error:
            if error.code == "image_not_found" and not pulled:
                # Nearly always it is here: asked for only where the engine says that it is not.
                await services.images.ensure(order.plan.image, run=order.run_id, tell=self._pulling)
                return await self._create(pulled=True)
            if await self._namespace_is_gone():
                return await self._create()
            raise
        return ContainerInfo(id=container, name=spec.name, image=spec.image, state="created", labels=spec.labels)

    def _pulling(self, done: int, total: int, message: str) -> None:
        self._on_progress(ProgressLine(done, total, "bytes", message))

    async def _find(self, *, fence: bool) -> ContainerInfo | None:
        """The attempt's container if it is there. ``fence``: one that never started is done away with."""
        order, runtime = self._order, self._services.runtime
        try:
            info = await runtime.inspect(order.container)
        except NotFound:
            return None
        if any(
            info.labels.get(label) != value
            for label, value in self._order.labels(self._services.config.node_id).items()
            if label != LABEL_PLAN
        ):
            raise Conflict(
                f"the container name {order.container} is taken by a container that Outrider did not make",
                code="name_taken",
                hint="remove it",
            )
        if not fence or info.started_at is not None:
            return info
        self._directory.fence()
        info = await runtime.inspect(info.id)
        if info.started_at is not None:
            self._directory.unfence()
            return info
        await self._not_forgotten(info)
        await self._never_ran()
        await runtime.remove(info.id, force=True)
        return None

    async def _never_ran(self) -> None:
        """The container that is about to be removed surely never ran: the next agent may make it anew."""
        order, state = self._order, self._services.state
        change = state.attempt_phase(order.run_id, order.step, order.number, "intended")
        await state.commit(Transition.ATTEMPT_FENCED, change)
        self._fenced = True

    async def _not_forgotten(self, info: ContainerInfo) -> None:
        """Raises if the container, `created` by the engine's word, perhaps has run."""
        runtime = self._services.runtime
        if await runtime.forgotten(info.id, boot=info.labels.get(LABEL_BOOT, "")):
            await runtime.end_forgotten(info.id)
            raise start_forgotten(self._order.step)

    async def _see_through(self, container: str, running: bool) -> tuple[Exit, bool]:
        """Start it if it is not running, and stay with it until it has ended; whether its output was all read."""
        while True:
            try:
                return await self._accompany(container, running)
            except _NamespaceGone:
                await self._never_ran()
                await self._with_engine(partial(self._services.runtime.remove, container, force=True))
                container = (await self._interruptible(self._with_engine(self._create))).id
            except _StartUnclear:
                # Behind the fence either it has started by now, or it never will.
                info = await self._with_engine(lambda: self._find(fence=True))
                if info is None:
                    self._directory.unfence()
                    info = await self._interruptible(self._with_engine(self._create))
                container, running = info.id, info.started_at is not None

    async def _accompany(self, container: str, running: bool) -> tuple[Exit, bool]:
        runtime = self._services.runtime
        async with AsyncExitStack() as stack:
            if running:
                chunks: Any = runtime.logs(container, follow=True)
                self._started.set()
            else:
                attach = lambda: stack.enter_async_context(runtime.attach(container))  # noqa: E731
                chunks = await self._interruptible(self._with_engine(attach))
            works = (self._read(container, chunks, patient=running), self._stop_when_told(container), self._poll())
            reading, *_ = await stack.enter_async_context(_beside(*works))
            if not running:
                await self._start(container)
            end = await self._exit_of(container)
            self._mark_exit(end)
            self._ended.set()
            await asyncio.wait({reading}, timeout=_DRAIN_S)
            return end, reading.done() and bool(reading.result()) and not end.gap

    async def _start(self, container: str) -> None:
        if self._created is not None:
            # On the disk before it can have run: whether a container that is gone later has run is known by this.
            await asyncio.wrap_future(self._created)
        if self._stopping.is_set():
            raise _Stopped
        while True:
            try:
                with self._services.removals.held_back():
                    await self._services.runtime.start(container)
            except EngineUnavailable as error:
                await self._wait_for_engine(error)
                if not await self._has_started(container):
                    continue
            except OperationTimeout as error:
                await self._wait_for_engine(error)
                raise _StartUnclear from error
            except OutriderError as error:
                if error.code == "being_removed":
                    # The engine takes back what a former agent asked for: its create failed midway.
                    raise _StartUnclear from error
                if await self._namespace_is_gone():
                    raise _NamespaceGone from error
                # An engine that is just being stopped fails what it had nearly done.
                if error.code != "engine_error" or not await self._has_started(container):
                    raise
            self._started.set()
            self._mark("started")
            return

    async def _has_started(self, container: str) -> bool:
        """After a start without a good answer, as the engine says when it answers again."""

        async def look() -> bool:
            info = await self._services.runtime.inspect(container)
            if info.started_at is None:
                await self._not_forgotten(info)
            return info.started_at is not None

        has_started = await self._with_engine(look)
        await self._on_waiting("")
        return has_started

    async def _namespace_is_gone(self) -> bool:
        """Whether somebody (an engine's restart, a person) took the pause container; then it is given up."""
        if self._pause is None:
            return False
        try:
            if (await self._services.runtime.inspect(self._pause)).state == "running":
                return False
        except (EngineUnavailable, OperationTimeout):
            return False  # nobody knows
        except NotFound:
            pass
        self._services.netpool.discard(self._order.run_id, self._pause)
        self._pause = None
        return True

    async def _exit_of(self, container: str) -> Exit:
        while True:
            try:
                return await self._services.runtime.exited(container, boot=self._order.engine_boot)
            except EngineUnavailable as error:
                await self._wait_for_engine(error)
                await self._on_waiting("")
            except NotFound as error:
                raise container_gone(self._order.step) from error

    async def _read(self, container: str, chunks: Any, *, patient: bool) -> bool:
        """Whether the output was read to its end; where it is cut off before that, it is read on from the engine's."""
        while True:
            whole = await self._pump(chunks, patient=patient)
            with suppress(TimeoutError):
                async with asyncio.timeout(_CUT_S):
                    await self._ended.wait()
                return whole
            # The engine was restarted and the container survived it, or the connection was lost.
            await self._services.engine.available()
            chunks, patient = self._services.runtime.logs(container, follow=True), True

    async def _pump(self, chunks: Any, *, patient: bool) -> bool:
        """Whether ``chunks`` came to their end."""
        assert self._log is not None
        try:
            await self._log.pump(chunks, patient=patient)
        except OutriderError as error:
            log.info("a step's output was cut off; its rest comes from the engine's log", error=str(error))
            return False
        return True

    async def _stop_when_told(self, container: str) -> None:
        # Not before it has started: stopping what is not running yet does nothing, and then it runs.
        await self._stopping.wait()
        await self._started.wait()
        while True:
            try:
                await self._services.runtime.stop(container, grace_s=self._grace_s)
                await self._services.engine.answers(self._order.container)
                return
            except EngineUnavailable as error:
                self._services.engine.doubt(error)
                await self._services.engine.available()
            except OperationTimeout as error:
                await self._services.engine.hangs(self._order.container, error)
                await asyncio.sleep(_HANGS_S)
            except OutriderError as error:
                log.warning("a step's container can't be stopped", container=container, error=str(error))
                await asyncio.sleep(1)

    async def _poll(self) -> None:
        """Progress, and how full /outrider is, while the container runs; its end does not wait for this."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            self._look()

    def _look(self) -> None:
        with suppress(OSError):
            if self._directory.read_progress(self._order.secrets) and self._directory.progress is not None:
                self._on_progress(self._directory.progress)
        if self._directory.size() > MAX_DIRECTORY_BYTES:
            self.stop("directory_limit", 0)

    def _judge(self, end: Exit, result: AttemptResult) -> None:
        self._look()
        if end.engine_stopped:
            raise engine_stopped(self._order.step)
        if end.unseen and end.exit_code == UNKNOWN_EXIT:
            raise end_unseen(self._order.step)
        if self._why is not None:
            raise self._stopped_error()
        error = failure(self._order, end, self._directory.error, disk_is_full=self._services.disk.full_now)
        if error is not None:
            raise error
        result.outputs = self._directory.read_outputs()

    def _stopped_error(self) -> OutriderError:
        assert self._why is not None
        return stopped(self._order.step, self._why, self._services.policy.limits)

    async def _with_engine(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """``work``, again whenever the engine goes away or hangs in the middle of it, until the attempt is stopped."""
        waited = False
        while True:
            try:
                done = await work()
            except (EngineUnavailable, OperationTimeout) as error:
                waited = True
                await self._wait_for_engine(error)
                continue
            if waited:
                await self._engine_answers()
            return done

    async def _wait_for_engine(self, error: OutriderError) -> None:
        engine = self._services.engine
        if isinstance(error, OperationTimeout):
            # It answers others, perhaps. What was asked of it may be done by now, and is looked up by trying again.
            await engine.hangs(self._order.container, error)
            await self._on_waiting("the engine hangs on its container")
            await asyncio.sleep(_HANGS_S)
        else:
            engine.doubt(error)
            await self._on_waiting("engine")
        await engine.available()

    async def _engine_answers(self) -> None:
        await self._services.engine.answers(self._order.container)
        await self._on_waiting("")

    def _mark(self, phase: Phase) -> Future[None]:
        # Mostly not waited for: it only sharpens what a later agent can tell, and the next write brings it to the disk.
        order, state = self._order, self._services.state
        change = state.attempt_phase(order.run_id, order.step, order.number, phase)
        transition = Transition.ATTEMPT_CREATED if phase == "created" else Transition.ATTEMPT_STARTED
        return state.submit(transition, change)

    def _mark_exit(self, end: Exit) -> None:
        if end.engine_stopped or end.removed:
            return
        order, state = self._order, self._services.state
        change = state.attempt_exited(order.run_id, order.step, order.number, end.exit_code, end.oom_killed)
        state.submit(Transition.ATTEMPT_EXITED, change)

    async def _serve_control(self, stack: AsyncExitStack) -> None:
        order = self._order
        if order.plan.control is None:
            return
        volumes = {
            name: GrantedVolume(volume.host_path, writable, volume.group)
            for name, (volume, _, writable) in order.volumes.items()
        }
        scope = ContainerScope(
            run_id=order.run_id,
            step=order.step,
            attempt=order.number,
            object_ref=order.object_ref,
            volumes=volumes,
            uid=order.uid,
            gid=order.gid,
            secrets=order.secrets,
        )
        control = ControlSocket(self._services.containers, scope, self._directory.path)
        await control.start()

        async def close(kind: object, error: BaseException | None, _trace: object) -> None:
            # An agent that is ending leaves what the step began to the next agent.
            await control.aclose(attempt_over=self._over or isinstance(error, Exception))

        stack.push_async_exit(close)


@asynccontextmanager
async def _beside(*works: Coroutine[Any, Any, object]) -> AsyncIterator[list[asyncio.Task[object]]]:
    """Tasks that live as long as the context. Unlike with a task group, an error of the body keeps its type."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("a helper of a step failed", error=f"{type(outcome).__name__}: {outcome}")

"""Time and threads that a test decides about: an event loop whose clock jumps to the next thing that is due.

An hour of the agent's life passes in milliseconds, and the same decisions give the same history each time. For
that nothing may go on beside the loop: what would run in a thread runs in place, where the loop asks for it. The
one thread that is left (the spool's) is waited for before the clock moves, and heard only when the loop is idle.

A `Process` is what lives and dies together. Dead, it does nothing any more: whatever it asks for is answered with
cancellation, and its tasks are reaped.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from agent_core.journal import Journal
from server_core.store.sqlite import SqliteDatabase

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)

_STUCK_S = 20.0  # of real time: then the loop waits for something that never comes


class Process:
    """A process in the model's world. ``instants`` counts what a kill could come before or after."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.instants = 0
        self.dies_at: int | None = None
        self.died_of = ""
        self.tasks: dict[asyncio.Task[Any], None] = {}  # in the order in which they began
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        self.on_death: list[Callable[[], None]] = []
        self.buried = False  # all its tasks have ended

    def die_within(self, instants: int) -> None:
        """Be killed at the instant with this number from now."""
        self.dies_at = self.instants + instants

    def instant(self, name: str) -> None:
        """Something is about to happen, or has just happened. Raises CancelledError if the process dies of it."""
        if not self.alive:
            raise asyncio.CancelledError
        self.instants += 1
        if self.dies_at is not None and self.instants >= self.dies_at:
            self.kill(name)
            raise asyncio.CancelledError

    def kill(self, of: str) -> None:
        """As SIGKILL does: from here it has no effect on anything."""
        if not self.alive:
            return
        self.alive, self.died_of = False, of
        for call in self.on_death:
            call()
        asyncio.get_running_loop().call_soon(self._reap, context=contextvars.copy_context())

    def _reap(self) -> None:
        for task in list(self.tasks):
            task.cancel()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """``work`` as a task of this process."""
        return asyncio.get_running_loop().create_task(work, context=self.context.copy())


def instant(name: str) -> None:
    """An instant of the process that is running, if any is."""
    process = PROCESS.get()
    if process is not None:
        process.instant(name)


class VirtualLoop(asyncio.SelectorEventLoop):
    """``threads`` has, for each thread that works for this loop, a function that waits until it has nothing to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.threads: list[Callable[[], None]] = []
        self.spoken: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...], Any]] = queue.SimpleQueue()
        self._owner = threading.get_ident()
        self.swallow: Callable[[Callable[..., object]], bool] = lambda _callback: False
        super().__init__(_Selector(self))
        self.set_task_factory(_task_of_a_process)

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        if threading.get_ident() == self._owner:
            return self.call_soon(callback, *args, context=context)
        if not self.swallow(callback):
            self.spoken.put((callback, args, context))
        return None

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """In place, and at once."""
        future: asyncio.Future[Any] = self.create_future()
        process = PROCESS.get()
        if process is not None and not process.alive:
            future.cancel()
            return future
        try:
            future.set_result(func(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def idle(self) -> bool:
        """Let the threads finish; whether they had nothing to say."""
        for settle in self.threads:
            settle()
        quiet = True
        while not self.spoken.empty():
            callback, args, context = self.spoken.get()
            self.call_soon(callback, *args, context=context)
            quiet = False
        return quiet


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0) or not self._loop.idle():
            return ready
        if timeout is None:
            ready = super().select(_STUCK_S)
            if not ready:
                raise RuntimeError("nothing is left that could ever happen")
            return ready
        self._loop.now += timeout
        return ready


def _task_of_a_process(loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
    context = options.get("context")
    process = PROCESS.get() if context is None else context.get(PROCESS)
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **options)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
        if not process.alive:
            task.cancel()
    return task


class Clocks:
    """What the machine's clocks say. ``wall_offset_s`` is what somebody has set the wall clock forward by."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._wall_start = time.time()
        self._boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.wall_offset_s = 0.0
        self._real_gettime = time.clock_gettime
        self._boots = 0

    @property
    def boot_id(self) -> str:
        """Of the machine."""
        return f"boot-{self._boots}"

    def boot(self) -> None:
        """The machine starts anew: its boot-time clock begins at nothing."""
        self._boots += 1
        self._boottime = -self._loop.now

    def wall(self) -> float:
        return self._wall_start + self._loop.now + self.wall_offset_s

    def gettime(self, clock: int) -> float:
        if clock == time.CLOCK_BOOTTIME:
            return self._boottime + self._loop.now
        return self._real_gettime(clock)


@contextmanager
def one_thread(loop: VirtualLoop, clocks: Clocks) -> Iterator[None]:
    """Within it, who writes to journal or store waits on the spot until it is on the disk, each write a commit of its
    own and before and after it an instant to be killed at; and all clocks are the loop's."""
    with ExitStack() as stack:
        for target, name, new in (
            (Journal, "submit", _in_place(Journal.submit, "journal")),
            (SqliteDatabase, "_submit", _in_place(SqliteDatabase._submit, "store")),
            (time, "monotonic", loop.time),
            (time, "time", clocks.wall),
            (time, "time_ns", lambda: int(clocks.wall() * 1e9)),
            (time, "clock_gettime", clocks.gettime),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


def _in_place(submit: Callable[..., Future[Any]], what: str) -> Callable[..., Future[Any]]:
    def wait(self: Any, *args: Any) -> Future[Any]:
        instant(f"{what}.before")
        if self._closed:
            future: Future[Any] = Future()
            future.cancel()
            return future
        future = submit(self, *args)
        if not futures.wait([future], _STUCK_S).done:
            raise RuntimeError(f"a write to the {what} does not come to an end")
        instant(f"{what}.after")
        return future

    return wait

"""A few daemon threads.

``concurrent.futures`` joins its threads when the interpreter ends, so a cancelled step would wait for a
silent server until it is killed. These are left behind.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from outrider_stepkit import StepFailure

T = TypeVar("T")

_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRIES = 0.1, 30.0, 5
_LOOK_S = 0.05
_BUSY = 0.7
"""From so much of one processor on, the process is what is waited for, and not the store."""


class Stopped(Exception):
    """The transfer was given up while this part of it was under way."""


class Workers:
    """Runs what is submitted on ``count`` threads; leaving the context stops what still runs or waits.

    ``at_first`` begins with so many, and ``result`` adds to them for as long as the process mostly waits. Where the
    link is faster than the interpreter, more threads only take its lock from each other (docs/benchmarks.md).
    """

    def __init__(self, count: int, *, at_first: int | None = None) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self._count, self._running = count, 0
        self._looked_at = time.monotonic(), time.process_time()
        self._start(count if at_first is None else min(count, at_first))

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run ``job()`` on one of the threads. It has to call ``check()`` between blocking operations."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def result(self, future: Future[T]) -> T:
        """What a job came to, or raise what it raised. Called by one thread only."""
        while self._running < self._count and not future.done():
            wait([future], _LOOK_S)
            self._look_around()
        return future.result()

    def check(self) -> None:
        """Raise Stopped if the transfer has been given up."""
        if self.stop.is_set():
            raise Stopped

    def persist(self, attempt: Callable[[], object], position: Callable[[], int]) -> None:
        """Call ``attempt()`` until it returns, with backoff after temporary errors.

        Gives up after five retries in a row in which ``position()`` did not move, so that a long transfer
        over a bad link may be cut any number of times as long as it gets on.
        """
        retry, reached = 0, position()
        while True:
            self.check()
            try:
                attempt()
            except StepFailure as error:
                if position() > reached:
                    retry, reached = 0, position()
                # An object that was replaced stays so: only another attempt, from the beginning, can help.
                if not error.temporary or error.code == "changed" or retry == _MAX_RETRIES:
                    raise
                retry += 1
            else:
                return
            self.stop.wait(wait_s(retry))

    def aside(self, job: Callable[[], object], patience_s: float) -> None:
        """Try ``job()`` once, wait for it for so long at most, and mind no error of it."""

        def tried() -> None:
            with suppress(Exception):
                job()

        thread = threading.Thread(target=tried, daemon=True)
        thread.start()
        thread.join(patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop.set()

    def _look_around(self) -> None:
        now, used = time.monotonic(), time.process_time()
        then, used_then = self._looked_at
        if now - then < _LOOK_S:
            return
        self._looked_at = now, used
        if used - used_then < _BUSY * (now - then) and not self._jobs.empty():
            self._start(min(self._running, self._count - self._running))

    def _start(self, count: int) -> None:
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()
        self._running += count

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self.check()
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


def wait_s(retry: int) -> float:
    """The wait before retry number ``retry`` (from 1): doubling from 100 ms, jitter 20 %, at most 30 s."""
    wait = min(_FIRST_WAIT_S * 2.0 ** (retry - 1), _MAX_WAIT_S)
    return min(wait * random.uniform(0.8, 1.2), _MAX_WAIT_S)  # noqa: S311  # spreads load, guards nothing

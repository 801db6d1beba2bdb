"""The retry policy: how long to wait between tries of one operation, and when to give up.

First wait 100 ms, factor 2, jitter ±20 %, no wait over 30 s with its jitter, at most 5 retries. Clock and
random source are injected, so that tests measure the distribution instead of waiting for it.

What is tried again, and what is given up, is counted by operation and error class in an `OperationCounts`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from outrider.errors import ErrorClass, OutriderError

T = TypeVar("T")

MAX_HINT_S = 300.0
"""The longest wait that a server's hint is believed: a mistaken one must not cut a node off for a day."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    ``first_wait_s``, ``max_wait_s`` in seconds; ``jitter`` is the share by which a wait varies to either
    side; ``max_retries`` counts the tries after the first, ``None`` means for ever (reconnecting).
    """

    first_wait_s: float = 0.1
    factor: float = 2.0
    jitter: float = 0.2
    max_wait_s: float = 30.0
    max_retries: int | None = 5
    rng: random.Random = field(default_factory=random.Random, compare=False, repr=False)

    def wait_s(self, retry: int) -> float:
        """The wait before retry number ``retry`` (from 1), in seconds, jitter included, never over the cap."""
        # The exponent is bounded: 2.0 ** 1024 overflows, and a node may be cut off for weeks.
        base = self.first_wait_s * self.factor ** min(retry - 1, 63)
        # The cap leaves room for the jitter: cut off afterwards, half of a fleet would wait for exactly the cap.
        base = min(base, self.max_wait_s / (1 + self.jitter))
        return min(base * self.rng.uniform(1 - self.jitter, 1 + self.jitter), self.max_wait_s)

    def waits(self) -> Iterator[float]:
        """All waits of one operation, in order; ends when no retry is left."""
        retry = 0
        while self.max_retries is None or retry < self.max_retries:
            retry += 1
            yield self.wait_s(retry)

    def obeying(self, wait_s: float, error: OutriderError) -> float:
        """``wait_s``, or what the refusing side asked for if that is longer: a little later rather than earlier, so
        that those who were told the same do not come together, and never more than MAX_HINT_S."""
        if error.retry_after_s is None:
            return wait_s
        return max(wait_s, min(error.retry_after_s, MAX_HINT_S) * self.rng.uniform(1, 1 + self.jitter))

    async def run(
        self,
        operation: Callable[[], Awaitable[T]],
        *,
        idempotent: bool = True,
        on_retry: Callable[[int, float, OutriderError], None] | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> T:
        """Await ``operation()`` until it succeeds, fails permanently, or no retry is left.

        A timeout is tried again only if the operation is ``idempotent``. ``on_retry`` gets the number of
        the retry, the wait in seconds and the error. A wait is never shorter than the error's ``retry_after_s``.
        Raises the last error.
        """
        waits = self.waits()
        retry = 0
        while True:
            try:
                return await operation()
            except OutriderError as error:
                again = error.error_class is ErrorClass.TEMPORARY or (
                    error.error_class is ErrorClass.TIMEOUT and idempotent
                )
                wait = next(waits, None) if again else None
                if wait is None:
                    raise
                wait = self.obeying(wait, error)
                retry += 1
                if on_retry:
                    on_retry(retry, wait, error)
                await sleep(wait)


FOREVER = RetryPolicy(max_retries=None)
"""For reconnecting, which never gives up."""


@dataclass(frozen=True, slots=True)
class OperationCount:
    """How often one operation met errors of one class: ``retries`` were tried again, ``failures`` were given up."""

    operation: str
    error_class: ErrorClass
    retries: int
    failures: int


class OperationCounts:
    """Retries and failures by operation and error class, since it was made.

    An operation is named in dotted words, for example "session.connect" or "image.pull". For use on one event loop.
    """

    def __init__(self) -> None:
        self._retries: Counter[tuple[str, ErrorClass]] = Counter()
        self._failures: Counter[tuple[str, ErrorClass]] = Counter()

    def retried(self, operation: str, error: OutriderError) -> None:
        """``operation`` met ``error`` and is tried again."""
        self._retries[operation, error.error_class] += 1

    def failed(self, operation: str, error: OutriderError) -> None:
        """``operation`` was given up because of ``error``."""
        self._failures[operation, error.error_class] += 1

    def on_retry(self, operation: str) -> Callable[[int, float, OutriderError], None]:
        """For the ``on_retry`` of `RetryPolicy.run`."""
        return lambda _retry, _wait, error: self.retried(operation, error)

    async def run(
        self, operation: str, policy: RetryPolicy, work: Callable[[], Awaitable[T]], *, idempotent: bool = True
    ) -> T:
        """``policy.run`` with its retries, and its failure, counted as ``operation``."""
        try:
            return await policy.run(work, idempotent=idempotent, on_retry=self.on_retry(operation))
        except OutriderError as error:
            self.failed(operation, error)
            raise

    def all(self) -> list[OperationCount]:
        """What was counted, by operation and class."""
        keys = sorted(self._retries.keys() | self._failures.keys())
        return [OperationCount(*key, self._retries[key], self._failures[key]) for key in keys]

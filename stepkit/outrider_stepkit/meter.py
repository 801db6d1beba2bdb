"""How many bytes have moved, how fast, and no faster than allowed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

Report = Callable[[int, int | None, str], None]
"""Gets the bytes done, those in all (None: not known), and the rate in words."""

_WINDOW_S = 5.0
_BURST_S = 0.1


class Meter:
    """Counts what several threads move. ``limit`` is in bytes a second; waiting ends early when ``stop`` is set."""

    def __init__(
        self,
        total: int | None,
        report: Report,
        *,
        limit: int | None = None,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._report = report
        self._limit = limit
        self._stop = stop or threading.Event()
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._free_at = clock()
        self._moved: deque[tuple[float, int]] = deque([(clock(), 0)])

    @property
    def done(self) -> int:
        """Bytes so far."""
        return self._done

    def skip(self, count: int) -> None:
        """Bytes that were there already, or (below zero) are not any more: they do not count for the rate."""
        with self._lock:
            self._done += count
            self._moved = deque((at, done + count) for at, done in self._moved)
            self._tell()

    def add(self, count: int) -> None:
        """Bytes that were moved just now. Waits as long as the limit asks."""
        with self._lock:
            self._done += count
            now = self._clock()
            if now - self._moved[-1][0] >= 0.1:
                self._moved.append((now, self._done))
                while len(self._moved) > 2 and now - self._moved[1][0] > _WINDOW_S:
                    self._moved.popleft()
            self._tell()
            wait = self._owed(count, now)
        if wait > 0:
            self._stop.wait(wait)

    def _tell(self) -> None:
        self._report(self._done, self.total, shown_rate(self.rate))

    def _owed(self, count: int, now: float) -> float:
        """How long to wait for ``count`` bytes to have been allowed; a short burst is free."""
        if self._limit is None:
            return 0.0
        self._free_at = max(self._free_at, now - _BURST_S) + count / self._limit
        return self._free_at - now

    @property
    def rate(self) -> float:
        """Bytes a second, over the last seconds."""
        started, before = self._moved[0]
        elapsed = self._clock() - started
        return (self._done - before) / elapsed if elapsed > 0 else 0.0


def shown_rate(rate: float) -> str:
    """``12.3 MiB/s``."""
    for unit in ("B/s", "KiB/s", "MiB/s"):
        if rate < 1000:
            return f"{rate:.0f} {unit}" if unit == "B/s" else f"{rate:.1f} {unit}"
        rate /= 1024
    return f"{rate:.1f} GiB/s"

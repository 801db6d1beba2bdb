"""How far, how fast, and no faster than allowed."""

from __future__ import annotations

import threading

from outrider_stepkit import Meter
from outrider_stepkit.meter import shown_rate


class Clock:
    """A clock that moves when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Waiting(threading.Event):
    """Waiting takes no time, and moves the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.waited = clock, 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.waited += timeout or 0
        self.clock.now += timeout or 0
        return False


def test_it_says_how_far_and_how_fast() -> None:
    told: list[tuple[int, int | None, str]] = []
    clock = Clock()
    meter = Meter(None, lambda *said: told.append(said), clock=clock)
    meter.skip(5_000_000)
    for _ in range(4):
        clock.now += 0.5
        meter.add(1024 * 1024)
    assert told[-1] == (5_000_000 + 4 * 1024 * 1024, None, "2.0 MiB/s")
    meter.total = 7
    meter.skip(-meter.done)
    assert told[-1][:2] == (0, 7)
    assert [shown_rate(rate) for rate in (0, 999, 1024, 5e6, 5e9)] == [
        "0 B/s", "999 B/s", "1.0 KiB/s", "4.8 MiB/s", "4.7 GiB/s",
    ]  # fmt: skip


def test_it_is_no_faster_than_allowed() -> None:
    clock = Clock()
    waiting = Waiting(clock)
    meter = Meter(None, lambda *said: None, limit=1000, stop=waiting, clock=clock)
    for _ in range(20):
        meter.add(500)
    assert 9.5 <= waiting.waited <= 10.0
    clock.now += 3600
    before = waiting.waited
    meter.add(500)  # an hour of silence earns no burst of an hour
    meter.add(500)
    assert waiting.waited - before >= 0.8

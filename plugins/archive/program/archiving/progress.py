"""How far a step is, as it tells it."""

from __future__ import annotations

import time

from outrider_stepkit import Step
from outrider_stepkit.meter import shown_rate


class Progress:
    """Tells how far the step is, in bytes, and how fast it goes."""

    def __init__(self, step: Step, what: str, total: int) -> None:
        self._step = step
        self._what = what
        self._started = time.monotonic()
        self._next = 0.0
        self.total = total

    def at(self, done: int, *, force: bool = False) -> None:
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + 0.2
        took = now - self._started
        rate = f", {shown_rate(done / took)}" if took > 0.05 else ""
        self._step.progress(done, self.total, message=f"{self._what}{rate}", force=force)

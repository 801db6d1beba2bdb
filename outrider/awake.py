"""Time during which this process was awake: what silence of the other side is measured by.

A process that was stopped (SIGSTOP, a suspended virtual machine, a machine that swaps) finds on waking that nobody
has spoken for a minute, when it was itself that did not listen. By this clock that minute did not happen. The wall
clock plays no part: it may jump as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class AwakeClock:
    """Monotonic seconds that advance by at most ``max_step_s`` between two looks.

    Look at it at least that often from the loop whose attention is in question: longer gaps count as pauses.
    """

    def __init__(self, max_step_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_step_s = max_step_s
        self._clock = clock
        self._looked = clock()
        self._awake = 0.0
        self._paused = 0.0

    def now(self) -> float:
        """Seconds awake since this clock was made."""
        moment = self._clock()
        step = moment - self._looked
        self._looked = moment
        self._awake += min(step, self.max_step_s)
        self._paused += max(0.0, step - self.max_step_s)
        return self._awake

    def take_pause(self) -> float:
        """Seconds that were left out since this was last asked."""
        self.now()
        paused, self._paused = self._paused, 0.0
        return paused

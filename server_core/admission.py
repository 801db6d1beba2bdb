"""How fast the fleet is let back in after all of it was cut off at once.

Everybody who asks gets a turn, one after the other at an even rate. Whose turn is not yet is refused with the time
until then, and nobody is refused twice: a booked turn is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_KEPT_S = 60.0
"""How long after it a turn that nobody came for is kept."""


class Admission:
    """Turns at ``per_second``; what was not used for up to ``saved_s`` seconds may be used at once.

    The rule is the generic cell rate algorithm (ITU-T I.371), with the refused cell's place kept for it.
    """

    def __init__(self, per_second: float, saved_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second = per_second
        self._saved_s = saved_s
        self._clock = clock
        self._next = clock() - saved_s
        self._turns: dict[str, float] = {}

    def wait_s(self, who: str) -> float:
        """Seconds until it is the turn of ``who``; 0: now."""
        now = self._clock()
        self._forget(now)
        turn = self._turns.get(who)
        if turn is None:
            turn = max(self._next, now - self._saved_s)
            self._next = turn + 1 / self.per_second
            if turn > now:
                self._turns[who] = turn
        elif turn <= now:
            del self._turns[who]
        return max(0.0, turn - now)

    def _forget(self, now: float) -> None:
        # They were booked in the order of time, so the oldest stand first.
        while self._turns and self._turns[oldest := next(iter(self._turns))] < now - _KEPT_S:
            del self._turns[oldest]

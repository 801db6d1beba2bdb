"""When to look for the server again: the backoff of `outrider.retry`, and what the server asked for.

Three things keep a fleet that was cut off at once from coming back at once. A server that stops tells each agent its
own turn. A server that dies can't, so its agents add a random part of the spread that they were told while it lived.
And a server that has come back lets nodes in at an even rate, and tells the others when their turn is. What a server
says only ever lengthens a wait.
"""

from __future__ import annotations

import random

from outrider.errors import OutriderError
from outrider.retry import MAX_HINT_S, RetryPolicy

SUPERSEDED = "session_superseded"
_SETTLED_BEATS = 3


class Reconnect:
    """The waits of one agent's link, for ever."""

    def __init__(self, retry: RetryPolicy, rng: random.Random) -> None:
        self._retry = retry
        self._rng = rng
        self._tries = 0
        self._superseded = 0
        self._beats = 0
        self._spread_s = 0.0

    def told_spread(self, spread_s: float) -> None:
        """What the server asks for while it can."""
        self._spread_s = min(max(spread_s, 0.0), MAX_HINT_S)

    def began(self) -> None:
        """A control channel is open; whether it works is not known yet."""
        self._beats = 0

    def worked(self) -> None:
        """A heartbeat was answered: the next loss is a new one, with a first wait of its own."""
        self._tries = 0
        self._beats += 1
        if self._beats >= _SETTLED_BEATS:
            self._superseded = 0

    def wait_s(self, error: OutriderError) -> float:
        """Seconds until the next try, after ``error`` ended the last one."""
        self._tries += 1
        if error.code == SUPERSEDED:
            # Two agents with one credential would otherwise throw each other out ten times a second.
            self._superseded += 1
        wait_s = self._retry.wait_s(max(self._tries, self._superseded))
        if error.retry_after_s is not None:
            return self._retry.obeying(wait_s, error)
        if self._tries > 1:
            # The first try found nobody, so it is the server that is away, and all are waiting for it.
            wait_s += self._rng.uniform(0, self._spread_s)
        return wait_s

"""How old something is, whatever becomes of the wall clock.

Who sets a clock forward by a week would make everything a week older, and what was received a minute ago would be
forgotten with what nobody can ask for any more. So ages are counted by the clock of the machine's boot, which nobody
sets. It is written down together with what it stood for, and the next agent goes on from there; time that the machine
was off is not counted.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from agent_core.journal import Journal

_KEY = "steady_clock"


class BootClock(Protocol):
    """Seconds of one boot of the machine; see `agent_core.state.Clock`."""

    @property
    def boot_id(self) -> str: ...

    def now(self) -> float: ...


class SteadyClock:
    """Two clocks that begin as the wall clock and that nobody sets: for what the journal notes, and for stamps that the
    engine and the kernel gave by the wall clock."""

    def __init__(self, journal: Journal, clock: BootClock) -> None:
        self._clock = clock
        own = wall = time.time()
        with suppress(ValueError, TypeError, KeyError, IndexError):
            noted = json.loads(journal.query_now("SELECT value FROM meta WHERE key = ?", (_KEY,))[0]["value"])
            own = float(noted["own"])
            if noted["boot_id"] == clock.boot_id:
                passed = max(0.0, clock.now() - float(noted["boot_clock"]))
                own, wall = own + passed, float(noted["wall"]) + passed
        self._own_ahead = own - clock.now()
        self._wall_ahead = wall - clock.now()

    def now(self) -> float:
        """For the journal: seconds since 1970 that only grow, also over reboots. Compared with nothing but itself."""
        return self._own_ahead + self._clock.now()

    def stamped_before(self, age_s: float) -> float:
        """What has a stamp of the wall clock (seconds since 1970) from before this is older than ``age_s``."""
        # Set forward, the wall clock makes nothing old; set back, it gives new things old stamps.
        return min(self._wall_ahead + self._clock.now(), time.time()) - age_s

    def note(self) -> Callable[[sqlite3.Connection], object]:
        """Write down how late it is, for the agent after this one; a change for `State.commit`."""
        now = self._clock.now()
        noted = {
            "boot_id": self._clock.boot_id,
            "boot_clock": now,
            "own": self._own_ahead + now,
            "wall": self._wall_ahead + now,
        }
        row = (_KEY, json.dumps(noted))
        return lambda db: db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", row)

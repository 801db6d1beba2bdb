"""Which bytes of a file are there, and who fetches which of the others. Used by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST, LARGEST = 8 * 1024**2, 256 * 1024**2
"""How many bytes one request asks for. Small ones end at about the same time, large ones cost fewer round trips."""

ENDLESS = 1 << 62
"""The length of what has no known one."""


@dataclass(eq=False)
class Claim:
    """The bytes from ``at`` to ``end`` (not included), which somebody fetches. ``at`` moves on as they arrive."""

    at: int
    end: int


class Pieces:
    """The bytes 0 to ``total`` (or ENDLESS) of one file. ``missing``: those that a former attempt has not fetched."""

    def __init__(self, total: int, missing: Iterable[tuple[int, int]] | None = None) -> None:
        self.total = total
        self._free = _joined([(0, total)] if missing is None else missing)
        self._claims: list[Claim] = []
        self._changed = threading.Condition()

    def claim(self, share: int = 1, *, at: int | None = None) -> Claim | None:
        """The first bytes that nobody fetches, or those that begin at ``at``; None if there are none such.

        As many as are left for each of ``share`` workers to come back for at least once more.
        """
        with self._changed:
            left = sum(end - start for start, end in self._free)
            size = min(max(left // (2 * share), SMALLEST), LARGEST)
            for number, (start, end) in enumerate(self._free):
                if at is None or start == at:
                    stop = min(end, start + size)
                    # No crumbs: what is left behind is worth a request.
                    stop = end if end - stop < SMALLEST // 2 else stop
                    self._free[number : number + 1] = [(stop, end)] if stop < end else []
                    claim = Claim(start, stop)
                    self._claims.append(claim)
                    return claim
        return None

    def arrived(self, claim: Claim, count: int) -> None:
        """The next ``count`` bytes of a claim are in the file. A claim that is fulfilled is over."""
        with self._changed:
            claim.at += count
            if claim.at >= claim.end:
                self._claims.remove(claim)
            self._changed.notify_all()

    def give_back(self, claim: Claim) -> None:
        """What is left of a claim is for somebody else. Idempotent."""
        with self._changed:
            if claim in self._claims:
                self._claims.remove(claim)
                self._free = _joined([*self._free, (claim.at, claim.end)])
                self._changed.notify_all()

    def end_at(self, total: int) -> None:
        """What had no known length has turned out to be so long; all of it is there."""
        with self._changed:
            self.total, self._free, self._claims = total, [], []
            self._changed.notify_all()

    def missing(self) -> list[tuple[int, int]]:
        """What is not in the file yet, as ranges without their ends, in order."""
        with self._changed:
            return self._missing()

    def _missing(self) -> list[tuple[int, int]]:
        return _joined([*self._free, *((claim.at, claim.end) for claim in self._claims)])

    def done(self) -> int:
        """How many bytes are there."""
        with self._changed:
            return self.total - sum(end - start for start, end in self._missing())

    @property
    def frontier(self) -> int:
        """All bytes before this one are there."""
        with self._changed:
            return self._frontier()

    def _frontier(self) -> int:
        starts = [start for start, _ in self._free] + [claim.at for claim in self._claims]
        return min(starts, default=self.total)

    def wait_for(self, frontier: int, timeout_s: float) -> int:
        """Wait until the frontier has come that far, or the time is over; the frontier."""
        with self._changed:
            self._changed.wait_for(lambda: self._frontier() >= frontier, timeout_s)
            return self._frontier()

    def wait_for_change(self, timeout_s: float) -> None:
        """Wait until something arrives or is given back."""
        with self._changed:
            self._changed.wait(timeout_s)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        elif start < end:
            joined.append((start, end))
    return joined

"""What a service says to systemd: ready, stopping, how it is, and that its main loop turns. See sd_notify(3).

Our own few lines instead of a library: the protocol is a datagram of NAME=VALUE lines to a Unix socket. Where no
service manager listens, and where it can't be reached, all of this does nothing: no service ends for its reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

STATUS_EVERY_S = 5.0
"""How often the status is looked at when no watchdog asks more often."""
_BEATS_PER_LIMIT = 4
"""One beat that comes late, or that the manager takes up late, must not end a service that is well."""
_MAX_STATUS = 500


class Notifier:
    """The line to the service manager. ``watchdog_s``: its limit for the silence of a running service, 0 for none."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s if address else 0.0
        # "@" stands for the zero byte that begins a name of the abstract namespace (unix(7)).
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._status = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Notifier:
        """As the service manager has set it up for this very process (sd_watchdog_enabled(3))."""
        pid, limit = environ.get("WATCHDOG_PID", ""), environ.get("WATCHDOG_USEC", "")
        ours = pid in ("", str(os.getpid())) and limit.isascii() and limit.isdecimal()
        return cls(environ.get("NOTIFY_SOCKET", ""), int(limit) / 1e6 if ours else 0.0)

    @property
    def active(self) -> bool:
        """Whether there is a service manager to talk to."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """The start, or a reload, is over: work is taken on."""
        self._send("READY=1")
        self.status(status)

    def reloading(self) -> None:
        """Settings are being read anew; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> None:
        """The end has begun."""
        self._send("STOPPING=1")
        self.status(status)

    def status(self, text: str) -> None:
        """One line for `systemctl status`; the same as before is not sent again."""
        line = " ".join(text.split())[:_MAX_STATUS]
        if line and line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def connected(self, server: str) -> None:
        """For our own launcher: which server this service is connected to; empty: it will say when it is.

        A service manager ignores names that begin with X_ (sd_notify(3)).
        """
        self._send(f"X_OUTRIDER_CONNECTED={server}")

    def alive(self) -> None:
        """The watchdog's limit begins anew."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """What is going on (a start, a stop) may take so many seconds more, from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *lines: str) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                # A manager that does not read must not hold up the loop: it then does without this word.
                line.setblocking(False)
                line.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False
        return True


@asynccontextmanager
async def starting(notifier: Notifier, what: str, step_s: float = 10.0) -> AsyncIterator[None]:
    """While this is open, a start may take as long as it does, for as long as the main loop turns.

    A store that is being migrated for minutes is not a service that hangs; killed halfway, it would begin again for
    ever. A start that blocks the loop is not covered, and ends at the manager's time limit.
    """

    async def extend() -> None:
        while True:
            notifier.extend(3 * step_s)
            await asyncio.sleep(step_s)

    if not notifier.active:
        yield
        return
    notifier.status(what)
    task = asyncio.create_task(extend(), name="extend the start")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def serving(notifier: Notifier, describe: Callable[[], str]) -> AsyncIterator[None]:
    """Ready when this is entered, stopping when it is left; fed to the watchdog between, with a status line.

    Runs on the loop that enters it, which is therefore what the watchdog watches.
    """

    async def beat() -> None:
        every = min(STATUS_EVERY_S, notifier.watchdog_s / _BEATS_PER_LIMIT or STATUS_EVERY_S)
        while True:
            notifier.alive()
            notifier.status(describe())
            await asyncio.sleep(every)

    if not notifier.active:
        yield
        return
    notifier.ready(describe())
    task = asyncio.create_task(beat(), name="watchdog")
    try:
        yield
    finally:
        notifier.stopping("stopping")
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

"""Heartbeats: the sign of life on the control channel, and the proof that the other end is alive too.

Each is answered. Where no answer has come for two of the longest intervals, the connection is half-open: one
direction of it is dead, or both, and nobody has said so. Time that this process slept through is not silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import random
import time
from collections.abc import Awaitable, Callable, Mapping

from google.protobuf.duration_pb2 import Duration

from outrider.awake import AwakeClock
from outrider.errors import OutriderError, Unavailable
from outrider.tls import Identity
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import seconds

MISSED = 2
"""After the longest time that so many heartbeats can take without an answer a connection is given up."""
_MAX_JITTER = 0.9
_COUNT_TAKES_S = 1.0


def _boot_clock() -> float:
    """Seconds since the boot, time asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Heartbeats:
    """The heartbeats of one agent, on one control channel after another."""

    def __init__(
        self,
        identity: Identity,
        brief: Callable[[], types.BriefState],
        containers: Callable[[], Awaitable[Mapping[str, int]]],
        send: Callable[[pb.AgentMessage], None],
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        boot_clock: Callable[[], float] = _boot_clock,
    ) -> None:
        self._identity = identity
        self._brief = brief
        self._count = containers
        self._send = send
        self._rng = rng
        self._interval_s = 10.0
        self._jitter = 0.2
        self._awake = AwakeClock(self._look_every_s * 2, clock)
        self._answered_at = 0.0
        self._boot_clock = boot_clock
        self._opened_at = 0.0
        self._sent_at: dict[int, float] = {}  # by number: those that are not answered yet
        self._heard: tuple[float, float] | None = None
        """When a heartbeat was sent, and when it was answered: the former here, the latter by the server's clock."""
        self._sequence = 0
        self._told = asyncio.Event()
        self._counted: Mapping[str, int] = {}

    @property
    def longest_silence_s(self) -> float:
        """How long the server may leave heartbeats unanswered."""
        return self._interval_s * (1 + self._jitter) * MISSED

    @property
    def _look_every_s(self) -> float:
        return min(self._interval_s / 4, 5.0)

    def obey(self, policy: types.HeartbeatPolicy) -> None:
        """Take over the server's interval; it holds at once, not only after the present one."""
        interval_s = seconds(policy.interval)
        if interval_s > 0:
            self._interval_s = interval_s
            self._jitter = min(max(policy.jitter, 0.0), _MAX_JITTER)
            self._awake.max_step_s = self._look_every_s * 2
            self._told.set()

    def began(self) -> None:
        """A registration was answered: heartbeats are numbered from 1 again."""
        self._sequence = 0
        self._answered_at = self._awake.now()

    def answered(self, answer: pb.HeartbeatResponse) -> None:
        """The server is there."""
        self._answered_at = self._awake.now()
        sent_at = self._sent_at.get(answer.sequence)
        if sent_at is not None and answer.HasField("sent_at"):
            self._heard = sent_at, seconds(answer.sent_at)
        self._sent_at = {number: at for number, at in self._sent_at.items() if number > answer.sequence}

    def age_s(self, sent_at: Duration) -> float:
        """At most how long ago the server sent what has this stamp.

        No clock of one side is compared with one of the other: the last heartbeat that was answered had been sent
        before its answer, so from then until now at least as much time passed here as there since that answer.
        """
        now = self._boot_clock()
        if self._heard is None:
            return now - self._opened_at
        mine, servers = self._heard
        return (now - mine) - (seconds(sent_at) - servers)

    async def run(self, server: str) -> None:
        """Send them until cancelled. Raises Unavailable once ``server`` has left them unanswered for too long."""
        counting: asyncio.Task[Mapping[str, int]] | None = None
        self._opened_at, self._heard = self._boot_clock(), None
        self._sent_at.clear()
        self._answered_at = self._awake.now()
        try:
            while True:
                # A heartbeat never waits for an engine that hangs: it goes with the containers that there were. All
                # else is as it is now, so that nobody takes a node for empty that is not.
                counting = counting or asyncio.ensure_future(self._count())
                await asyncio.wait({counting}, timeout=min(self._interval_s / 4, _COUNT_TAKES_S))
                if counting.done():
                    self._counted = counting.result()
                    counting = None
                brief = self._brief()
                brief.containers.update(self._counted)
                self._send_one(brief)
                await self._until_the_next(server)
        finally:
            if counting is not None:
                counting.cancel()
                with contextlib.suppress(asyncio.CancelledError, OutriderError):
                    await counting

    def _send_one(self, brief: types.BriefState) -> None:
        self._sequence += 1
        self._sent_at[self._sequence] = self._boot_clock()
        session_id, epoch = self._identity.session_id, self._identity.epoch
        self._send(
            pb.AgentMessage(
                heartbeat=pb.HeartbeatRequest(
                    session_id=session_id,
                    epoch=epoch,
                    sequence=self._sequence,
                    proof=heartbeat_proof(self._identity.token, session_id, epoch, self._sequence),
                    brief=brief,
                )
            )
        )

    async def _until_the_next(self, server: str) -> None:
        sent_at, share = self._awake.now(), self._rng.uniform(-1, 1)
        while True:
            now = self._awake.now()
            silent_s = now - self._answered_at
            if silent_s > self.longest_silence_s:
                raise Unavailable(
                    f"the server {server} has left heartbeats unanswered for {silent_s:.0f} s", code="server_silent"
                )
            left_s = sent_at + self._interval_s * (1 + share * self._jitter) - now
            if left_s <= 0:
                return
            self._told.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, self._look_every_s)):
                    await self._told.wait()


def heartbeat_proof(token: str, session_id: str, epoch: int, sequence: int) -> bytes:
    """HMAC-SHA256 (RFC 2104), keyed with the token's SHA-256, over session, epoch and sequence, a line each."""
    key = hashlib.sha256(token.encode()).digest()
    return hmac.digest(key, f"{session_id}\n{epoch}\n{sequence}".encode("ascii"), "sha256")

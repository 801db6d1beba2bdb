"""The fleet as this server sees it: which nodes are here, over which control channel, and when each was last seen.

Presence lives in memory and is written to the store in batches: a thousand heartbeats a second must not be a
thousand transactions. Silence is measured in time during which this server itself was awake, against the interval
that the node was told; what the wall clock says is shown and decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import Connection

from outrider import wire
from outrider.awake import AwakeClock
from outrider.errors import OutriderError, Unauthenticated, Unavailable
from outrider.v1 import types_pb2
from server_core.bus.base import EVENTS, NODES, Bus
from server_core.channel import ControlChannel, superseded
from server_core.store import events, nodes
from server_core.store.base import Database
from server_core.store.commits import Commit
from server_core.store.common import now_us, spoken

log = structlog.get_logger(__name__)

HEARTBEATS_PER_SECOND = 50.0
"""Of all nodes together: the interval grows with the fleet to keep to it."""
JITTER = 0.2
PAUSE_S = 1.0
RETURN_GRACE_INTERVALS = 6
"""How long nodes that gave this server up while it was paused have to come back: with the default interval a minute,
which is two of their longest waits."""
EXPECTED_S = 300.0
"""How long after its start a server counts on the nodes that its predecessor had."""


@dataclass
class Presence:
    """What is known of one node's presence; times of the monotonic clock decide, those of the wall clock are shown."""

    online: bool = False
    heard_at: float = 0.0
    told_interval_s: float = 0.0
    beat: int = 0
    """Number of its last heartbeat in this registration."""
    gone_because: str = ""
    """Why its channel ended, where that is not held against it yet."""
    last_seen_us: int | None = None
    brief: types_pb2.BriefState | None = None
    dirty: bool = False


@dataclass
class _Transition:
    node_id: str
    online: bool
    reason: str

    @property
    def event(self) -> str:
        return "node.online" if self.online else "node.offline"


class Fleet:
    """All nodes' presence and control channels on this server.

    ``interval_s``: the least mean time between heartbeats; ``missed``: so many of the longest intervals in silence and
    a node is offline; ``returns_per_second``: how fast nodes that were all cut off are asked to come back.
    """

    def __init__(
        self,
        db: Database,
        bus: Bus,
        interval_s: float,
        missed: int,
        returns_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.db = db
        self.bus = bus
        self._interval_s = interval_s
        self._missed = missed
        self._returns_per_second = returns_per_second
        self._look_every_s = min(interval_s / 4, 1.0)
        self._awake = AwakeClock(2 * self._look_every_s, clock)
        self._channels: dict[str, ControlChannel] = {}
        self._presence: dict[str, Presence] = {}
        self._sessions: dict[str, tuple[str, int]] = {}
        self._transitions: asyncio.Queue[_Transition] = asyncio.Queue()
        self._online = 0
        self._expected: set[str] = set()
        self._grace_until = 0.0
        self._flushed_at = 0.0
        self._sightings_wait = False

    async def load(self) -> None:
        """Take over what the store knows; nobody is online yet."""
        for node in await self.db.read(nodes.listed):
            presence = self._presence.setdefault(node.node_id, Presence())
            if node.HasField("last_seen"):
                presence.last_seen_us = node.last_seen.ToMicroseconds()
            if node.HasField("brief"):
                presence.brief = node.brief
        # Who was here when the former server ended: their times are compared with one another, never with the clock.
        seen = {node_id: each.last_seen_us for node_id, each in self._presence.items() if each.last_seen_us is not None}
        recent = max(seen.values(), default=0) - round(3e6 * self._interval_of(len(seen)))
        self._expected = {node_id for node_id, last_seen_us in seen.items() if last_seen_us >= recent}

    # -- sessions ------------------------------------------------------------------------------------------

    def began_session(self, node_id: str, session: nodes.Session) -> None:
        """The newest session wins: a channel of an older one is closed."""
        if self._sessions.get(node_id, ("", 0))[1] > session.epoch:
            return  # two registrations overlapped, and the newer was answered first
        self._sessions[node_id] = (session.session_id, session.epoch)
        channel = self._channels.get(node_id)
        if channel is not None and channel.epoch != session.epoch:
            channel.close(superseded(node_id))
        presence = self._presence.setdefault(node_id, Presence())
        presence.beat = 0
        presence.last_seen_us = now_us()

    async def check_session(self, node_id: str, session_id: str, epoch: int) -> None:
        """Raise Conflict unless this is the node's newest session."""
        if node_id not in self._sessions:
            self._sessions[node_id] = await self.db.read(lambda c: nodes.current_session(c, node_id))
        if not session_id or self._sessions[node_id] != (session_id, epoch):
            raise superseded(node_id)

    def beat_is_new(self, node_id: str, sequence: int) -> bool:
        """Whether this heartbeat's number is greater than all before it in this registration: a copy is not."""
        presence = self._presence.setdefault(node_id, Presence())
        new = sequence > presence.beat
        presence.beat = max(presence.beat, sequence)
        return new

    # -- presence ------------------------------------------------------------------------------------------

    def attach(self, channel: ControlChannel) -> None:
        former = self._channels.get(channel.node_id)
        self._channels[channel.node_id] = channel
        if former is not None:
            former.close(superseded(channel.node_id))
        self.heard(channel.node_id)

    def detach(self, channel: ControlChannel) -> None:
        """The channel ended. The node is offline, unless another channel has taken its place."""
        channel.close(None)
        channel.detached.set()
        if self._channels.get(channel.node_id) is channel:
            del self._channels[channel.node_id]
            self._hung_up(channel.node_id)

    def _hung_up(self, node_id: str) -> None:
        # Asked for here too: after a pause the closings may be the first thing that is seen.
        self._look()
        if self._awake.now() < self._grace_until:
            self._presence[node_id].gone_because = "its connection was closed"
        else:
            self._offline(node_id, "its connection was closed")

    def heard(self, node_id: str, brief: types_pb2.BriefState | None = None) -> None:
        """The node gave a sign of life."""
        presence = self._presence.setdefault(node_id, Presence())
        presence.heard_at = self._awake.now()
        presence.last_seen_us = now_us()
        presence.gone_because = ""
        presence.dirty = True
        self._expected.discard(node_id)
        if brief is not None:
            presence.brief = brief
        if not presence.online:
            presence.online = True
            self._online += 1
            self._transitions.put_nowait(_Transition(node_id, True, ""))

    def forget(self, node_id: str) -> None:
        """The node was removed."""
        channel = self._channels.pop(node_id, None)
        if channel is not None:
            channel.close(Unauthenticated(f"node {node_id} was removed", code="node_removed"))
        presence = self._presence.pop(node_id, None)
        self._online -= presence is not None and presence.online
        self._expected.discard(node_id)
        self._sessions.pop(node_id, None)

    async def close_channels(
        self, farewell: Callable[[float], OutriderError], within_s: float, *, absent_s: float
    ) -> None:
        """The server stops listening: every agent is told, and when to look for it again.

        ``farewell`` makes the error from the seconds to wait. Each gets a turn of its own after ``absent_s``, so that
        they come back one after the other.
        """
        leaving = [asyncio.ensure_future(channel.detached.wait()) for channel in self._channels.values()]
        channels = list(self._channels.values())
        random.shuffle(channels)
        for turn, channel in enumerate(channels):
            channel.close(farewell(absent_s + turn / self._returns_per_second))
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=within_s)
            for waiter in late:
                waiter.cancel()

    def is_online(self, node_id: str) -> bool:
        presence = self._presence.get(node_id)
        return presence is not None and presence.online

    def online_count(self) -> int:
        return self._online

    def channel(self, node_id: str) -> ControlChannel | None:
        channel = self._channels.get(node_id)
        return channel if channel is not None and channel.open else None

    def describe(self, node: types_pb2.Node) -> types_pb2.Node:
        """Put what is known of its presence onto a node's record."""
        presence = self._presence.get(node.node_id)
        if presence is not None:
            node.online = presence.online
            if presence.last_seen_us is not None:
                node.last_seen.FromMicroseconds(presence.last_seen_us)
            if presence.brief is not None:
                node.brief.CopyFrom(presence.brief)
        return node

    def brief(self, node_id: str) -> types_pb2.BriefState | None:
        """What the node said last of how it is."""
        presence = self._presence.get(node_id)
        return None if presence is None else presence.brief

    def offline_error(self, node_id: str) -> Unavailable:
        """The sentence for a node that is needed now and is not here."""
        presence = self._presence.get(node_id)
        if presence is None or presence.last_seen_us is None:
            return Unavailable(
                f"node {node_id} is offline: its agent has never connected",
                code="node_offline",
                hint="start it there with `outrider agent run`",
            )
        if presence.online:
            return Unavailable(f"node {node_id} is connecting", code="node_connecting", hint="try again in a moment")
        if node_id in self._expected:
            return Unavailable(
                f"node {node_id} has not come back yet since this server started",
                code="node_connecting",
                hint="try again in a moment",
            )
        return Unavailable(
            f"node {node_id} is offline since {spoken(presence.last_seen_us)}",
            code="node_offline",
            hint="look at its agent with `outrider agent status` on the node",
        )

    def heartbeat_policy(self, node_id: str) -> types_pb2.HeartbeatPolicy:
        """How often the node is to report from now on, and how evenly all are to come back after a cut.

        The interval grows with the fleet, so that all together stay at 50/s; so does the spread.
        """
        size = self._online + len(self._expected)
        interval_s = self._interval_of(size)
        self._presence.setdefault(node_id, Presence()).told_interval_s = interval_s
        policy = types_pb2.HeartbeatPolicy(interval=wire.duration(interval_s), jitter=JITTER)
        spread_s = size / self._returns_per_second
        if spread_s >= interval_s / 10:  # below that there is no crowd to spread
            policy.reconnect_spread.FromMicroseconds(round(spread_s * 1e6))
        return policy

    def _interval_of(self, size: int) -> float:
        return max(self._interval_s, size / HEARTBEATS_PER_SECOND)

    async def run(self) -> None:
        """Until cancelled: notice who has fallen silent, and write down what changed."""
        self._awake.take_pause()  # what went before was start-up
        while True:
            changed: list[_Transition] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_every_s):
                    changed.append(await self._transitions.get())
            while not self._transitions.empty():
                changed.append(self._transitions.get_nowait())
            self._look()
            if changed:
                await self._record(changed)
            await self._flush_if_due()

    def _look(self) -> None:
        """Judge the nodes' silence."""
        paused_s = self._awake.take_pause()
        now = self._awake.now()
        if paused_s > max(PAUSE_S, self._interval_s / 2):
            # Nobody could be heard, and nodes that got no answer have hung up meanwhile: they are on their way back.
            log.warning("this server was paused; no node is held to be offline for it", paused_s=round(paused_s, 1))
            self._grace_until = now + RETURN_GRACE_INTERVALS * self._interval_of(self._online)
        if self._expected and now > EXPECTED_S:
            self._expected.clear()
        for node_id, presence in list(self._presence.items()):
            if not presence.online:
                continue
            if presence.gone_because and now >= self._grace_until:
                self._offline(node_id, presence.gone_because)
            elif not presence.gone_because and now - presence.heard_at > self._longest_silence(presence):
                channel = self._channels.pop(node_id, None)
                if channel is not None:
                    channel.close(Unavailable("no heartbeat came in time", code="heartbeat_missed"))
                self._offline(node_id, f"{self._missed} heartbeats were missed")

    def _longest_silence(self, presence: Presence) -> float:
        # By what this node was told: the fleet may have shrunk since, and with it the interval of others.
        return max(presence.told_interval_s, self._interval_s) * (1 + JITTER) * self._missed

    async def flush(self) -> None:
        """Write down the last sightings."""
        dirty = [(node_id, presence) for node_id, presence in self._presence.items() if presence.dirty]
        sightings = [
            nodes.Sighting(
                node_id, presence.last_seen_us, None if presence.brief is None else presence.brief.SerializeToString()
            )
            for node_id, presence in dirty
            if presence.last_seen_us is not None
        ]
        for _, presence in dirty:
            presence.dirty = False
        self._flushed_at = self._awake.now()
        if not sightings:
            return
        try:
            await self.db.write(Commit.NODES_SEEN, lambda c: nodes.save_sightings(c, sightings))
        except OutriderError as error:
            # Presence must go on being watched while the store can't be written; the next time has it all.
            if not self._sightings_wait:
                log.error("sightings of nodes were not stored", error=str(error))
            self._sightings_wait = True
            for _, presence in dirty:
                presence.dirty = True
        else:
            self._sightings_wait = False

    async def _flush_if_due(self) -> None:
        if self._awake.now() - self._flushed_at >= self._interval_s:
            await self.flush()

    async def _record(self, changed: list[_Transition]) -> None:
        """Store what changed in one transaction: a whole fleet comes back at once."""

        def store(connection: Connection) -> None:
            for each in changed:
                data = {"reason": each.reason} if each.reason else {}
                events.add(connection, each.event, each.node_id, node_id=each.node_id, data=data)

        for each in changed:
            log.info(each.event, node=each.node_id, reason=each.reason)
        try:
            await self.db.write(Commit.NODE_PRESENCE, store)
        except OutriderError as error:
            log.error("events were not stored", nodes=len(changed), error=str(error))
        self.bus.publish(EVENTS)
        self.bus.publish(NODES)

    def _offline(self, node_id: str, reason: str) -> None:
        presence = self._presence.get(node_id)
        if presence is not None and presence.online:
            presence.online = False
            presence.gone_because = ""
            presence.dirty = True
            self._online -= 1
            self._transitions.put_nowait(_Transition(node_id, False, reason))

"""The fleet as this server sees it: which nodes are here, over which control channel, and when each was last seen.

Presence lives in memory and is written to the store in batches: a thousand heartbeats a second must not be a
thousand transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import structlog
from google.protobuf.message import Message

from outrider import wire
from outrider.errors import Conflict, OperationTimeout, OutriderError, Unauthenticated, Unavailable
from outrider.v1 import node_service_pb2, types_pb2
from server_core.bus.base import EVENTS, NODES, Bus
from server_core.store import events, nodes
from server_core.store.base import Database
from server_core.store.commits import Commit
from server_core.store.common import now_us, spoken

log = structlog.get_logger(__name__)

_QUEUED_MESSAGES = 256
_HEARTBEATS_PER_SECOND = 50.0
_JITTER = 0.2


@dataclass
class Presence:
    """What is known of one node's presence; times of the monotonic clock decide, those of the wall clock are shown."""

    online: bool = False
    heard_at: float = 0.0
    last_seen_us: int | None = None
    brief: types_pb2.BriefState | None = None
    full_digest: bytes | None = None
    dirty: bool = False


class Answer:
    """What comes back for a command: it is acknowledged, and later there is a result."""

    def __init__(self) -> None:
        self.acknowledged = asyncio.Event()
        self.result: asyncio.Future[node_service_pb2.CommandResult] = asyncio.get_running_loop().create_future()


class ControlChannel:
    """One agent's control channel: what goes down it, and who waits for what comes up."""

    def __init__(self, node_id: str, session_id: str, epoch: int) -> None:
        self.node_id = node_id
        self.session_id = session_id
        self.epoch = epoch
        self.reported = False
        """Whether the agent has said what it holds; until then no run is sent."""
        self.sent: set[str] = set()
        """Ids of run commands that went down this channel."""
        self.acknowledged: set[str] = set()
        """Runs that were acknowledged on this channel."""
        self._outgoing: asyncio.Queue[node_service_pb2.ServerMessage] = asyncio.Queue(_QUEUED_MESSAGES)
        # A list, because two callers may ask for the same command: it is done once and answers both.
        self._answers: list[tuple[str, Answer]] = []
        self.detached = asyncio.Event()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: OutriderError | None = None

    @property
    def open(self) -> bool:
        return not self._closed.done()

    async def send(self, message: node_service_pb2.ServerMessage) -> None:
        """Queue ``message``; waits while the agent does not read. Raises Unavailable once the channel is closed."""
        if self.open:
            put = asyncio.ensure_future(self._outgoing.put(message))
            try:
                await asyncio.wait({put, self._closed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not put.done():
                    put.cancel()
        if not self.open:
            raise self.gone()

    async def next_message(self) -> node_service_pb2.ServerMessage:
        return await self._outgoing.get()

    async def wait_closed(self) -> None:
        """Return, or raise the reason, once the server has closed the channel."""
        await asyncio.shield(self._closed)
        if self._error is not None:
            raise self._error

    async def request(self, command: node_service_pb2.Command, timeout_s: float) -> node_service_pb2.CommandResult:
        """Send a command and await its result. Raises what the agent answered, or OperationTimeout."""
        with self.expect(command.command_id) as answer:
            async with self._answer_within(timeout_s):
                await self._send_command(command, timeout_s)
                result = await asyncio.shield(answer.result)
        if result.HasField("failure"):
            raise wire.error_of(result.failure)
        return result

    async def order(self, command: node_service_pb2.Command, answer: Answer, timeout_s: float) -> None:
        """Send a command and wait until it is acknowledged, or answered; ``answer`` comes from `expect`."""
        async with self._answer_within(timeout_s):
            await self._send_command(command, timeout_s)
            await answer.acknowledged.wait()

    @contextlib.contextmanager
    def expect(self, command_id: str) -> Iterator[Answer]:
        """What will be answered to a command; forgotten on leaving."""
        answer = Answer()
        # Nobody may be left to ask for it: the caller can have gone.
        answer.result.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._answers.append((command_id, answer))
        try:
            yield answer
        finally:
            self._answers.remove((command_id, answer))

    def take_ack(self, ack: node_service_pb2.CommandAck) -> None:
        """A refusal is the answer."""
        for command_id, answer in self._answers:
            if command_id == ack.command_id:
                answer.acknowledged.set()
        if ack.HasField("refused"):
            self.take_result(node_service_pb2.CommandResult(command_id=ack.command_id, failure=ack.refused))

    def take_result(self, result: node_service_pb2.CommandResult) -> None:
        for command_id, answer in self._answers:
            if command_id == result.command_id and not answer.result.done():
                answer.acknowledged.set()
                answer.result.set_result(result)

    async def _send_command(self, command: node_service_pb2.Command, timeout_s: float) -> None:
        command.deadline.FromMicroseconds(round(timeout_s * 1e6))
        await self.send(node_service_pb2.ServerMessage(command=command))

    @contextlib.asynccontextmanager
    async def _answer_within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise OperationTimeout(
                f"node {self.node_id} did not answer within {timeout_s:g} s",
                code="node_timeout",
                hint="whether it was done can be looked up with `outrider container list`",
            ) from error

    def close(self, error: OutriderError | None) -> None:
        """End the channel; the agent is told ``error``. Idempotent."""
        if not self.open:
            return
        self._error = error
        self._closed.set_result(None)
        for _, answer in self._answers:
            if not answer.result.done():
                answer.acknowledged.set()
                answer.result.set_exception(self.gone())

    def gone(self) -> Unavailable:
        return Unavailable(
            f"the connection of node {self.node_id} was lost before it answered",
            code="node_lost",
            hint="whether it was done can be looked up once the node is back",
        )


@dataclass
class _Transition:
    node_id: str
    online: bool
    reason: str


@dataclass
class Fleet:
    """All nodes' presence and control channels on this server."""

    db: Database
    bus: Bus
    interval_s: float
    missed: int
    _channels: dict[str, ControlChannel] = field(default_factory=dict)
    _presence: dict[str, Presence] = field(default_factory=dict)
    _sessions: dict[str, tuple[str, int]] = field(default_factory=dict)
    _transitions: asyncio.Queue[_Transition] = field(default_factory=asyncio.Queue)
    _flushed_at: float = 0.0

    async def load(self) -> None:
        """Take over what the store knows; nobody is online yet."""
        for node in await self.db.read(nodes.listed):
            presence = self._presence.setdefault(node.node_id, Presence())
            if node.HasField("last_seen"):
                presence.last_seen_us = node.last_seen.ToMicroseconds()
            if node.HasField("brief"):
                presence.brief = node.brief

    # -- sessions ------------------------------------------------------------------------------------------

    def began_session(self, node_id: str, session: nodes.Session) -> None:
        """The newest session wins: a channel of an older one is closed."""
        self._sessions[node_id] = (session.session_id, session.epoch)
        channel = self._channels.get(node_id)
        if channel is not None and channel.epoch != session.epoch:
            channel.close(superseded(node_id))
        presence = self._presence.setdefault(node_id, Presence())
        presence.full_digest = None
        presence.last_seen_us = now_us()

    async def check_session(self, node_id: str, session_id: str, epoch: int) -> None:
        """Raise Conflict unless this is the node's newest session."""
        if node_id not in self._sessions:
            self._sessions[node_id] = await self.db.read(lambda c: nodes.current_session(c, node_id))
        if not session_id or self._sessions[node_id] != (session_id, epoch):
            raise superseded(node_id)

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
            self._offline(channel.node_id, "its connection was closed")

    def heard(self, node_id: str, brief: types_pb2.BriefState | None = None) -> None:
        """The node gave a sign of life."""
        presence = self._presence.setdefault(node_id, Presence())
        presence.heard_at = time.monotonic()
        presence.last_seen_us = now_us()
        presence.dirty = True
        if brief is not None:
            presence.brief = brief
        if not presence.online:
            presence.online = True
            self._transitions.put_nowait(_Transition(node_id, True, ""))

    def full_report_wanted(self, node_id: str, digest: bytes) -> bool:
        presence = self._presence.setdefault(node_id, Presence())
        return bool(digest) and digest != presence.full_digest

    def took_full_report(self, node_id: str, digest: bytes) -> None:
        self._presence.setdefault(node_id, Presence()).full_digest = digest

    def forget(self, node_id: str) -> None:
        """The node was removed."""
        channel = self._channels.pop(node_id, None)
        if channel is not None:
            channel.close(Unauthenticated(f"node {node_id} was removed", code="node_removed"))
        self._presence.pop(node_id, None)
        self._sessions.pop(node_id, None)

    async def close_channels(self, error: OutriderError, within_s: float) -> None:
        """The server stops: every agent is told, and will look for it again."""
        leaving = [asyncio.ensure_future(channel.detached.wait()) for channel in self._channels.values()]
        for channel in self._channels.values():
            channel.close(error)
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=within_s)
            for waiter in late:
                waiter.cancel()

    def is_online(self, node_id: str) -> bool:
        presence = self._presence.get(node_id)
        return presence is not None and presence.online

    def online_count(self) -> int:
        return sum(presence.online for presence in self._presence.values())

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
        return Unavailable(
            f"node {node_id} is offline since {spoken(presence.last_seen_us)}",
            code="node_offline",
            hint="look at its agent with `outrider agent status` on the node",
        )

    def heartbeat_policy(self) -> types_pb2.HeartbeatPolicy:
        """How often agents are to report; the interval grows with the fleet, so that all together stay at 50/s."""
        interval = max(self.interval_s, self.online_count() / _HEARTBEATS_PER_SECOND)
        return types_pb2.HeartbeatPolicy(interval=wire.duration(interval), jitter=_JITTER)

    async def run(self) -> None:
        """Until cancelled: notice who has fallen silent, and write down what changed."""
        while True:
            transition = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self.interval_s / 4, 1.0)):
                    transition = await self._transitions.get()
            if transition is not None:
                await self._record(transition)
            silent = max(self.interval_s, self.online_count() / _HEARTBEATS_PER_SECOND) * (1 + _JITTER) * self.missed
            for node_id, presence in list(self._presence.items()):
                if presence.online and time.monotonic() - presence.heard_at > silent:
                    channel = self._channels.pop(node_id, None)
                    if channel is not None:
                        channel.close(Unavailable("no heartbeat came in time", code="heartbeat_missed"))
                    self._offline(node_id, f"{self.missed} heartbeats were missed")
            await self._flush_if_due()

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
        self._flushed_at = time.monotonic()
        if not sightings:
            return
        try:
            await self.db.write(Commit.NODES_SEEN, lambda c: nodes.save_sightings(c, sightings))
        except OutriderError as error:
            # Presence must go on being watched while the store can't be written; the next time has it all.
            log.error("sightings of nodes were not stored", error=str(error))
            for _, presence in dirty:
                presence.dirty = True

    async def _flush_if_due(self) -> None:
        if time.monotonic() - self._flushed_at >= self.interval_s:
            await self.flush()

    async def _record(self, transition: _Transition) -> None:
        node_id, type_ = transition.node_id, "node.online" if transition.online else "node.offline"
        log.info(type_, node=node_id, reason=transition.reason)
        data = {"reason": transition.reason} if transition.reason else {}
        try:
            await self.db.write(
                Commit.NODE_PRESENCE, lambda c: events.add(c, type_, node_id, node_id=node_id, data=data)
            )
        except OutriderError as error:
            log.error("an event was not stored", type=type_, node=node_id, error=str(error))
        self.bus.publish(EVENTS)
        self.bus.publish(NODES)

    def _offline(self, node_id: str, reason: str) -> None:
        presence = self._presence.get(node_id)
        if presence is not None and presence.online:
            presence.online = False
            presence.dirty = True
            self._transitions.put_nowait(_Transition(node_id, False, reason))


def superseded(node_id: str) -> Conflict:
    return Conflict(
        f"this session of node {node_id} is not the newest", code="session_superseded", hint="register again"
    )


def command(
    command_id: str,
    *,
    run_pipeline: node_service_pb2.RunPipeline | None = None,
    cancel_run: node_service_pb2.CancelRun | None = None,
    container: node_service_pb2.ContainerCommand | None = None,
    list_containers: node_service_pb2.ListContainersCommand | None = None,
    inspect_container: node_service_pb2.InspectContainerCommand | None = None,
    stream_container_logs: node_service_pb2.StreamContainerLogsCommand | None = None,
    stop_stream: node_service_pb2.StopStreamCommand | None = None,
) -> node_service_pb2.Command:
    """A command with its digest: SHA-256 of the one body that is given, serialised deterministically."""
    made = node_service_pb2.Command(
        command_id=command_id,
        run_pipeline=run_pipeline,
        cancel_run=cancel_run,
        container=container,
        list_containers=list_containers,
        inspect_container=inspect_container,
        stream_container_logs=stream_container_logs,
        stop_stream=stop_stream,
    )
    which = made.WhichOneof("body")
    assert which is not None
    body: Message = getattr(made, which)
    made.digest = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
    return made

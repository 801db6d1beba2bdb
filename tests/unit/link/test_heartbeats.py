"""Heartbeats: their rhythm, and how a connection is given up of which a direction is dead."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent_core.heartbeat import Heartbeats, heartbeat_proof
from outrider.errors import Unavailable
from outrider.tls import Identity
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import duration
from server_core.security import tokens

INTERVAL_S = 0.2


class Clock:
    """The monotonic clock, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Link:
    """A control channel whose other end is this test."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.sent: list[tuple[float, pb.HeartbeatRequest]] = []
        self.answering = True
        self.engine_hangs = False
        self.beats = Heartbeats(
            Identity("token", "n1", "s1", 3),
            lambda: types.BriefState(engine_ok=True, state_digest=b"d", runs=["r1"], outbox_depth=7),
            self._count,
            self._send,
            rng=random.Random(1),
            clock=clock or time.monotonic,
        )
        self.tell(INTERVAL_S)

    def tell(self, interval_s: float) -> None:
        self.beats.obey(types.HeartbeatPolicy(interval=duration(interval_s), jitter=0.2))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < count:
                await asyncio.sleep(0.005)

    def _send(self, message: pb.AgentMessage) -> None:
        self.sent.append((time.monotonic(), message.heartbeat))
        if self.answering:
            self.beats.answered(pb.HeartbeatResponse(sequence=message.heartbeat.sequence))

    async def _count(self) -> dict[str, int]:
        if self.engine_hangs:
            await asyncio.sleep(3600)
        return {"running": 2}


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(link.beats.run("the-server"))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_heartbeats_are_numbered_and_prove_the_credential() -> None:
    link = Link()
    async with running(link):
        await link.until(3)
    assert [beat.sequence for _, beat in link.sent[:3]] == [1, 2, 3]
    for _, beat in link.sent:
        assert beat.proof == heartbeat_proof("token", "s1", 3, beat.sequence)
        assert tokens.proof_is_right(beat.proof, tokens.digest("token"), "s1", 3, beat.sequence)


async def test_a_dead_direction_is_noticed_within_two_heartbeats() -> None:
    link = Link()
    async with running(link) as task:
        await link.until(2)
        link.answering = False
        began = time.monotonic()
        with pytest.raises(Unavailable, match="the-server has left heartbeats unanswered"):
            await asyncio.wait_for(task, 10)
        took_s = time.monotonic() - began
    assert link.beats.longest_silence_s == pytest.approx(2 * INTERVAL_S * 1.2)
    assert took_s >= link.beats.longest_silence_s - INTERVAL_S * 1.2
    assert took_s < 3


async def test_a_process_that_was_stopped_does_not_take_its_own_silence_for_the_servers() -> None:
    clock = Clock()
    link = Link(clock)
    async with running(link) as task:
        await link.until(2)
        clock.ahead_s += 3600  # SIGSTOP for an hour: the clock went on, nobody looked
        count = len(link.sent)
        await link.until(count + 2)
        assert not task.done()


async def test_a_changed_interval_holds_at_once_in_both_directions() -> None:
    link = Link()
    link.tell(3600)
    async with running(link) as task:
        await link.until(1)
        link.tell(0.05)  # not only after the hour
        await link.until(4)
        link.tell(3600)
        await asyncio.sleep(0.3)
        count = len(link.sent)
        link.answering = False
        await asyncio.sleep(0.3)
        assert len(link.sent) - count <= 1
        assert not task.done()  # an hour's silence is allowed now


async def test_an_engine_that_hangs_delays_no_heartbeat() -> None:
    link = Link()
    async with running(link):
        await link.until(1)
        link.engine_hangs = True
        began = len(link.sent)
        await link.until(began + 3)
    assert link.sent[-1][1].brief.containers == {"running": 2}  # as there were


async def test_how_long_a_command_was_on_its_way_is_known_without_comparing_clocks() -> None:
    here, there = 5_000.0, 70.0  # two machines; neither clock says anything about the other
    sent: list[pb.HeartbeatRequest] = []
    beats = Heartbeats(
        Identity("token", "n1", "s1", 3),
        types.BriefState,
        Link()._count,
        lambda message: sent.append(message.heartbeat),
        rng=random.Random(1),
        boot_clock=lambda: here,
    )
    task = asyncio.create_task(beats.run("the-server"))
    async with asyncio.timeout(10):
        while not sent:
            await asyncio.sleep(0.005)
    here, there = here + 4, there + 4
    # Nothing was answered yet: it can't have been sent before the channel was there.
    assert beats.age_s(duration(there)) == pytest.approx(4)
    beats.answered(pb.HeartbeatResponse(sequence=1, sent_at=duration(there - 3.9)))
    command = duration(there)
    assert beats.age_s(command) == pytest.approx(0.1)  # the way of the heartbeat may have been that long
    here, there = here + 60, there + 60  # the link is silent, or this process stopped
    assert beats.age_s(command) == pytest.approx(60.1)
    assert beats.age_s(duration(there)) == pytest.approx(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_first_heartbeat_says_what_the_node_has_though_its_engine_is_slow() -> None:
    link = Link()
    link.engine_hangs = True
    async with running(link):
        await link.until(1)
    brief = link.sent[0][1].brief
    assert (list(brief.runs), brief.outbox_depth, brief.state_digest) == (["r1"], 7, b"d")

"""Who is held to be offline, and when: on a clock of the test's own, with a real store for the events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from outrider.errors import OutriderError, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.wire import seconds
from server_core.bus.local import LocalBus
from server_core.channel import ControlChannel
from server_core.fleet import JITTER, RETURN_GRACE_INTERVALS, Fleet
from server_core.store import events, nodes
from server_core.store.commits import Commit
from server_core.store.sqlite import SqliteDatabase

INTERVAL_S = 4.0  # the fleet looks once a second
SILENCE_S = 2 * INTERVAL_S * (1 + JITTER)


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


class Site:
    def __init__(self, path: Path) -> None:
        self.db = SqliteDatabase(path / "store.db")
        self.clock = Clock()
        self.fleet = Fleet(self.db, LocalBus(), INTERVAL_S, 2, 100.0, clock=self.clock)

    async def pass_time(self, seconds_: float, heard: Callable[[], None] = lambda: None) -> None:
        """Awake, looking every half second."""
        end = self.clock.now + seconds_
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + 0.5)
            heard()
            self.fleet._look()
        await asyncio.sleep(0)

    def connect(self, node_id: str) -> ControlChannel:
        channel = ControlChannel(node_id, "s", 1)
        self.fleet.attach(channel)
        self.fleet.heartbeat_policy(node_id)
        return channel

    async def told(self) -> list[str]:
        """The events of presence so far, once the fleet has written them."""
        task = asyncio.create_task(self.fleet.run())
        async with asyncio.timeout(10):
            while not self.fleet._transitions.empty():
                await asyncio.sleep(0.01)
        await self.db.write(Commit.EVENTS, lambda c: None)  # behind the fleet's own
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        found = await self.db.read(lambda c: events.after(c, 0, cpb.EventFilter(types=["node."]), 1000))
        return [f"{event.type.removeprefix('node.')} {event.node_id}" for event in found]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await asyncio.to_thread(made.db.close)


async def test_silence_is_noticed_within_two_heartbeats_and_not_before(site: Site) -> None:
    channel = site.connect("n1")
    await site.pass_time(SILENCE_S - 0.5)
    assert site.fleet.is_online("n1")
    await site.pass_time(1.0)
    assert not site.fleet.is_online("n1")
    assert not channel.open
    assert await site.told() == ["online n1", "offline n1"]


async def test_a_node_is_judged_by_the_interval_that_it_was_told(site: Site) -> None:
    for number in range(1000):
        site.connect(f"n{number}")
    told_s = seconds(site.fleet.heartbeat_policy("n0").interval)
    assert told_s == 1000 / 50  # all together fifty a second
    for number in range(1, 1000):
        site.fleet.forget(f"n{number}")
    assert seconds(site.fleet.heartbeat_policy("other").interval) == INTERVAL_S
    await site.pass_time(2 * told_s)  # n0 has not heard yet that the fleet shrank
    assert site.fleet.is_online("n0")
    await site.pass_time(2 * told_s * JITTER + 1)
    assert not site.fleet.is_online("n0")


async def test_a_server_that_was_paused_loses_nobody(site: Site) -> None:
    channels = [site.connect(f"n{number}") for number in range(20)]
    await site.pass_time(1)
    site.clock.now += 3600  # SIGSTOP
    for channel in channels[:10]:
        site.fleet.detach(channel)  # they hung up meanwhile, and that is the first thing that is seen
    await site.pass_time(5)
    assert site.fleet.online_count() == 20
    for number in range(10):
        site.connect(f"n{number}")
    await site.pass_time(
        RETURN_GRACE_INTERVALS * INTERVAL_S * 2, lambda: [site.fleet.heard(f"n{n}") for n in range(20)]
    )
    assert site.fleet.online_count() == 20
    assert await site.told() == [f"online n{number}" for number in range(20)]


async def test_who_does_not_come_back_after_the_pause_is_offline_in_the_end(site: Site) -> None:
    channel = site.connect("n1")
    site.connect("n2")
    site.clock.now += 3600
    site.fleet.detach(channel)
    await site.pass_time(RETURN_GRACE_INTERVALS * INTERVAL_S - 1, lambda: site.fleet.heard("n2"))
    assert site.fleet.is_online("n1")
    await site.pass_time(2)
    assert not site.fleet.is_online("n1")
    assert site.fleet.is_online("n2")


async def test_a_closed_connection_is_told_at_once_by_a_server_that_was_awake(site: Site) -> None:
    channel = site.connect("n1")
    await site.pass_time(2)
    site.fleet.detach(channel)
    assert not site.fleet.is_online("n1")


async def test_the_wall_clock_decides_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect("n1")
    for jump_us in (10**15, -(10**15)):  # thirty years to either side
        monkeypatch.setattr("server_core.fleet.now_us", lambda jump_us=jump_us: 1_700_000_000_000_000 + jump_us)
        await site.pass_time(3 * SILENCE_S, lambda: site.fleet.heard("n1"))
        assert site.fleet.is_online("n1")
    assert await site.told() == ["online n1"]


async def test_agents_are_told_a_turn_each_when_the_server_stops(site: Site) -> None:
    channels = [site.connect(f"n{number}") for number in range(300)]
    told: list[float] = []

    def farewell(wait_s: float) -> OutriderError:
        told.append(wait_s)
        return Unavailable("stops", retry_after_s=wait_s)

    await site.fleet.close_channels(farewell, 0.01, absent_s=2.0)
    assert sorted(told) == pytest.approx([2.0 + number / 100 for number in range(300)])
    assert not any(channel.open for channel in channels)


async def test_the_spread_grows_with_the_fleet_and_a_small_one_has_none(site: Site) -> None:
    site.connect("n0")
    assert not site.fleet.heartbeat_policy("n0").HasField("reconnect_spread")
    for number in range(500):
        site.connect(f"n{number}")
    assert seconds(site.fleet.heartbeat_policy("n0").reconnect_spread) == 5.0


async def test_a_new_server_counts_on_the_fleet_of_the_former_one(site: Site) -> None:
    def seed(connection: object) -> None:
        for number in range(1000):
            nodes.add(connection, f"n{number}", {}, "")  # type: ignore[arg-type]
        seen = [nodes.Sighting(f"n{number}", 10**15 + number, None) for number in range(900)]
        seen += [nodes.Sighting(f"n{number}", 10**14, None) for number in range(900, 1000)]  # away for years
        nodes.save_sightings(connection, seen)  # type: ignore[arg-type]

    await site.db.write(Commit.NODES_SEEN, seed)
    await site.fleet.load()
    assert site.fleet.online_count() == 0
    assert seconds(site.fleet.heartbeat_policy("n0").interval) == 900 / 50
    assert "has not come back yet" in str(site.fleet.offline_error("n1"))
    assert "offline since" in str(site.fleet.offline_error("n950"))

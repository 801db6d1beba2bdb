"""Supervision on the fake engine: what can't be waited for with a real one, or must be provoked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ManagedSpec, Restart
from agent_core.containers import Containers
from agent_core.liveness import Supervision, Supervisor, _Watch
from agent_core.runtimes.fake import FakeProcess
from agent_core.transitions import Transition
from outrider.errors import EngineUnavailable

if TYPE_CHECKING:
    from conftest import Parts


@dataclass
class Watched:
    """A node whose containers are asked by a program that fails for those named in ``sick``."""

    parts: Parts
    sick: set[str] = field(default_factory=set)
    asked: int = 0
    events: list[tuple[str, str, Mapping[str, Any]]] = field(default_factory=list)

    @asynccontextmanager
    async def supervised(self, containers: Containers | None = None) -> AsyncIterator[Supervisor]:
        async def probe(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
            self.asked += 1
            return (1, b"no answer") if process.spec.name in self.sick else (0, b"")

        async def emit(kind: str, subject: str, data: Mapping[str, Any]) -> None:
            self.events.append((kind, subject, data))

        async def available() -> None:
            while True:
                with contextlib.suppress(EngineUnavailable):
                    await self.parts.runtime.info()
                    return
                await asyncio.sleep(0.02)

        self.parts.runtime.executed["probe"] = probe
        supervisor = Supervisor(self.parts.runtime, containers or self.parts.containers, emit, available)

        async def listen() -> None:
            async for event in self.parts.runtime.events():
                supervisor.heard(event)

        tasks = [asyncio.create_task(supervisor.run()), asyncio.create_task(listen())]
        try:
            yield supervisor
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def restarts(self) -> list[float]:
        return [each for each in self.parts.runtime.calls if each == ("start", self.container)][1:]  # type: ignore[misc]

    container: str = ""

    async def start(self, **more: Any) -> None:
        live = {"exec": {"args": ["probe"]}, "interval_s": 1, "failures": 1, "grace_s": 0} | more.pop("live", {})
        spec = ManagedSpec.parse({"name": "arena", "image": "game:1", "ready": {"log": "is up"}, "live": live} | more)
        self.container = (await self.parts.containers.start(spec, self.parts.scope)).id

    def health(self) -> str:
        return self.parts.containers.health.get("arena", "")

    def told(self, kind: str) -> list[Mapping[str, Any]]:
        return [data for what, subject, data in self.events if (what, subject) == (kind, "arena")]


@pytest.fixture
def watched(parts: Parts) -> Watched:
    return Watched(parts)


async def until(holds: Any, what: str, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)
    assert holds(), what


async def test_a_sick_container_is_restarted_again_and_again_until_its_limit_and_that_is_told(watched: Watched) -> None:
    watched.sick.add("arena")
    async with watched.supervised():
        await watched.start(restart={"policy": "on-failure", "max": 2, "first_wait_s": 0.1})
        await until(lambda: watched.told("container.unhealthy"), "the end of it")
        assert [data["restarts"] for data in watched.told("container.restarted")] == [1, 2]
        assert watched.told("container.unhealthy")[0]["reason"] == "probe ended with exit code 1: no answer"
        assert watched.health() == "failed"
        assert (await watched.parts.containers.inspect("arena")).state == "running"  # it is left as it is
        row = watched.parts.containers.rows.get("arena")
        assert row is not None
        assert (row.restarts, row.reason) == (2, "probe ended with exit code 1: no answer")


async def test_one_that_is_not_to_be_restarted_is_only_told(watched: Watched) -> None:
    watched.sick.add("arena")
    async with watched.supervised():
        await watched.start(restart="no")
        await until(lambda: watched.told("container.unhealthy"), "the news")
        assert watched.restarts() == []


async def test_what_somebody_stops_stays_stopped_and_is_watched_again_once_it_is_started(watched: Watched) -> None:
    async with watched.supervised():
        await watched.start()
        await until(lambda: watched.health() == "live", "live")
        await watched.parts.containers.stop("arena")
        await until(lambda: watched.health() == "", "nothing known of a stopped one")
        watched.sick.add("arena")
        asked = watched.asked
        await asyncio.sleep(1.2)
        assert (watched.asked, watched.restarts()) == (asked, [])
        watched.sick.clear()
        await watched.parts.containers.start_existing("arena")
        await until(lambda: watched.health() == "live", "live again")


async def test_the_next_agent_goes_on_watching_from_its_journal(watched: Watched, parts: Parts) -> None:
    async with watched.supervised():
        await watched.start()
    watched.sick.add("arena")
    another = Containers(parts.runtime, parts.journal, parts.ports, parts.volumes, parts.policy, "n1")
    async with watched.supervised(another):
        await until(lambda: watched.told("container.restarted"), "the restart by the next agent")


async def test_an_engine_that_is_away_is_no_failure_of_a_container(watched: Watched) -> None:
    async with watched.supervised():
        await watched.start(restart={"policy": "always", "max": 1})
        await until(lambda: watched.health() == "live", "live")
        watched.parts.runtime._available = False
        await asyncio.sleep(1.5)
        watched.parts.runtime._available = True
        assert watched.told("container.restarted") == []


async def test_a_container_that_is_slow_to_start_is_given_its_time(watched: Watched) -> None:
    watched.sick.add("arena")
    async with watched.supervised():
        await watched.start(live={"grace_s": 3600})
        await until(lambda: watched.asked >= 2, "it was asked")
        assert watched.told("container.restarted") == []
        assert watched.health() == "starting"


async def test_asked_for_again_with_another_liveness_the_same_container_is_watched_by_that(watched: Watched) -> None:
    watched.sick.add("arena")
    async with watched.supervised():
        await watched.start(live={"grace_s": 3600})
        before = watched.container
        await watched.start(live={"grace_s": 0})
        assert watched.container == before
        await until(lambda: watched.told("container.restarted"), "the restart")


@pytest.mark.parametrize(
    ("probe", "answer", "reason"),
    [
        ({}, "500 Oops", "port http answered GET /healthz with status 500"),
        ({}, "", "port http did not answer GET /healthz"),
        ({}, "200 OK", None),
        ({}, "302 Found", None),
        ({"status": 503}, "200 OK", "port http answered GET /healthz with status 200"),
        ({"status": 503}, "503 Busy", None),
    ],
)
async def test_liveness_by_http_asks_for_a_status_within_its_time(
    watched: Watched, probe: dict[str, Any], answer: str, reason: str | None
) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        if answer:
            writer.write(f"HTTP/1.0 {answer}\r\n\r\n".encode())
        else:
            await reader.read()  # until the one who asks has had enough
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)  # where a container of the fake engine is
    live = {"exec": None, "http": {"port": "http", "path": "/healthz", **probe}, "timeout_s": 0.3}
    ports = [{"name": "http", "container": server.sockets[0].getsockname()[1]}]
    async with server, watched.supervised():
        await watched.start(live=live, ports=ports, restart="no")
        if reason is None:
            await until(lambda: watched.health() == "live", "live")
            await until(lambda: len(asked) > 1, "asked again")
            assert watched.told("container.unhealthy") == []
        else:
            await until(lambda: watched.told("container.unhealthy"), "the news")
            assert watched.told("container.unhealthy")[0]["reason"] == reason
    assert asked[0].startswith(b"GET /healthz HTTP/1.0\r\n")


class Printing:
    """A game that prints what it is told to; ``first`` at the start of its first run alone."""

    def __init__(self, watched: Watched, first: str = "") -> None:
        self.process: FakeProcess | None = None
        self._first = first
        watched.parts.runtime.programs["game:1"] = self._run

    async def _run(self, process: FakeProcess) -> int:
        self.process, first, self._first = process, self._first, ""
        process.write(f"the server is up\n{first}\n".encode())
        await process.signalled.wait()
        process.write(b"stopped, because it had gone wrong\n")
        return 0

    def say(self, text: str) -> None:
        assert self.process is not None
        self.process.write(f"{text}\n".encode())


LOG = {"live": {"log": "gone wrong", "exec": None, "interval_s": 1}, "restart": {"first_wait_s": 0.1}}


def agent_of(parts: Parts) -> Containers:
    return Containers(parts.runtime, parts.journal, parts.ports, parts.volumes, parts.policy, "n1")


async def test_a_line_that_was_printed_before_anybody_watched_counts_once(watched: Watched, parts: Parts) -> None:
    Printing(watched, first="it has gone wrong")
    await watched.start(**LOG)
    for agent in (parts.containers, agent_of(parts)):
        async with watched.supervised(agent):
            await until(lambda: watched.told("container.restarted"), "the restart")
            await asyncio.sleep(0.5)
    [told] = watched.told("container.restarted")
    assert told == {"reason": "its log says 'gone wrong'", "restarts": 1}


@pytest.mark.parametrize("away", ["agent", "engine"])
async def test_a_line_that_is_printed_while_nobody_reads_counts(watched: Watched, parts: Parts, away: str) -> None:
    game = Printing(watched)
    async with watched.supervised() as supervisor:
        await watched.start(**LOG)
        await until(lambda: watched.health() == "live", "live")
        if away == "engine":
            parts.runtime._available = False
            for watch in supervisor._watches.values():
                watch.wake()  # as if the reader's connection had broken
            await asyncio.sleep(0.1)
            game.say("it has gone wrong")
            parts.runtime._available = True
            await until(lambda: watched.told("container.restarted"), "the restart")
    game.say("it has gone wrong")
    async with watched.supervised(agent_of(parts)):
        await until(lambda: len(watched.told("container.restarted")) == 1 + (away == "engine"), "the restart")
        await asyncio.sleep(0.5)
    assert len(watched.restarts()) == 1 + (away == "engine")


async def test_how_far_a_log_was_read_is_noted_now_and_then_and_read_on_from_there(
    watched: Watched, parts: Parts
) -> None:
    def seen() -> float:
        row = parts.containers.rows.get("arena")
        assert row is not None
        return row.log_seen

    game = Printing(watched)
    async with watched.supervised():
        await watched.start(**LOG)
        await until(seen, "a first note")
        noted = seen()
        for number in range(100):
            game.say(f"line {number}")
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        assert seen() == noted
    await parts.journal.execute(Transition.MANAGED_LOG_SEEN, "UPDATE managed SET log_seen = ?", (time.time() + 0.05,))
    game.say("it has gone wrong")  # and was read by the former agent
    await asyncio.sleep(0.1)
    async with watched.supervised(agent_of(parts)):
        await asyncio.sleep(0.3)
        assert watched.restarts() == []


async def test_what_was_printed_before_a_new_rule_is_nothing_to_it(watched: Watched) -> None:
    game = Printing(watched)
    async with watched.supervised():
        await watched.start(**LOG)
        game.say("the disk is slow")
        await watched.start(**LOG | {"live": LOG["live"] | {"log": "disk is slow"}})
        await asyncio.sleep(0.5)
        assert watched.restarts() == []
        game.say("the disk is slow")
        await until(lambda: watched.told("container.restarted"), "the restart")


def test_waits_between_restarts_grow_up_to_their_limit() -> None:
    restart = Restart(first_wait_s=1, longest_wait_s=10)
    live = {"exec": {"args": ["x"]}}
    watch = object.__new__(_Watch)
    watch.supervision = Supervision.model_validate({"live": live, "restart": restart.model_dump()})
    waits = []
    for count in (0, 1, 2, 3, 4, 5, 6, 1000):
        watch._restarts = count
        waits.append(watch._wait_s())
    assert waits == [0, 1, 2, 4, 8, 10, 10, 10]

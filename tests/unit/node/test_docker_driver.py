"""What of the Docker driver needs no api: frames, create bodies, errors, and ends known from events."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from agent_core.runtimes._docker_exits import Exits
from agent_core.runtimes._docker_streams import Demultiplexer
from agent_core.runtimes._docker_wire import create_body, info_from_inspect, moment, since, unavailable
from agent_core.runtimes.base import ContainerInfo, ContainerSpec, Mount, PortBinding, run_began
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import Conflict, EngineUnavailable, NotFound, OperationTimeout, OutriderError, TemporaryError
from outrider.retry import RetryPolicy


class FakeEngine:
    """An engine's socket that gives the answers it is told to, and counts what it was asked."""

    def __init__(self, socket_path: Path) -> None:
        self.path = socket_path
        self.answers: dict[str, tuple[int, object]] = {}
        self.hanging: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.runtime = DockerRuntime(str(socket_path), call_timeout_s=1.0)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.calls[request.raw_path.partition("?")[0]] += 1
        if request.path in self.hanging:
            await asyncio.sleep(60)
        if request.path == "/version":
            return web.json_response({"ApiVersion": "1.41"})
        default = (404, {"message": f"No such image: {request.path.split('images/')[-1]}"})
        if request.method == "POST":
            default = (204, b"")
        status, body = self.answers.get(f"{request.method} {request.path}", default)
        return web.Response(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    api = FakeEngine(tmp_path / "e.sock")
    await api.start()
    yield api
    await api.runtime.aclose()
    await api.stop()


FRAMES = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50)), max_size=20)


@given(FRAMES, st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_frames_are_put_together_however_they_are_cut(frames: list[tuple[int, bytes]], cuts: list[int]) -> None:
    wire = b"".join(struct.pack(">BxxxI", number, len(data)) + data for number, data in frames)
    demultiplexer = Demultiplexer()
    got: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    position = 0
    index = 0
    while position < len(wire):
        size = cuts[index % len(cuts)]
        for stream, data in demultiplexer.feed(wire[position : position + size]):
            got[stream] += data
        position, index = position + size, index + 1
    assert got["stdout"] == b"".join(data for number, data in frames if number == 1)
    assert got["stderr"] == b"".join(data for number, data in frames if number == 2)


def test_defaults_are_the_sandbox() -> None:
    body = create_body(ContainerSpec(name="x", image="i", mounts=(Mount("/s", "/t"),), memory_bytes=10**7, cpus=0.5))
    host = body["HostConfig"]
    assert not host["Privileged"]
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], [])
    assert host["SecurityOpt"] == ["no-new-privileges"]  # and so the engine's default seccomp profile
    assert host["ReadonlyRootfs"]
    assert host["NetworkMode"] == "none"
    assert host["Mounts"][0]["ReadOnly"]
    assert "size=67108864" in host["Tmpfs"]["/tmp"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (10**7, 10**7, 500_000_000)
    assert host["LogConfig"]["Type"] == "local"
    assert (host["IpcMode"], host["CgroupnsMode"]) == ("private", "private")
    assert "Binds" not in host
    assert not {"PidMode", "UTSMode", "UsernsMode", "Cgroup"} & set(host)


def test_the_runtime_is_the_engines_unless_one_is_named() -> None:
    assert "Runtime" not in create_body(ContainerSpec(name="x", image="i"))["HostConfig"]
    assert create_body(ContainerSpec(name="x", image="i", oci_runtime="crun"))["HostConfig"]["Runtime"] == "crun"


def test_the_stop_signal_is_the_images_unless_one_is_named() -> None:
    assert "StopSignal" not in create_body(ContainerSpec(name="x", image="i"))
    assert create_body(ContainerSpec(name="x", image="i", stop_signal="USR1"))["StopSignal"] == "USR1"


def test_two_ports_of_one_number_in_both_protocols() -> None:
    ports = (PortBinding(1, 27000, "udp"), PortBinding(1, 27000, "tcp"))
    body = create_body(ContainerSpec(name="x", image="i", ports=ports))
    assert set(body["HostConfig"]["PortBindings"]) == {"1/udp", "1/tcp"}


PORT = "driver failed programming external connectivity: Bind for 0.0.0.0:27000 failed: port is already allocated"


@pytest.mark.parametrize(
    ("status", "message", "expected", "words"),
    [
        (500, PORT, Conflict, "port 27000 is taken"),
        (500, "listen tcp4 0.0.0.0:27001: bind: address already in use", Conflict, "port 27001"),
        (404, "No such image: a/b:1", NotFound, "image a/b:1"),
        (404, "No such container: x", NotFound, "no container game"),
        (409, 'The container name "/game" is already in use by container "1"', Conflict, "named game"),
        (500, "write /x: no space left on device", TemporaryError, "disk is full"),
        (409, "cannot join network of a non running container: 1", TemporaryError, "namespace"),
    ],
)
async def test_refusals_are_translated(
    api: FakeEngine, status: int, message: str, expected: type[OutriderError], words: str
) -> None:
    api.answers["POST /v1.41/containers/game/start"] = (status, {"message": message})
    with pytest.raises(OutriderError, match=words) as caught:
        await api.runtime.start("game")
    assert type(caught.value) is expected


async def test_an_engine_that_hangs_on_one_call_holds_up_no_other(api: FakeEngine) -> None:
    api.hanging.add("/v1.41/containers/game/start")
    hanging = asyncio.create_task(api.runtime.start("game"))
    await asyncio.gather(*(api.runtime.start(f"other{number}") for number in range(40)))
    assert not hanging.done()
    with pytest.raises(OperationTimeout, match="did not answer in time: start game"):
        await hanging
    assert api.calls["/v1.41/containers/other39/start"] == 1


async def test_an_engine_that_came_back_is_spoken_to_on_new_connections(api: FakeEngine) -> None:
    await api.runtime.start("game")
    await api.stop()
    with pytest.raises(EngineUnavailable, match="can't be reached"):
        await api.runtime.start("game")
    await api.start()
    await api.runtime.start("game")
    assert api.calls["/v1.41/containers/game/start"] == 2


async def test_an_answer_that_is_no_json(api: FakeEngine) -> None:
    api.answers["GET /v1.41/containers/game/json"] = (200, b"<html>")
    with pytest.raises(OutriderError, match="can't be understood"):
        await api.runtime.inspect("game")


async def test_names_can_not_lead_to_other_paths(api: FakeEngine) -> None:
    for name in ("../images", "a/b", "a?force=1", ""):
        with pytest.raises(NotFound, match="no container"):
            await api.runtime.inspect(name)
    with pytest.raises(NotFound, match=r"image a%2\?b"):
        await api.runtime.find_image("a%2?b")
    assert set(api.calls) <= {"/version", "/v1.41/images/a%252%3Fb/json"}


async def test_no_engine_and_no_permission(tmp_path: Path) -> None:
    runtime = DockerRuntime(str(tmp_path / "none.sock"))
    with pytest.raises(EngineUnavailable, match=r"none\.sock can't be reached: No such file"):
        await runtime.start("game")
    await runtime.aclose()
    assert "as root" in str(unavailable("unix:///e.sock", PermissionError(13, "Permission denied")))


def test_moments() -> None:
    assert moment("2026-01-02T03:04:05.123456789Z") == datetime(2026, 1, 2, 3, 4, 5, 123456, UTC)
    assert moment("2026-01-02T03:04:05Z") == datetime(2026, 1, 2, 3, 4, 5, 0, UTC)
    assert moment("0001-01-01T00:00:00Z") is None
    assert moment("") is None
    assert since(datetime(2026, 1, 2, 3, 4, 5, 678, UTC)) == "1767323045.000678"


def test_a_running_container_says_when_its_former_run_ended() -> None:
    state = {"Status": "running", "StartedAt": "2026-01-02T03:04:06Z", "FinishedAt": "2026-01-02T03:04:05Z"}
    answer = {"Id": "i", "Name": "/c", "State": state, "Config": {"Image": "game:1"}}
    assert run_began(info_from_inspect(answer)) == datetime(2026, 1, 2, 3, 4, 5, 500_000, UTC)
    state["FinishedAt"] = "0001-01-01T00:00:00Z"
    assert run_began(info_from_inspect(answer)) is None


class Engine:
    """The side of the engine that `Exits` sees, played by a test."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.states: dict[str, ContainerInfo] = {}
        self.inspected: list[str] = []
        self.boot = "one"
        self.survives = False
        self.up = True
        self.hangs_on: set[str] = set()
        self.exits = Exits(
            self.stream, self.inspect, self.identity, self.alive, retry=RetryPolicy(0.01, max_wait_s=0.01)
        )

    async def stream(self) -> AsyncGenerator[dict[str, Any], None]:
        if not self.up:
            raise EngineUnavailable("away")
        yield {}
        while (item := await self.items.get()) is not None:
            yield item

    async def inspect(self, container: str) -> ContainerInfo:
        self.inspected.append(container)
        if container in self.hangs_on:
            await asyncio.sleep(0.2)
            raise OperationTimeout("the engine did not answer in time")
        if not self.up:
            raise EngineUnavailable("away")
        if container not in self.states:
            raise NotFound(f"no {container}")
        return self.states[container]

    async def identity(self) -> tuple[str, bool]:
        return self.boot, self.survives

    async def alive(self) -> bool:
        return self.up

    def state(self, container: str, state: Any, code: int | None = None, *, oom: bool = False) -> None:
        started = None if state == "created" else datetime.now(UTC)
        self.states[container] = ContainerInfo(
            container, container, "i", state, {}, exit_code=code, started_at=started, oom_killed=oom
        )

    def event(self, container: str, action: str, code: int | None = None) -> None:
        attributes = {} if code is None else {"exitCode": str(code)}
        self.items.put_nowait({"Action": action, "Actor": {"ID": container, "Attributes": attributes}, "timeNano": 1})


@pytest.fixture
async def engine() -> AsyncGenerator[Engine, None]:
    engine = Engine()
    engine.exits.start()
    await asyncio.sleep(0.02)
    yield engine
    await engine.exits.aclose()


async def test_end_on_the_stream_needs_no_further_call(engine: Engine) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.event("a", "start")
    engine.event("a", "die", 3)
    assert (await asyncio.wait_for(waiting, 1)).exit_code == 3
    assert (await engine.exits.wait("a", "")).exit_code == 3  # asked for later
    assert engine.inspected == []


async def test_end_missed_while_the_stream_was_down_is_found_by_asking(engine: Engine) -> None:
    engine.state("a", "running")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    engine.state("a", "exited", 9)
    engine.items.put_nowait(None)  # cut off, and at once back: the same engine
    end = await asyncio.wait_for(waiting, 1)
    assert (end.exit_code, end.engine_stopped, end.gap) == (9, False, True)


async def test_end_on_a_stream_that_was_down_meanwhile_says_so(engine: Engine) -> None:
    engine.state("a", "running")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.items.put_nowait(None)
    await asyncio.sleep(0.05)
    engine.event("a", "die", 0)
    end = await asyncio.wait_for(waiting, 1)
    assert (end.exit_code, end.gap) == (0, True)


async def test_end_found_after_another_boot_says_nothing_about_the_program(engine: Engine) -> None:
    engine.state("a", "running")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    engine.up = False
    engine.event("a", "die", 143)  # told by an engine that takes no calls any more
    engine.items.put_nowait(None)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    engine.state("a", "exited", 143)
    engine.boot, engine.up = "two", True
    assert (await asyncio.wait_for(waiting, 1)).engine_stopped


async def test_engine_not_asked_yet_is_not_another_engine() -> None:
    """An agent that comes back asks for an end before its event stream stands."""
    engine = Engine()
    engine.state("a", "exited", 4)
    end = await asyncio.wait_for(engine.exits.wait("a", "one"), 1)
    assert (end.exit_code, end.engine_stopped) == (4, False)
    await engine.exits.aclose()
    engine = Engine()
    engine.state("a", "exited", 137)
    engine.boot = "two"
    assert (await asyncio.wait_for(engine.exits.wait("a", "one"), 1)).engine_stopped
    await engine.exits.aclose()


async def test_waiting_survives_an_engine_that_is_away_from_the_start() -> None:
    engine = Engine()
    engine.up = False
    waiting = asyncio.create_task(engine.exits.wait("a", "one"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    engine.state("a", "exited", 0)
    engine.up = True
    end = await asyncio.wait_for(waiting, 1)
    assert (end.exit_code, end.engine_stopped) == (0, False)
    await engine.exits.aclose()


async def test_created_is_not_ended_and_a_restarted_one_is_waited_for_anew(engine: Engine) -> None:
    engine.state("a", "created")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    engine.event("a", "die", 1)
    await asyncio.wait_for(waiting, 1)
    engine.state("a", "running")
    engine.event("a", "start")
    await asyncio.sleep(0.02)
    again = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    assert not again.done()
    engine.event("a", "die", 2)
    assert (await asyncio.wait_for(again, 1)).exit_code == 2


async def test_removed_container_is_not_waited_for(engine: Engine) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    engine.event("a", "destroy")
    with pytest.raises(NotFound):
        await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("told", ["by an event", "by inspect", "by inspect, late"])
async def test_end_for_want_of_memory_is_told_from_a_kill(engine: Engine, told: str) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.event("a", "start")
    await asyncio.sleep(0.02)
    if told == "by an event":
        engine.event("a", "oom")
    engine.state("a", "exited", 137, oom=told == "by inspect")
    engine.event("a", "die", 137)
    if told == "by inspect, late":
        await asyncio.sleep(0.05)
        engine.state("a", "exited", 137, oom=True)
    end = await asyncio.wait_for(waiting, 2)
    assert (end.exit_code, end.oom_killed, end.removed) == (137, True, False)


async def test_memory_that_ran_out_is_told_whatever_the_program_made_of_it(engine: Engine) -> None:
    engine.exits.created("a")
    engine.event("a", "start")
    engine.event("a", "oom")
    engine.event("a", "die", 1)
    await asyncio.sleep(0.02)
    end = await asyncio.wait_for(engine.exits.wait("a", ""), 1)
    assert (end.exit_code, end.oom_killed) == (1, True)


async def test_kill_that_nobody_waited_for_yet_is_explained_all_the_same(engine: Engine) -> None:
    engine.exits.created("a")
    engine.event("a", "start")
    engine.state("a", "exited", 137, oom=True)
    engine.event("a", "die", 137)
    await asyncio.sleep(0.02)
    assert (await asyncio.wait_for(engine.exits.wait("a", ""), 1)).oom_killed


@pytest.mark.parametrize("state", ["removing", "gone"])
async def test_kill_by_a_removal_is_told_from_another_kill(engine: Engine, state: str) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.event("a", "start")
    if state == "removing":
        engine.state("a", "removing", 137)
    engine.event("a", "die", 137)
    engine.event("a", "destroy")
    end = await asyncio.wait_for(waiting, 1)
    assert (end.exit_code, end.removed, end.oom_killed) == (137, True, False)


async def test_end_that_is_known_counts_also_where_the_container_is_removed_at_once(engine: Engine) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.event("a", "start")
    engine.event("a", "die", 0)
    engine.event("a", "destroy")
    assert (await asyncio.wait_for(waiting, 1)).exit_code == 0


async def test_kill_from_outside_is_neither(engine: Engine) -> None:
    engine.exits.created("a")
    waiting = asyncio.create_task(engine.exits.wait("a", ""))
    engine.event("a", "start")
    engine.state("a", "exited", 137)
    engine.event("a", "die", 137)
    end = await asyncio.wait_for(waiting, 2)
    assert (end.exit_code, end.oom_killed, end.removed, end.engine_stopped) == (137, False, False, False)


async def test_an_engine_that_hangs_on_one_container_keeps_no_other_waiting(engine: Engine) -> None:
    engine.hangs_on.add("stuck")
    engine.state("stuck", "running")
    engine.state("a", "running")
    stuck = asyncio.create_task(engine.exits.wait("stuck", ""))
    other = asyncio.create_task(engine.exits.wait("a", ""))
    await asyncio.sleep(0.02)
    engine.items.put_nowait(None)  # the stream is cut: all of them are asked about when it stands again
    await asyncio.sleep(0.05)
    engine.event("a", "die", 5)
    assert (await asyncio.wait_for(other, 5)).exit_code == 5
    assert not stuck.done()
    engine.hangs_on.clear()
    engine.state("stuck", "exited", 6)  # which no event has told
    end = await asyncio.wait_for(stuck, 2)
    assert (end.exit_code, end.gap) == (6, True)


async def test_containers_that_survive_the_engine_do_not_survive_the_machine(engine: Engine) -> None:
    engine.survives, engine.boot = True, "machine/2/start"
    engine.items.put_nowait(None)
    await asyncio.sleep(0.05)
    engine.state("a", "exited", 7)
    end = await asyncio.wait_for(engine.exits.wait("a", "machine/1/start"), 1)
    assert (end.exit_code, end.engine_stopped) == (7, False), "its own end, found after a restart of the engine"
    end = await asyncio.wait_for(engine.exits.wait("a", "before/1/start"), 1)
    assert end.engine_stopped, "the machine was restarted"


async def test_subscriber_that_does_not_keep_up_is_told_to_look_again(engine: Engine) -> None:
    events = engine.exits.events()
    first = asyncio.create_task(anext(events))
    await asyncio.sleep(0.02)
    for number in range(10_050):
        engine.event(f"c{number}", "create")
    while not engine.items.empty():
        await asyncio.sleep(0.01)
    seen = [(await first).action, *[(await anext(events)).action for _ in range(40)]]
    assert "resync" in seen
    await events.aclose()

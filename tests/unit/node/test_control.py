from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import yarl

from agent_core.container_spec import ManagedSpec
from agent_core.control import SOCKET_NAME, ControlSocket
from agent_core.runtimes.base import ImageInfo, PullProgress
from agent_core.runtimes.fake import FakeProcess

if TYPE_CHECKING:
    from conftest import Parts

Client = aiohttp.ClientSession


@pytest.fixture
async def control(parts: Parts) -> AsyncIterator[ControlSocket]:
    # Deeper than the path of a Unix socket may be long; the client gets there by the descriptor, too.
    directory = parts.root / ("d" * 100) / "outrider"
    directory.mkdir(parents=True)
    control = ControlSocket(parts.containers, parts.scope, directory)
    await control.start()
    yield control
    await control.aclose(attempt_over=True)


@pytest.fixture
async def client(parts: Parts, control: ControlSocket) -> AsyncIterator[Client]:
    descriptor = os.open(parts.root / ("d" * 100) / "outrider", os.O_RDONLY)
    connector = aiohttp.UnixConnector(f"/proc/self/fd/{descriptor}/{SOCKET_NAME}")
    async with aiohttp.ClientSession("http://control", connector=connector) as session:
        yield session
    os.close(descriptor)


SPEC = {"name": "arena", "image": "game:1", "ready": {"log": "is up"}, "ports": [{"name": "game", "protocol": "udp"}]}


async def call(client: Client, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    async with client.request(method, path, json=body) as answer:
        return answer.status, await answer.json()


async def test_life_of_a_container_over_the_socket(client: Client, parts: Parts) -> None:
    status, started = await call(client, "POST", "/v1/containers", SPEC)
    assert (status, started["name"], started["adopted"]) == (200, "arena", False)
    assert (await call(client, "POST", "/v1/containers", SPEC))[1]["adopted"] is True
    _, inspected = await call(client, "GET", "/v1/containers/arena")
    assert (inspected["state"], inspected["ports"]) == ("running", started["ports"])
    assert len((await call(client, "GET", "/v1/containers"))[1]["containers"]) == 1
    async with client.get("/v1/containers/arena/logs?tail=5") as answer:
        assert b"the server is up" in await answer.read()
    wait = asyncio.create_task(call(client, "POST", "/v1/containers/arena/wait"))
    await asyncio.sleep(0.05)
    assert (await call(client, "POST", "/v1/containers/arena/stop", {"grace_s": 1}))[1]["state"] == "exited"
    assert (await asyncio.wait_for(wait, 5))[1]["exit_code"] == 0
    assert (await call(client, "DELETE", "/v1/containers/arena"))[0] == 200
    status, error = await call(client, "GET", "/v1/containers/arena")
    assert (status, error["temporary"]) == (404, False)
    assert "arena" in error["error"]


async def test_refusals_are_sentences_with_a_code(client: Client, parts: Parts) -> None:
    for body, status, code in (
        ({"name": "x"}, 400, "invalid_input"),
        ([], 400, "invalid_input"),
        (SPEC | {"capabilities": ["SYS_ADMIN"]}, 403, "not_allowed"),
        (SPEC | {"image": "gone:1"}, 404, "image_not_found"),
        (SPEC | {"network": "host"}, 403, "not_allowed"),
        (SPEC | {"replace": "yes"}, 400, "invalid_input"),
    ):
        got, error = await call(client, "POST", "/v1/containers", body)
        assert (got, error["code"]) == (status, code), error
        assert error["error"]
    parts.runtime.stop_engine()
    got, error = await call(client, "GET", "/v1/containers")
    assert (got, error["code"], error["temporary"]) == (503, "engine_unavailable", True)
    assert (await call(client, "GET", "/v1/elsewhere"))[0] == 404


async def test_socket_is_only_the_steps(client: Client, parts: Parts) -> None:
    found = os.stat(parts.root / ("d" * 100) / "outrider" / SOCKET_NAME)
    assert found.st_mode & 0o777 == 0o600
    if os.geteuid() == 0:
        assert (found.st_uid, found.st_gid) == (parts.scope.uid, parts.scope.gid)


async def test_bodies_that_are_no_json_text_get_a_sentence(client: Client, parts: Parts) -> None:
    for data, content_type in (
        (b"{}", "application/json; charset=no-such"),
        (b"\xff\xfe{", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"name": "\\ud800", "image": "game:1"}', "application/json"),
    ):
        headers = {"Content-Type": content_type}
        async with client.post("/v1/containers", data=data, headers=headers) as answer:
            assert answer.status == 400, (data[:20], await answer.text())
            assert (await answer.json())["code"] == "invalid_input"


async def test_a_name_is_never_a_path(client: Client, parts: Parts) -> None:
    for name in ("..%2F..%2Fimages%2Fgame", "%2E%2E%2Fx", "a%3Fall=1", "%20"):
        url = yarl.URL(f"http://control/v1/containers/{name}", encoded=True)
        async with client.get(url) as answer:
            assert answer.status in (400, 404), name
            assert (await answer.json())["code"]


async def test_connections_of_one_step_are_few(client: Client, parts: Parts) -> None:
    """Each costs the agent a descriptor, and it has only so many for all its steps."""
    directory = os.open(parts.root / ("d" * 100) / "outrider", os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    hostile = []
    for _ in range(300):
        with contextlib.suppress(OSError):
            hostile.append(await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{SOCKET_NAME}"))
    await asyncio.sleep(0.1)
    served = len(os.listdir("/proc/self/fd")) - before - len(hostile)
    assert served <= 64
    for _, writer in hostile:
        writer.close()
    await asyncio.sleep(0.1)
    assert (await call(client, "GET", "/v1/containers"))[0] == 200
    os.close(directory)


async def test_the_log_that_one_answer_holds_is_bounded(parts: Parts, client: Client) -> None:
    async def chatter(process: FakeProcess) -> int:
        for _ in range(40):
            process.write(b"x" * 1_000_000 + b"\n")
        process.write(b"the end\n")
        await process.signalled.wait()
        return 0

    parts.runtime.programs["chatter:1"] = chatter
    assert (await call(client, "POST", "/v1/containers", {"name": "c", "image": "chatter:1"}))[0] == 200
    async with client.get("/v1/containers/c/logs?tail=10000") as answer:
        data = await answer.read()
    assert len(data) <= 4 * 1024**2
    assert data.endswith(b"the end\n")


async def lines(client: Client, path: str, body: Any) -> list[dict[str, Any]]:
    async with client.post(path, json=body, headers={"Accept": "application/x-ndjson"}) as answer:
        assert answer.status == 200
        return [json.loads(line) for line in (await answer.read()).splitlines()]


async def test_a_program_is_run_inside_and_tells_what_it_prints(client: Client, parts: Parts) -> None:
    async def greet(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
        return 3, f"hello {args[1]}".encode()

    parts.runtime.executed["greet"] = greet
    await call(client, "POST", "/v1/containers", SPEC)
    path = "/v1/containers/arena/exec"
    wanted = {"args": ["greet", "you"], "id": "once"}
    status, answer = await call(client, "POST", path, wanted)
    assert (status, answer) == (200, {"exit_code": 3, "stdout": "hello you", "stderr": "", "truncated": False})
    told = await lines(client, path, wanted)
    assert told == [{"stdout": "hello you"}, {"result": {"exit_code": 3, "truncated": False}}]
    assert [name for name, _ in parts.runtime.calls].count("exec_start") == 1
    for body, status, code in (
        ({"args": []}, 400, "invalid_input"),
        ({"args": ["x"], "id": "a b"}, 400, "invalid_input"),
        ({"args": ["greet", "me"], "id": "once"}, 409, "id_reused"),
        ({"args": ["x"], "user": "0"}, 403, "not_allowed"),
    ):
        got, error = await call(client, "POST", path, body)
        assert (got, error["code"]) == (status, code), error

    async def endless(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
        await asyncio.sleep(60)
        return 0, b""

    parts.runtime.executed["endless"] = endless
    got, error = await call(client, "POST", path, {"args": ["endless"], "timeout_s": 0.1})
    # Not temporary: asked for by the next attempt, it would be run a second time.
    assert (got, error["code"], error["temporary"]) == (504, "exec_timeout", False)
    await call(client, "POST", "/v1/containers/arena/stop", {"grace_s": 1})
    got, error = await call(client, "POST", path, {"args": ["greet", "me"]})
    assert (got, error["code"]) == (409, "container_not_running")


async def test_a_start_tells_its_end_in_its_last_line(client: Client) -> None:
    [last] = await lines(client, "/v1/containers", SPEC)
    assert last["result"]["name"] == "arena"
    [last] = await lines(client, "/v1/containers", SPEC | {"name": "x", "image": "gone:1"})
    assert (last["status"], last["error"]["code"]) == (404, "image_not_found")


async def test_waiting_has_an_end(client: Client) -> None:
    await call(client, "POST", "/v1/containers", SPEC)
    got, error = await call(client, "POST", "/v1/containers/arena/wait", {"timeout_s": 0.1})
    assert (got, error["code"], error["temporary"]) == (504, "wait_timeout", True)


async def test_the_whole_log_is_a_stream(client: Client, parts: Parts) -> None:
    async def chatter(process: FakeProcess) -> int:
        for number in range(100):
            process.write(b"x" * 100_000 + f" {number}\n".encode())
        await process.signalled.wait()
        process.write(b"the end\n")
        return 0

    parts.runtime.programs["chatter:1"] = chatter
    await call(client, "POST", "/v1/containers", {"name": "c", "image": "chatter:1"})
    async with client.get("/v1/containers/c/logs?all=1&follow=1") as answer:
        first = await answer.content.readline()
        await call(client, "POST", "/v1/containers/c/stop", {"grace_s": 1})
        rest = await answer.content.read()
    assert len(first + rest) > 10_000_000
    assert rest.endswith(b" 99\nthe end\n")


async def test_how_the_pull_goes_on_is_told_before_the_end(client: Client, parts: Parts) -> None:
    async def slowly(image: str, *, on_progress: PullProgress | None = None) -> ImageInfo:
        assert on_progress is not None
        for done in (100, 200):
            on_progress(done, 400)
            await asyncio.sleep(0.6)  # what comes oftener than twice a second is thinned out
        parts.runtime.programs[image] = parts.runtime.programs["game:1"]
        return await parts.runtime.find_image(image)

    parts.runtime.pull_image = slowly  # type: ignore[method-assign]
    told = await lines(client, "/v1/containers", {"name": "far", "image": "far:1", "ready": {"log": "is up"}})
    assert told[0]["pull"]["done"] == 100
    assert "pulling far:1" in told[0]["pull"]["message"]
    assert told[-1]["result"]["name"] == "far"


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize("gone", [True, False])
async def test_start_that_waits_is_undone_when_the_attempt_is_over_though_it_gets_ready_just_then(
    client: Client, control: ControlSocket, parts: Parts, accept: str, gone: bool
) -> None:
    """``gone``: the program that asked has ended, and its connection with it; the start goes on all the same."""
    ready = asyncio.Event()

    async def slow(process: FakeProcess) -> int:
        await ready.wait()
        process.write(b"it is up\n")
        await process.signalled.wait()
        return 0

    parts.runtime.programs["slow:1"] = slow
    spec = {"name": "arena", "image": "slow:1", "ready": {"log": "is up"}}
    asking = asyncio.create_task(client.post("/v1/containers", json=spec, headers={"Accept": accept}))
    while not any(call[0] == "logs" for call in parts.runtime.calls):
        await asyncio.sleep(0.01)
    if gone:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await client.close()
        await asyncio.sleep(0.05)
    closing = asyncio.create_task(control.aclose(attempt_over=True))
    await asyncio.sleep(0.2)
    ready.set()
    await asyncio.wait_for(closing, 10)
    assert await parts.runtime.list() == []
    assert not (await parts.containers.start(ManagedSpec.parse(spec), parts.scope)).adopted
    for answer in await asyncio.gather(asking, return_exceptions=True):
        if isinstance(answer, aiohttp.ClientResponse):
            answer.close()

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from agent_core.control import SOCKET_NAME, ControlSocket

if TYPE_CHECKING:
    from conftest import Parts

Client = aiohttp.ClientSession


@pytest.fixture
async def client(parts: Parts) -> AsyncIterator[Client]:
    # Deeper than the path of a Unix socket may be long; the client gets there by the descriptor, too.
    directory = parts.root / ("d" * 100) / "outrider"
    directory.mkdir(parents=True)
    control = ControlSocket(parts.containers, parts.scope, directory)
    await control.start()
    descriptor = os.open(directory, os.O_RDONLY)
    connector = aiohttp.UnixConnector(f"/proc/self/fd/{descriptor}/{SOCKET_NAME}")
    async with aiohttp.ClientSession("http://control", connector=connector) as session:
        yield session
    os.close(descriptor)
    await control.aclose(attempt_over=True)


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

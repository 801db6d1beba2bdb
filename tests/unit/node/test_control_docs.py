"""What the pages for authors show of the control socket, done on one: the agent's own, with the fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from outrider_stepkit import Step

from agent_core.control import SOCKET_NAME, ControlSocket
from agent_core.runtimes.fake import FakeProcess

if TYPE_CHECKING:
    from conftest import Parts

DOCS = Path(__file__).parents[3] / "docs"
PAGES = {
    "guide": (DOCS / "step-authors.md").read_text().partition("## Managed containers")[2].partition("\n## ")[0],
    "socket": (DOCS / "control-socket.md").read_text(),
}
SNIPPETS = [
    pytest.param(language, text, id=f"{page}-{language}-{number}")
    for page, whole in PAGES.items()
    for number, (language, text) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```$", whole, re.MULTILINE | re.DOTALL))
]
STARTED = {"name": "arena-7", "image": "game/arena:3"}


@pytest.fixture
async def directory(parts: Parts, tmp_path: Path) -> AsyncIterator[Path]:
    """What an attempt finds at /outrider, on a node that has the game of the pages."""

    async def administer(process: FakeProcess, args: Sequence[str]) -> tuple[int, bytes]:
        return 0, b"done\n"

    parts.runtime.programs["game/arena:3"] = parts.runtime.programs["game:1"]
    parts.runtime.executed["arena-admin"] = administer
    directory = tmp_path / "outrider"
    directory.mkdir()
    (directory / "inputs.json").write_text("{}")
    control = ControlSocket(parts.containers, parts.scope, directory)
    await control.start()
    yield directory
    await control.aclose(attempt_over=True)


def environ(directory: Path) -> dict[str, str]:
    return {**os.environ, "OUTRIDER_DIRECTORY": str(directory), "OUTRIDER_CONTROL": str(directory / SOCKET_NAME)}


def test_there_is_a_snippet_of_each_kind() -> None:
    assert {each.values[0] for each in SNIPPETS} == {"python", "sh", "json"}
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize(("language", "text"), SNIPPETS)
async def test_snippet_does_what_the_page_says(language: str, text: str, directory: Path, parts: Parts) -> None:
    await {"python": in_python, "sh": in_shell, "json": as_json}[language](text, directory, parts)


async def in_python(text: str, directory: Path, parts: Parts) -> None:
    """The client of the step kit, which blocks."""
    step = Step.load(environ(directory), [])
    around: dict[str, Any] = {  # what the last one takes from the program that it is a part of
        "step": step, "client": step.control(), "colour": "blue", "name": "arena", "spec": {"image": "game/arena:3"},
        "params": {"check": ["arena-admin", "selftest"]},
    }  # fmt: skip
    await asyncio.to_thread(exec, text, around)
    started = around["started"]
    assert (await parts.runtime.inspect(started["id"])).state == "running"
    if "check" in around:
        assert (started["name"], around["check"]["exit_code"]) == ("arena-green", 0)
    else:
        assert json.loads((directory / "outputs").read_text()) == {"ports": started["ports"]}
        assert started["ports"].keys() == {"game"}
    assert [method for method, _ in parts.runtime.calls].count("exec_start") == text.count("client.exec(")


async def in_shell(text: str, directory: Path, parts: Parts) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    await call(directory, "POST", "/v1/containers", STARTED)
    process = await asyncio.create_subprocess_exec(
        "sh", "-euc", text, env=environ(directory), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert [each["name"] for each in json.loads(out)["containers"]] == ["arena-7"]


async def as_json(text: str, directory: Path, parts: Parts) -> None:
    """The body of an error, or of a call that runs a program."""
    shown = json.loads(text)
    if "error" in shown:
        status, body = await call(directory, "POST", "/v1/containers", {"name": "arena-7"})
        assert (status, {key: type(value) for key, value in body.items()}) == (
            400,
            {key: type(value) for key, value in shown.items()},
        )
        return
    await call(directory, "POST", "/v1/containers", STARTED)
    for _ in range(2):  # it has an id: asked for again, it is the same
        status, body = await call(directory, "POST", "/v1/containers/arena-7/exec", shown)
        assert (status, body["exit_code"], body["stdout"]) == (200, 0, "done\n")
    assert [method for method, _ in parts.runtime.calls].count("exec_start") == 1


async def call(directory: Path, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    connector = aiohttp.UnixConnector(str(directory / SOCKET_NAME))
    async with (
        aiohttp.ClientSession("http://control", connector=connector) as session,
        session.request(method, path, json=body) as answer,
    ):
        return answer.status, await answer.json()

"""examples/blue-green: a step that a stranger wrote on the control socket, its program against a real engine."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope
from agent_core.control import ControlSocket
from outrider.plugin_host import StepPlugins
from outrider.steps import StepContext

if TYPE_CHECKING:
    from conftest import Node

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "blue-green"
SERVE = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 7000)); s.listen()
while True:
    c, _ = s.accept(); c.sendall(sys.argv[1].encode()); c.close()
"""


async def deploy(node: Node, version: str, check: list[str]) -> tuple[int, dict[str, Any], str]:
    """One attempt: resolved by its plugin, its program as a process with the control socket."""
    plugin = importlib.import_module("outrider_step_bluegreen")
    [uses] = plugin.outrider_step_types()
    params = {
        "name": node.id, "image": "outrider/base:1", "args": ["python3", "-c", SERVE, version], "port": 7000,
        "check": check,
    }  # fmt: skip
    plan = uses.resolve(uses.params.model_validate(params), StepContext(run_id="r1", step="deploy"))
    assert plan.control == "containers"
    uid, gid = await node.identities.allot("object:game/a")
    scope = ContainerScope(secrets.token_hex(4), "deploy", 1, "game/a", {}, uid, gid)
    directory = node.root / scope.run_id
    directory.mkdir()
    (directory / "inputs.json").write_text(json.dumps(plan.inputs))
    control = ControlSocket(node.containers, scope, directory)
    await control.start()
    environment = {
        **os.environ,
        "OUTRIDER_DIRECTORY": str(directory),
        "OUTRIDER_CONTROL": str(directory / "control.sock"),
        "PYTHONPATH": str(ROOT / "stepkit"),
    }
    program = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLE / "program"), *plan.args, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, said = await program.communicate()
    await control.aclose(attempt_over=True)
    outputs: dict[str, Any] = {}
    if (directory / "outputs").exists():
        for line in (directory / "outputs").read_text().splitlines():
            outputs |= json.loads(line)
    return program.returncode or 0, outputs, said.decode()


def ask(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        return connection.recv(100).decode()


async def test_the_new_version_takes_over_once_it_is_proven_and_the_old_one_goes_on_if_it_is_not(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    code, first, said = await deploy(node, "one", ["true"])
    assert code == 0, said
    assert first["colour"] == "blue"
    assert await asyncio.to_thread(ask, first["port"]) == "one"

    code, _, said = await deploy(node, "broken", ["false"])
    assert code == 1
    assert f"{node.id}-green does not pass its check" in said
    assert [info.name for info in await node.containers.list() if info.name.startswith(node.id)] == [f"{node.id}-blue"]
    assert await asyncio.to_thread(ask, first["port"]) == "one"

    code, second, said = await deploy(node, "two", ["python3", "-c", "pass"])
    assert code == 0, said
    assert (second["colour"], second["container"]) == ("green", f"{node.id}-green")
    assert await asyncio.to_thread(ask, second["port"]) == "two"
    assert [info.name for info in await node.containers.list() if info.name.startswith(node.id)] == [f"{node.id}-green"]


def test_an_agent_would_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    plugin = importlib.import_module("outrider_step_bluegreen")
    plugins = StepPlugins()
    plugins.register(plugin, name="bluegreen", distribution="outrider-step-bluegreen", version="0.1.0")
    [report] = plugins.plugins
    assert report.ok, report
    assert list(plugins.step_types) == ["bluegreen.deploy"]

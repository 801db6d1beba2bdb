"""The whole agent against the real server over TLS; the engine is the fake one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_core.agent import Agent
from agent_core.config import AgentConfig
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.status import read_status
from outrider.errors import Conflict, InvalidInput, Unauthenticated
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE
from tests.integration.server_rig import Rig, served

TIMEOUT = 10.0
ENDED = (types.RUN_STATE_SUCCEEDED, types.RUN_STATE_FAILED, types.RUN_STATE_CANCELLED, types.RUN_STATE_UNKNOWN)


async def program(process: FakeProcess) -> int:
    process.write(f"{process.spec.args[0]} {process.spec.env.get('KEY', '')}\n".encode())
    directory = next(Path(mount.source) for mount in process.spec.mounts if mount.target == "/outrider")
    (directory / "outputs").write_text('{"port": 4711}\n')
    if process.spec.args[0] == "slow":
        await asyncio.sleep(1.5)
    return 0


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": hold})


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=1) as rig:
        yield rig


@asynccontextmanager
async def agent_of(
    server: Rig, tmp_path: Path, token: str, runtime: FakeRuntime, **config: Any
) -> AsyncIterator[Agent]:
    policy = tmp_path / "policy.yaml"
    policy.write_text("warm_none: 0\nnetworks: {}\n")
    agent = Agent(
        AgentConfig(
            node_id="n1",
            server=server.address,
            ca_file=server.config.ca_file,
            token=token,
            state_dir=tmp_path / "agent",
            plugins=["shell"],
            policy_file=policy,
            **config,
        ),
        runtime=runtime,
    )
    task = asyncio.create_task(agent.run())
    ready = asyncio.create_task(agent.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    try:
        if task.done():
            task.result()
        yield agent
    finally:
        agent.stop()
        await task


async def add_node(server: Rig) -> str:
    async with server.operator() as control:
        answer = await control.AddNode(
            cpb.AddNodeRequest(request_id=server.request_id(), node_id="n1"), timeout=TIMEOUT
        )
        return str(answer.token)


async def online(server: Rig) -> types.Node:
    async with server.operator() as control, asyncio.timeout(TIMEOUT):
        while True:
            node = await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)
            if node.online and node.brief.engine_ok:
                return node
            await asyncio.sleep(0.05)


async def execute(server: Rig, document: dict[str, Any], **fields: Any) -> types.Run:
    async with server.operator() as control:
        run: types.Run = await control.ExecutePipeline(
            cpb.ExecutePipelineRequest(
                request_id=server.request_id(), pipeline_yaml=json.dumps(document).encode(), node_id="n1", **fields
            ),
            timeout=TIMEOUT,
        )
        return run


async def ended(server: Rig, run_id: str) -> types.Run:
    async with server.operator() as control, asyncio.timeout(30):
        while True:
            run: types.Run = await control.GetRun(cpb.GetRunRequest(run_id=run_id), timeout=TIMEOUT)
            if run.state in ENDED:
                return run
            await asyncio.sleep(0.05)


def steps(*scripts: str, **more: Any) -> dict[str, Any]:
    items = [
        {"name": f"s{number}", "uses": "test.shell", "with": {"script": script}}
        for number, script in enumerate(scripts)
    ]
    return {"name": "p", "steps": items, **more}


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's step types in a distribution of their own, as an installer would leave it."""
    site = tmp_path / "site"
    info = site / "test_shell-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "outrider_test_shell.py").write_text(
        "from tests.agent_rig import ShellPlugin\noutrider_step_types = ShellPlugin().outrider_step_types\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-shell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[outrider.steps]\nshell = outrider_test_shell\n")
    monkeypatch.syspath_prepend(site)


async def test_a_run_goes_from_the_operator_to_the_node_and_back(
    server: Rig, tmp_path: Path, runtime: FakeRuntime
) -> None:
    token = await add_node(server)
    async with agent_of(server, tmp_path, token, runtime, labels={"rack": "r7"}):
        node = await online(server)
        assert node.labels["rack"] == "r7"
        assert [each.name for each in node.step_types if each.name == "test.shell"]
        async with server.operator() as control:
            await control.SetEnvSet(
                cpb.SetEnvSetRequest(request_id=server.request_id(), name="store", values={"KEY": "hunter2-hunter2"}),
                timeout=TIMEOUT,
            )
            await control.SetObject(
                cpb.SetObjectRequest(
                    request_id=server.request_id(), ref=types.ObjectRef(kind="game", name="a"), attributes_json=b"{}"
                ),
                timeout=TIMEOUT,
            )
        document = steps("one", "two", envs=[{"set": "store"}])
        document["steps"][1]["envs"] = {"KEY": "store.KEY"}
        document["writeback"] = [{"attribute": "port", "value": "${{ steps.s0.outputs.port }}"}]
        run = await execute(server, document, object=types.ObjectRef(kind="game", name="a"))
        run = await ended(server, run.run_id)
        assert run.state == types.RUN_STATE_SUCCEEDED, run.failure
        async with server.operator() as control:
            made = await control.GetObject(
                cpb.GetObjectRequest(ref=types.ObjectRef(kind="game", name="a")), timeout=TIMEOUT
            )
            assert json.loads(made.status_json) == {"port": 4711}
            async with asyncio.timeout(TIMEOUT):
                log = b""
                while log.count(b"\n") < 2:
                    stream = control.StreamRunLogs(cpb.StreamRunLogsRequest(run_id=run.run_id), timeout=TIMEOUT)
                    log = b"".join([chunk.data async for chunk in stream])
            assert b"one" in log
            assert b"hunter2" not in log


async def test_a_run_outlives_the_server_and_the_agent(server: Rig, tmp_path: Path, runtime: FakeRuntime) -> None:
    token = await add_node(server)
    async with agent_of(server, tmp_path, token, runtime):
        await online(server)
        run = await execute(server, steps("slow", "slow"))
        await asyncio.sleep(0.3)
        await server.restart()
    async with agent_of(server, tmp_path, token, runtime):
        run = await ended(server, run.run_id)
        assert run.state == types.RUN_STATE_SUCCEEDED, run.failure
        assert [step.attempt for step in run.steps] == [1, 1]
        creates = [name for kind, name in runtime.calls if kind == "create" and run.run_id in name]
        assert len(creates) == len(set(creates)) == 2


async def test_volumes_of_an_object_go_with_it_though_its_node_was_away_and_kept_ones_stay(
    server: Rig, tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_core.removed_objects.INTERVAL_S", 0.1)
    token, refs = await add_node(server), {name: types.ObjectRef(kind="game", name=name) for name in ("a", "b")}
    async with server.operator() as control:
        for ref in refs.values():
            request = cpb.SetObjectRequest(request_id=server.request_id(), ref=ref, attributes_json=b"{}")
            await control.SetObject(request, timeout=TIMEOUT)
    volumes = {"saves": {"scope": "object"}, "kept": {"scope": "object", "keep": True}}
    async with agent_of(server, tmp_path, token, runtime):
        await online(server)
        for ref in refs.values():
            run = await ended(server, (await execute(server, steps("one", volumes=volumes), object=ref)).run_id)
            assert run.state == types.RUN_STATE_SUCCEEDED, run.failure
    async with server.operator() as control:
        request = cpb.RemoveObjectRequest(request_id=server.request_id(), ref=refs["a"])
        await control.RemoveObject(request, timeout=TIMEOUT)
    await server.restart()
    root = tmp_path / "agent" / "volumes" / "object" / "game"
    assert (root / "a" / "saves").exists()
    async with agent_of(server, tmp_path, token, runtime), asyncio.timeout(TIMEOUT):
        while (root / "a" / "saves").exists():
            await asyncio.sleep(0.05)
    assert [(root / path).exists() for path in ("a/kept", "b/saves", "b/kept")] == [True] * 3


@pytest.mark.parametrize("engine", ["there", "away"])
async def test_a_refused_token_ends_an_agent_that_takes_care_of_nothing(
    server: Rig, tmp_path: Path, runtime: FakeRuntime, engine: str
) -> None:
    await add_node(server)
    if engine == "away":
        runtime.stop_engine()  # which is an event that waits in the outbox
    with pytest.raises(Unauthenticated):
        async with agent_of(server, tmp_path, "wrong-token", runtime) as agent, asyncio.timeout(TIMEOUT):
            await agent._stopping.wait()


async def test_the_status_socket_tells_what_is(server: Rig, tmp_path: Path, runtime: FakeRuntime) -> None:
    token = await add_node(server)
    async with agent_of(server, tmp_path, token, runtime):
        await online(server)
        runtime.stop_engine()
        async with asyncio.timeout(25):
            while (status := await asyncio.to_thread(read_status, tmp_path / "agent"))["engine"]["ok"]:
                await execute(server, steps("one")) if not status["runs"] else None
                await asyncio.sleep(0.1)
        assert status["server"]["connected"]
        assert status["engine"]["error"]
        assert token not in json.dumps(status)
        runtime.start_engine()


async def test_a_second_agent_on_the_state_directory_refuses_to_start(
    server: Rig, tmp_path: Path, runtime: FakeRuntime
) -> None:
    token = await add_node(server)
    async with agent_of(server, tmp_path, token, runtime):
        with pytest.raises(Conflict, match="another agent"):
            async with agent_of(server, tmp_path, token, runtime):
                raise AssertionError("it started")


async def test_a_configuration_that_cannot_work_is_told_at_once(tmp_path: Path) -> None:
    config = AgentConfig(node_id="n1", token_file=tmp_path / "none", state_dir=tmp_path / "s")
    with pytest.raises(InvalidInput, match="token"):
        await Agent(config).run()
    config = AgentConfig(node_id="n1", token="t", ca_file=tmp_path / "none", state_dir=tmp_path / "s")
    with pytest.raises(InvalidInput, match="CA"):
        await Agent(config).run()
    config = AgentConfig(node_id="n1", token="t", runtime="nosuch", state_dir=tmp_path / "s")
    with pytest.raises(InvalidInput, match="nosuch"):
        await Agent(config).run()

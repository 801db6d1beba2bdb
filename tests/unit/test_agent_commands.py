"""Commands that come again, as the agent takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_core.commands import Commands
from agent_core.container_spec import ContainerScope, ManagedSpec
from agent_core.policy import NetworkClass, NodePolicy
from agent_core.remote import RemoteContainers
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.transitions import Transition
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import duration
from tests.agent_rig import BASE_IMAGE, Rig, rig

TEXT = json.dumps({"name": "p", "steps": [{"name": "a", "uses": "test.shell"}]})


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


def commands(agent: Rig, send: Callable[[pb.CommandResult], None] = lambda _: None, *, age_s: float = 0.0) -> Commands:
    services = agent.services
    remote = RemoteContainers(services.containers)
    return Commands(
        services.state,
        agent.runs,
        remote,
        services.background,
        cancel_grace_s=1,
        send_result=send,
        stub=lambda: None,
        age_s=lambda _command: age_s,
    )


@pytest.mark.parametrize(("lease", "code"), [("lease-1", ""), ("lease-2", "lease_mismatch")])
async def test_a_run_that_is_written_in_another_way_is_the_same_run_under_its_lease(
    tmp_path: Path, lease: str, code: str
) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: hold})) as agent:
        run_id = await agent.start(TEXT)
        held = agent.services.state.find(run_id)
        assert held is not None
        held.command.lease_id = lease
        ack = await commands(agent).handle(
            pb.Command(command_id=f"c-{run_id}", digest=b"another", run_pipeline=held.command)
        )
        assert (ack.duplicate, ack.refused.code) == (not code, code)
        assert run_id in agent.runs.active


async def test_another_command_under_the_same_id_is_refused(tmp_path: Path) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: hold})) as agent:
        run_id = await agent.start(TEXT)
        cancel = pb.CancelRun(run_id=run_id)
        ack = await commands(agent).handle(pb.Command(command_id=f"c-{run_id}", digest=b"another", cancel_run=cancel))
        assert ack.refused.code == "digest_mismatch"
        assert run_id in agent.runs.active


async def test_a_restart_that_a_killed_agent_had_begun_is_not_done_a_second_time(tmp_path: Path) -> None:
    runtime = FakeRuntime({BASE_IMAGE: hold, "game:1": hold}, images=set())
    policy = NodePolicy(warm_none=0, networks={"egress": NetworkClass(network="outrider", warm=0)})
    async with rig(tmp_path, runtime, policy=policy) as agent:
        services = agent.services
        started = await services.containers.start(
            ManagedSpec.parse({"name": "game", "image": "game:1"}), ContainerScope("r1", "start", 1, None, {}, 1, 1)
        )
        restart = pb.ContainerCommand(action=types.CONTAINER_ACTION_RESTART, name="game")
        command = pb.Command(command_id="op-1", digest=b"d", container=restart)
        results: list[pb.CommandResult] = []
        await commands(agent, results.append).handle(command)
        await agent.until(lambda: results)
        since = runtime._containers[started.id].info.started_at
        # As it is left by an agent that was killed before it could say what came of it.
        await services.state.journal.execute(Transition.COMMAND_ANSWERED, "UPDATE commands SET result = NULL")
        await commands(agent, results.append).handle(command)
        await agent.until(lambda: len(results) == 2)
        assert not results[1].HasField("failure")
        assert runtime._containers[started.id].info.started_at == since


@pytest.mark.parametrize(("age_s", "late"), [(29.0, False), (31.0, True)])
async def test_a_container_command_that_comes_too_late_is_not_carried_out(
    tmp_path: Path, age_s: float, late: bool
) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: hold})) as agent:
        results: list[pb.CommandResult] = []
        command = pb.Command(
            command_id="op-1",
            digest=b"d",
            deadline=duration(30.0),
            container=pb.ContainerCommand(action=types.CONTAINER_ACTION_RESTART, name="no-such"),
        )
        ack = await commands(agent, results.append, age_s=age_s).handle(command)
        assert ack.refused.code == ("command_late" if late else "")
        # Nothing is remembered of it: asked again in time, it is done.
        assert (await agent.services.state.command("op-1") is None) == late
        if not late:
            await agent.until(lambda: results)


async def test_a_cancellation_is_taken_on_however_late_it_comes(tmp_path: Path) -> None:
    async with rig(tmp_path, FakeRuntime({BASE_IMAGE: hold})) as agent:
        run_id = await agent.start(TEXT)
        ack = await commands(agent, age_s=9e9).handle(
            pb.Command(command_id="x-1", digest=b"d", cancel_run=pb.CancelRun(run_id=run_id))
        )
        assert not ack.HasField("refused")

"""Roles of nodes through a real server: the server's word, the node's stand, and what a node is refused for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import Conflict, InvalidInput, NotFound, PermissionDenied
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from tests.integration.server_rig import ECHO, TIMEOUT, FakeAgent, Rig, add_node, refused, served

Control = cgrpc.ControlServiceStub
HASH = "--hash=sha256:" + "ab" * 32
TEST = tpb.Plugin(name="test", distribution="outrider-step-test", version="1.0", ok=True, step_types=["test.echo"])
PIPELINE = b"name: p\nsteps:\n  - {name: say, uses: test.echo, with: {text: hello}}\n"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=30) as rig:
        yield rig


def role_of(name: str = "game", test: str = "1.0", **plugins: str) -> tpb.NodeRole:
    wanted = {"outrider-step-test": ">=1,<2"} | plugins
    lock = f"outrider==0.1.0 {HASH}\noutrider-step-test=={test} {HASH}\n"
    lock += "".join(f"{each}==3 {HASH}\n" for each in plugins)
    return tpb.NodeRole(
        name=name,
        agent=">=0.1",
        plugins=[tpb.RolePlugin(distribution=each, versions=versions) for each, versions in wanted.items()],
        lock=lock.encode(),
    )


async def put(rig: Rig, control: Control, role: tpb.NodeRole, **fields: Any) -> tpb.NodeRole:
    request = cpb.SetNodeRoleRequest(request_id=rig.request_id(), role=role, **fields)
    return await control.SetNodeRole(request, timeout=TIMEOUT)


async def assign(rig: Rig, control: Control, role: str, node: str = "n1", **fields: Any) -> tpb.Node:
    request = cpb.AssignNodeRoleRequest(request_id=rig.request_id(), node_id=node, role=role, **fields)
    return await control.AssignNodeRole(request, timeout=TIMEOUT)


async def node_of(control: Control, node: str = "n1") -> tpb.Node:
    return await control.GetNode(cpb.GetNodeRequest(node_id=node), timeout=TIMEOUT)


async def problems(rig: Rig, control: Control, node: str = "n1") -> str:
    request = cpb.ExecutePipelineRequest(request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id=node)
    error = await refused(control.ExecutePipeline(request, timeout=TIMEOUT))
    assert isinstance(error, InvalidInput)
    return str(error)


async def started(
    rig: Rig, name: str = "n1", *, step_types: Sequence[tpb.StepTypeInfo] | bool = True, **fields: Any
) -> FakeAgent:
    agent = await add_node(rig, name)
    agent.step_types = list(step_types) if not isinstance(step_types, bool) else [ECHO] * step_types
    agent.version = "0.1.0"
    for field, value in fields.items():
        setattr(agent, field, value)
    return await agent.start()


async def test_a_role_has_a_version_and_a_stale_change_is_refused(rig: Rig) -> None:
    async with rig.operator() as control:
        assert (await put(rig, control, role_of(), expected_version=0)).version == 1
        assert (await put(rig, control, role_of())).version == 1  # the same again is no change
        assert (await put(rig, control, role_of(test="1.1"), expected_version=1)).version == 2
        stale = await refused(put(rig, control, role_of(), expected_version=1))
        assert isinstance(stale, Conflict)
        assert "node role game has version 2, not 1" in str(stale)
        shown = await control.GetNodeRole(cpb.GetNodeRoleRequest(name="game"), timeout=TIMEOUT)
        assert b"outrider-step-test==1.1" in shown.lock
        events = [entry.verb for entry in (await control.ListAudit(cpb.ListAuditRequest(), timeout=TIMEOUT)).entries]
        assert events.count("update") == 2


@pytest.mark.parametrize(
    ("role", "said"),
    [
        (role_of(test="2.0"), "the lock has outrider-step-test 2.0, and the role wants >=1,<2"),
        (tpb.NodeRole(name="game"), "comes without a lock"),
        (tpb.NodeRole(name="game", lock=b"outrider==0.1\n"), "has no hash"),
        (tpb.NodeRole(name="Game", lock=b"x"), "name: String should match"),
        (tpb.NodeRole(name="game", lock=f"other==1 {HASH}".encode()), "the lock has no outrider"),
        (tpb.NodeRole(name="g", plugins=[tpb.RolePlugin(distribution="a")] * 2), "names a plugin twice"),
    ],
)
async def test_a_role_that_no_node_could_have_is_refused(rig: Rig, role: tpb.NodeRole, said: str) -> None:
    async with rig.operator() as control:
        error = await refused(put(rig, control, role))
        assert isinstance(error, InvalidInput | NotFound)
        assert said in str(error)


async def test_a_node_gets_its_role_from_the_server_and_asks_for_it_with_its_own_token(rig: Rig) -> None:
    agent = await started(rig, plugins=[TEST])
    asked = await agent.stub.GetOwnRole(npb.GetOwnRoleRequest(), timeout=TIMEOUT)
    assert (asked.role, asked.HasField("definition")) == ("", False)
    async with rig.operator() as control:
        unknown = await refused(assign(rig, control, "gmae"))
        assert isinstance(unknown, NotFound)
        await put(rig, control, role_of())
        node = await assign(rig, control, "game", expected_version=1)
        assert (node.role, node.version, node.role_state.drift, node.role_state.problem) == ("game", 2, False, "")
        stale = await refused(assign(rig, control, "", expected_version=1))
        assert isinstance(stale, Conflict)
        assert "node n1 has version 2, not 1" in str(stale)
        in_use = await refused(
            control.RemoveNodeRole(cpb.RemoveNodeRoleRequest(request_id="rm", name="game"), timeout=TIMEOUT)
        )
        assert isinstance(in_use, Conflict)
        assert "n1" in str(in_use)
    asked = await agent.stub.GetOwnRole(npb.GetOwnRoleRequest(), timeout=TIMEOUT)
    assert asked.role == asked.definition.name == "game"
    assert b"outrider-step-test==1.0" in asked.definition.lock
    async with rig.operator(agent.token) as control:
        assert isinstance(await refused(put(rig, control, role_of())), PermissionDenied)
    await agent.stop()


async def test_the_server_shows_what_a_node_should_have_what_it_has_and_the_difference(rig: Rig) -> None:
    other = tpb.Plugin(name="other", distribution="outrider-step-other", version="5", ok=True)
    environment = tpb.Environment(name="game-1-ab", role="game", refused="game-2-cd", refused_reason="it ended")
    agent = await started(rig, plugins=[TEST, other], environment=environment)
    async with rig.operator() as control:
        await put(rig, control, role_of(test="1.4", **{"outrider-step-s3": ""}))
        await assign(rig, control, "game")
        for node in (
            await node_of(control),
            (await control.ListNodes(cpb.ListNodesRequest(), timeout=TIMEOUT)).nodes[0],
        ):
            state = node.role_state
            stands = {each.distribution: (each.wanted, each.locked, each.actual, each.drift) for each in state.plugins}
            assert stands == {
                "outrider": (">=0.1", "0.1.0", "0.1.0", ""),
                "outrider-step-test": (">=1,<2", "1.4", "1.0", "lock"),
                "outrider-step-s3": ("", "3", "", "missing"),
                "outrider-step-other": ("", "", "5", "extra"),
            }
            assert state.drift
            assert "outrider-step-s3 is missing" in state.problem
            assert "run `outrider agent plugins sync`" in state.problem
            assert "the last try was taken back: it ended" in state.problem
            assert node.environment == environment
    await agent.stop()


async def test_a_plugin_of_the_role_that_is_disabled_or_half_broken_is_drift(rig: Rig) -> None:
    off = tpb.Plugin(
        name="test", distribution="outrider-step-test", version="1.0", state="disabled", notes=["it is named"]
    )
    broken = tpb.Plugin(name="a", distribution="outrider-step-test", version="1.0", state="error", error="no module x")
    agents = [await started(rig, plugins=[off]), await started(rig, "n2", plugins=[broken, TEST])]
    async with rig.operator() as control:
        await put(rig, control, role_of())
        state = (await assign(rig, control, "game")).role_state
        assert [each.drift for each in state.plugins] == ["", "disabled"]
        assert state.drift
        assert state.problem == (
            "outrider-step-test 1.0 is there and disabled (it is named): "
            "enable it in the agent's settings there, or take it out of the role"
        )
        state = (await assign(rig, control, "game", "n2")).role_state
        assert [each.drift for each in state.plugins] == ["", "broken"]
        assert "outrider-step-test 1.0 can't be used: no module x: on the node, run" in state.problem
    for agent in agents:
        await agent.stop()


async def test_a_node_without_a_role_shows_what_it_has(rig: Rig) -> None:
    agent = await started(rig, plugins=[TEST])
    async with rig.operator() as control:
        state = (await node_of(control)).role_state
        assert (state.role, state.drift, state.problem) == ("", False, "")
        assert [(each.distribution, each.actual, each.wanted, each.drift) for each in state.plugins] == [
            ("outrider", "0.1.0", "", ""),
            ("outrider-step-test", "1.0", "", ""),
        ]
    await agent.stop()


async def test_a_change_of_the_lock_alone_is_drift_of_an_environment_that_was_made_from_a_lock(rig: Rig) -> None:
    async with rig.operator() as control:
        made = await put(rig, control, role_of())
        environment = tpb.Environment(name="game-ab", role="game", role_version=1, lock_sha256=made.lock_sha256)
        agent = await started(rig, plugins=[TEST], environment=environment)
        assert not (await assign(rig, control, "game")).role_state.drift
        later = role_of()
        later.description = "the same in other words"
        await put(rig, control, later)
        assert not (await node_of(control)).role_state.drift
        later.lock += f"boto3==1.0 {HASH}\n".encode()
        await put(rig, control, later)
        state = (await node_of(control)).role_state
        assert state.drift
        assert "made from the lock of version 1 of role game, and there is a later one" in state.problem
    await agent.stop()


async def test_a_run_that_a_node_can_not_do_is_refused_with_the_reason_and_the_fix(rig: Rig) -> None:
    broken = tpb.Plugin(name="test", distribution="outrider-step-test", version="1.0", error="no module x; reinstall")
    off = tpb.Plugin(
        name="test", distribution="outrider-step-test", version="1.0", state="disabled", notes=["it is named"]
    )
    agents = [
        await started(rig, step_types=False),
        await started(rig, "n2", step_types=False, plugins=[broken]),
        await started(rig, "n3", plugins=[TEST]),
        await started(rig, "n4", step_types=False, plugins=[off]),
    ]
    async with rig.operator() as control:
        await put(rig, control, role_of())
        lean = tpb.NodeRole(name="lean", lock=f"outrider==0.1.0 {HASH}".encode())
        await put(rig, control, lean)
        await assign(rig, control, "game")
        said = await problems(rig, control)
        assert "node n1 has no step type test.echo (it comes from outrider-step-test (>=1,<2), which role game" in said
        assert "run `outrider agent plugins sync` there" in said
        await assign(rig, control, "lean")
        said = await problems(rig, control)
        assert "which role lean does not have: add it there" in said
        assert "it can run on n3" in said
        assert "outrider-step-test 1.0 is there and can't be used: no module x; reinstall" in await problems(
            rig, control, "n2"
        )
        assert "outrider-step-test 1.0 is there and disabled: it is named" in await problems(rig, control, "n4")
        run = await control.ExecutePipeline(
            cpb.ExecutePipelineRequest(request_id="ok", pipeline_yaml=PIPELINE, node_id="n3"), timeout=TIMEOUT
        )
        assert run.run_id
    for agent in agents:
        await agent.stop()


async def test_a_strangers_step_type_is_refused_with_where_it_comes_from(rig: Rig) -> None:
    other = tpb.Plugin(
        name="zz", distribution="acme-steps", version="1.0", state="error", error="no module x; reinstall"
    )
    torn = tpb.Plugin(name="", distribution="torn-1.0", state="error", error="its metadata is torn")
    older = tpb.Plugin(name="test", distribution="outrider-step-test", version="0.9", ok=True, step_types=["test.old"])
    old = tpb.StepTypeInfo(name="test.old", plugin="test", distribution="outrider-step-test", version="0.9")
    agents = [
        await started(rig, step_types=False),
        await started(rig, "n2", step_types=False, plugins=[other, torn]),
    ]
    async with rig.operator() as control:
        # Nobody has it: what is known is what the role has, what is broken on the node, and which version is there.
        assert "no step plugin is installed there" in await problems(rig, control)
        await put(rig, control, role_of())
        await assign(rig, control, "game")
        assert (
            "it comes from outrider-step-test (>=1,<2), which role game has and the node has not yet: "
            "run `outrider agent plugins sync` there"
        ) in await problems(rig, control)
        named = tpb.NodeRole(name="named", plugins=[tpb.RolePlugin(distribution="acme-test-things")])
        named.lock = f"outrider==0.1.0 {HASH}\nacme-test-things==1 {HASH}\n".encode()
        await put(rig, control, named)
        await assign(rig, control, "named")
        said = await problems(rig, control)
        assert "it may come from acme-test-things, which role named has and the node has not yet" in said
        assert (
            "it may come from what can't be used there: acme-steps 1.0: no module x; reinstall; "
            "torn-1.0: its metadata is torn"
        ) in await problems(rig, control, "n2")
        agents.append(await started(rig, "n3", step_types=[old], plugins=[older]))
        await assign(rig, control, "game", "n3")
        said = await problems(rig, control, "n3")
        assert "it is not in outrider-step-test 0.9, which the node has; role game has 1.0: run" in said
        # Some node has it.
        agents.append(await started(rig, "n4", plugins=[TEST]))
        await assign(rig, control, "")
        said = await problems(rig, control)
        assert "it comes from outrider-step-test, which is to be installed there: give the node a role" in said
        assert "it can run on n4" in said
        await assign(rig, control, "", "n3")
        said = await problems(rig, control, "n3")
        assert "it is not in outrider-step-test 0.9, which the node has; it is on n4 (1): let a role" in said
    for agent in agents:
        await agent.stop()


async def test_a_role_that_was_there_before_roles_were_defined_shows_as_drift(rig: Rig) -> None:
    async with rig.operator() as control:
        request = cpb.AddNodeRequest(request_id="a", node_id="n9", role="nowhere")
        assert isinstance(await refused(control.AddNode(request, timeout=TIMEOUT)), NotFound)
        await put(rig, control, role_of())
        request = cpb.AddNodeRequest(request_id="b", node_id="n9", role="game")
        added = await control.AddNode(request, timeout=TIMEOUT)
        assert added.node.role == "game"
        assert "its agent has never connected" in (await node_of(control, "n9")).role_state.problem

"""Runs through a real server: accepted, sent, reported, cancelled, settled after losses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from outrider import wire
from outrider.errors import Conflict, InvalidInput, NotFound, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from tests.integration.server_rig import PIPELINE, TIMEOUT, FakeAgent, Rig, add_node, refused, step

SUCCEEDED = tpb.RUN_STATE_SUCCEEDED


async def execute(rig: Rig, control: cgrpc.ControlServiceStub, **fields: Any) -> tpb.Run:
    request = cpb.ExecutePipelineRequest(
        **({"request_id": rig.request_id(), "pipeline_yaml": PIPELINE, "node_id": "n1"} | fields)
    )
    return await control.ExecutePipeline(request, timeout=TIMEOUT)


async def run_of(control: cgrpc.ControlServiceStub, run_id: str) -> tpb.Run:
    return await control.GetRun(cpb.GetRunRequest(run_id=run_id), timeout=TIMEOUT)


async def until(control: cgrpc.ControlServiceStub, run_id: str, state: int) -> tpb.Run:
    async with asyncio.timeout(TIMEOUT):
        while (run := await run_of(control, run_id)).state != state:
            await asyncio.sleep(0.02)
    return run


async def test_run_is_sent_reported_and_watched_to_its_end(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    run = await execute(rig, control)
    assert run.state == tpb.RUN_STATE_QUEUED
    assert [s.name for s in run.steps] == ["say"]
    seen = []

    async def watch() -> None:
        async for state in control.WatchRun(cpb.WatchRunRequest(run_id=run.run_id), timeout=TIMEOUT):
            seen.append(state)

    watching = asyncio.create_task(watch())
    [order] = await agent.runs()
    assert order.pipeline_yaml == PIPELINE
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING))
    progress = tpb.Progress(done=3, total=9, unit="bytes")
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING, progress=progress), sequence=0)
    await asyncio.sleep(0.3)
    last = await agent.report(
        order, SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED, outputs_json=b'{"said":"hello"}', exit_code=0)
    )
    await watching
    assert seen[-1].state == SUCCEEDED
    assert any(s.steps[0].progress.done == 3 for s in seen)
    assert seen[-1].steps[0].outputs_json == b'{"said":"hello"}'
    assert seen[-1].steps[0].uses == "test.echo"
    await agent.until(lambda: last in agent.acks)
    assert seen[-1].HasField("finished_at")


async def test_same_key_gives_the_same_run_and_another_request_under_it_is_refused(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    first = await execute(rig, control, key="deploy-1")
    again = await execute(rig, control, key="deploy-1")
    assert again.run_id == first.run_id
    error = await refused(execute(rig, control, key="deploy-1", timeout=wire.duration(60)))
    assert isinstance(error, Conflict)
    assert first.run_id in str(error)
    assert len((await control.ListRuns(cpb.ListRunsRequest(), timeout=TIMEOUT)).runs) == 1
    await asyncio.sleep(0.2)
    assert len(await agent.runs()) == 1


async def test_unconfirmed_run_is_sent_again_with_the_same_command(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    agent.acknowledges = False
    run = await execute(rig, control)
    await agent.runs()
    await agent.cut()
    assert (await run_of(control, run.run_id)).state == tpb.RUN_STATE_QUEUED
    agent.acknowledges = True
    await agent.connect()
    await agent.runs(2)
    assert agent.commands[0] == agent.commands[1]
    await until(control, run.run_id, tpb.RUN_STATE_DISPATCHED)


async def test_server_that_restarts_still_dispatches_cancels_and_records(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    run = await execute(rig, control)
    [order] = await agent.runs()
    await until(control, run.run_id, tpb.RUN_STATE_DISPATCHED)
    await rig.restart()
    await agent.until(lambda: agent.error is not None)
    assert wire.from_rpc_error(agent.error).code == "server_stopping"  # type: ignore[arg-type]
    async with rig.operator() as control:
        await control.CancelRun(
            cpb.CancelRunRequest(request_id="c1", run_id=run.run_id, reason="enough"), timeout=TIMEOUT
        )
        assert agent.session is not None
        resumed = await agent.register(agent.session.session_id)
        assert resumed.resumed
        assert resumed.epoch == 1
        agent.held = [tpb.HeldRun(run_id=run.run_id, lease_id=run.lease_id, state=tpb.RUN_STATE_RUNNING)]
        await agent.connect()
        [cancel] = await agent.cancels()
        assert cancel.reason == "enough"
        await agent.report(order, tpb.RUN_STATE_CANCELLED, step(tpb.STEP_STATE_CANCELLED))
        await until(control, run.run_id, tpb.RUN_STATE_CANCELLED)


async def test_run_that_no_node_has_is_cancelled_at_once(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    await agent.cut()
    await offline(control)
    run = await execute(rig, control, allow_offline=True)
    assert "offline since" in (await run_of(control, run.run_id)).reason
    cancelled = await control.CancelRun(cpb.CancelRunRequest(request_id="c", run_id=run.run_id), timeout=TIMEOUT)
    assert cancelled.state == tpb.RUN_STATE_CANCELLED
    await agent.connect()
    await asyncio.sleep(0.2)
    assert not agent.commands


async def test_run_accepted_for_an_absent_node_starts_when_it_returns(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    await agent.cut()
    await offline(control)
    error = await refused(execute(rig, control))
    assert isinstance(error, Unavailable)
    assert error.code == "node_offline"
    assert "offline since 20" in error.message
    run = await execute(rig, control, allow_offline=True)
    await agent.connect()
    assert [order.run_id for order in await agent.runs()] == [run.run_id]


async def test_nothing_is_sent_before_the_node_says_what_it_holds(rig: Rig, control: cgrpc.ControlServiceStub) -> None:
    agent = await add_node(rig)
    await agent.register()
    await agent.connect(report=False)
    await online(control)
    await execute(rig, control)
    await asyncio.sleep(0.3)
    assert not agent.commands
    await agent.full_report()
    await agent.runs()
    await agent.stop()


async def test_one_run_at_a_time_per_object(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent) -> None:
    ref = await make_object(rig, control)
    first = await execute(rig, control, object=ref)
    second = await execute(rig, control, object=ref)
    error = await refused(execute(rig, control, object=ref, refuse_if_busy=True))
    assert error.code == "object_busy"
    assert first.run_id in error.message
    [order] = await agent.runs()
    assert order.run_id == first.run_id
    assert order.object.attributes_json == b'{"slots":16}'
    async with asyncio.timeout(TIMEOUT):
        while (await run_of(control, second.run_id)).reason != f"waits for run {first.run_id} of game/arena":
            await asyncio.sleep(0.02)
    await agent.report(order, SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    assert (await agent.runs(2))[1].run_id == second.run_id


async def test_result_under_another_lease_is_not_recorded_and_acknowledged(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    run = await execute(rig, control)
    [order] = await agent.runs()
    sequence = await agent.report(order, SUCCEEDED, lease_id="another")
    await agent.until(lambda: sequence in agent.acks)
    assert (await run_of(control, run.run_id)).state == tpb.RUN_STATE_DISPATCHED


async def test_replayed_reports_change_nothing(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent) -> None:
    run = await execute(rig, control)
    [order] = await agent.runs()
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING, attempt=1))
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_SUCCEEDED, attempt=2))
    await agent.report(order, SUCCEEDED)
    await until(control, run.run_id, SUCCEEDED)
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING, attempt=1))
    last = await agent.report(order, tpb.RUN_STATE_FAILED, step(tpb.STEP_STATE_FAILED, attempt=2))
    await agent.until(lambda: last in agent.acks)
    after = await run_of(control, run.run_id)
    assert after.state == SUCCEEDED
    assert after.steps[0].state == tpb.STEP_STATE_SUCCEEDED


async def test_run_that_its_node_forgot_becomes_unknown_and_a_late_report_still_counts(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    rig.server._services.dispatcher._lost_grace_s = 0.2
    run = await execute(rig, control)
    [order] = await agent.runs()
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING))
    await until(control, run.run_id, tpb.RUN_STATE_RUNNING)
    await agent.cut()
    await agent.connect()
    lost = await until(control, run.run_id, tpb.RUN_STATE_UNKNOWN)
    assert lost.failure.code == "lost_by_node"
    assert lost.steps[0].state == tpb.STEP_STATE_UNKNOWN
    await agent.report(order, SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    settled = await until(control, run.run_id, SUCCEEDED)
    assert settled.steps[0].state == tpb.STEP_STATE_SUCCEEDED


async def test_run_that_the_server_does_not_know_is_an_event(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    agent.held = [tpb.HeldRun(run_id="rstranger", lease_id="l", state=tpb.RUN_STATE_RUNNING)]
    await agent.full_report()
    call = control.SubscribeEvents(
        iter([cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(types=["run.unrec"]))]), timeout=TIMEOUT
    )
    async with asyncio.timeout(TIMEOUT):
        while not (found := [event async for event in call]):
            call = control.SubscribeEvents(
                iter([cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(types=["run.unrec"]))]),
                timeout=TIMEOUT,
            )
    assert found[0].subject == "rstranger"


async def test_refused_run_fails_with_the_nodes_reason(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    agent.acknowledges = False
    run = await execute(rig, control)
    [order] = await agent.runs()
    reason = tpb.Failure(error_class=tpb.ERROR_CLASS_PERMANENT, code="policy_violation", message="not here")
    await agent.send(command_ack=npb.CommandAck(command_id=f"run-{order.run_id}", refused=reason))
    failed = await until(control, run.run_id, tpb.RUN_STATE_FAILED)
    assert failed.failure.message == "not here"
    assert failed.steps[0].state == tpb.STEP_STATE_SKIPPED


# -- what bad input gets -----------------------------------------------------------------------------------


async def test_everything_wrong_with_a_pipeline_is_told_at_once(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    text = b"""\
name: wrong
args:
  slots: {type: integer}
envs:
  - set: nowhere
steps:
  - name: get
    uses: s3.download
  - name: say
    uses: test.echo
    with: {times: many, volume: 3}
"""
    error = await refused(execute(rig, control, pipeline_yaml=text))
    assert isinstance(error, InvalidInput)
    told = "\n".join(map(str, error.problems))
    assert "node n1 has no step type s3.download" in told
    assert "outrider-step-s3" in told
    for part in ("text", "times", "volume", "nowhere", "slots"):
        assert part in told, told
    assert all(problem.line for problem in error.problems if not problem.path.startswith("args"))
    assert not (await control.ListRuns(cpb.ListRunsRequest(), timeout=TIMEOUT)).runs
    answer = await control.ValidatePipeline(
        cpb.ValidatePipelineRequest(pipeline_yaml=text, node_id="n1"), timeout=TIMEOUT
    )
    assert [p.message for p in answer.problems] == [p.message for p in error.problems]


async def test_volume_of_an_object_needs_an_object(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    text = PIPELINE + b"volumes:\n  saves: {scope: object}\n"
    error = await refused(execute(rig, control, pipeline_yaml=text))
    assert isinstance(error, InvalidInput)
    assert [problem.path for problem in error.problems] == ["volumes.saves.scope"]
    assert error.problems[0].line == text.count(b"\n")


async def test_unknown_node_lists_the_known_ones(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent) -> None:
    error = await refused(execute(rig, control, node_id="n9"))
    assert isinstance(error, NotFound)
    assert str(error) == "there is no node 'n9' (the nodes are n1)"


async def test_unknown_object_is_named(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent) -> None:
    await make_object(rig, control)
    error = await refused(execute(rig, control, object=tpb.ObjectRef(kind="game", name="tundra")))
    assert isinstance(error, NotFound)
    assert "game/tundra" in str(error)
    assert "game/arena" in str(error)


async def test_node_that_never_came_is_said_to_be_so(rig: Rig, control: cgrpc.ControlServiceStub) -> None:
    await (await add_node(rig)).stop()
    error = await refused(execute(rig, control, allow_offline=True))
    assert "has never connected" in str(error)
    # What can be known without it is told first.
    wrong = PIPELINE + b"envs: [{set: nowhere}]\n"
    assert "nowhere" in str(await refused(execute(rig, control, pipeline_yaml=wrong)))


async def test_runs_of_a_node_that_never_was_are_no_empty_list(rig: Rig, control: cgrpc.ControlServiceStub) -> None:
    await (await add_node(rig)).stop()
    assert not (await control.ListRuns(cpb.ListRunsRequest(node_id="n1"), timeout=TIMEOUT)).runs
    error = await refused(control.ListRuns(cpb.ListRunsRequest(node_id="n9"), timeout=TIMEOUT))
    assert isinstance(error, NotFound)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"hello", "mapping"),
        (b"name: x\nname: y\nsteps: []\n", "twice"),
        (b"a: " + b"[" * 10_000, ""),
        (b"#" * 2_000_000, "1"),
    ],
    ids=["no pipeline", "duplicate key", "deep", "long"],
)
async def test_hostile_documents_are_refused_within_a_second(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent, text: bytes, part: str
) -> None:
    async with asyncio.timeout(1):
        error = await refused(execute(rig, control, pipeline_yaml=text))
    assert isinstance(error, InvalidInput)
    assert part in str(error)


async def test_missing_object_and_digest_and_request_id_are_refused(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    assert (await refused(execute(rig, control, pipeline_sha256=b"x" * 32))).code == "digest_mismatch"
    assert (await refused(execute(rig, control, request_id=""))).code == "request_id_missing"
    assert (await refused(execute(rig, control, args_json=b"[1]"))).code == "invalid_json"


async def make_object(rig: Rig, control: cgrpc.ControlServiceStub) -> tpb.ObjectRef:
    ref = tpb.ObjectRef(kind="game", name="arena")
    await control.SetObject(
        cpb.SetObjectRequest(request_id=rig.request_id(), ref=ref, attributes_json=b'{"slots": 16}'),
        timeout=TIMEOUT,
    )
    return ref


async def offline(control: cgrpc.ControlServiceStub) -> None:
    async with asyncio.timeout(TIMEOUT):
        while (await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)).online:
            await asyncio.sleep(0.02)


async def online(control: cgrpc.ControlServiceStub) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not (await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)).online:
            await asyncio.sleep(0.02)

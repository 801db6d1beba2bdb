"""What a stolen or broken node's token is good for: that node's own runs, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory

from outrider import tls, wire
from outrider.errors import InvalidInput, NotFound, OutriderError, PermissionDenied, Unauthenticated
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from tests.integration.server_rig import ECHO, PIPELINE, TIMEOUT, FakeAgent, Rig, add_node, refused, step

CONTROL = cpb.DESCRIPTOR.services_by_name["ControlService"]
NODE = npb.DESCRIPTOR.services_by_name["NodeService"]


@pytest.fixture
async def stranger(rig: Rig) -> AsyncIterator[FakeAgent]:
    agent = await (await add_node(rig, "n2")).start()
    yield agent
    await agent.stop()


async def outcome(channel: grpc.aio.Channel, service: Any, method: Any) -> OutriderError:
    """What becomes of an empty request to ``method``."""
    request = message_factory.GetMessageClass(method.input_type)
    answer = message_factory.GetMessageClass(method.output_type)
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(
        f"/{service.full_name}/{method.name}",
        request_serializer=request.SerializeToString,
        response_deserializer=answer.FromString,
    )

    async def finish() -> None:
        # Nothing is sent on a stream: gRPC reports a write that crosses the refusal as an error of its own.
        made = call(nothing(), timeout=TIMEOUT) if method.client_streaming else call(request(), timeout=TIMEOUT)
        if method.server_streaming:
            async for _ in made:
                pass
        else:
            await made

    error: OutriderError = await refused(finish())
    return error


async def nothing() -> AsyncIterator[Any]:
    return
    yield


async def test_every_call_asks_for_the_right_kind_of_token(rig: Rig, agent: FakeAgent) -> None:
    for token, expected in ((agent.token, {CONTROL: PermissionDenied}), (rig.admin_token, {NODE: PermissionDenied})):
        async with tls.open_channel(rig.address, ca=rig.ca, identity=tls.Identity(token)) as channel:
            for service, kind in expected.items():
                for method in service.methods:
                    error = await outcome(channel, service, method)
                    assert isinstance(error, kind), (method.name, error)
                    assert error.code == "wrong_audience"
    for token in (None, "orn_" + "x" * 43, agent.token + "x", agent.token[:-1]):
        identity = None if token is None else tls.Identity(token)
        async with tls.open_channel(rig.address, ca=rig.ca, identity=identity) as channel:
            for service in (CONTROL, NODE):
                for method in service.methods:
                    assert isinstance(await outcome(channel, service, method), Unauthenticated), method.name


async def test_an_old_session_can_call_nothing_but_register(rig: Rig, agent: FakeAgent) -> None:
    await agent.register()
    old = tls.Identity(agent.token, "n1", agent.identity.session_id, agent.identity.epoch)
    await agent.register()
    for identity in (old, tls.Identity(agent.token, "n1"), tls.Identity(agent.token, "n1", old.session_id, 10**30)):
        async with tls.open_channel(rig.address, ca=rig.ca, identity=identity) as channel:
            for method in NODE.methods:
                # A node's own role is asked for by a command beside the agent, which has no session.
                if method.name not in ("Register", "GetOwnRole"):
                    assert (await outcome(channel, NODE, method)).code == "session_superseded", method.name


async def run_on_n1(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent) -> npb.RunPipeline:
    request = cpb.ExecutePipelineRequest(request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id="n1")
    await control.ExecutePipeline(request, timeout=TIMEOUT)
    return (await agent.runs())[0]


async def test_a_node_can_say_nothing_of_anothers_run(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent, stranger: FakeAgent
) -> None:
    order = await run_on_n1(rig, control, agent)
    running = step(tpb.STEP_STATE_RUNNING)
    await agent.report(order, tpb.RUN_STATE_RUNNING, running)
    progress = tpb.Progress(done=1, total=2, message="forged")
    for run_id, sequence in ((order.run_id, 0), ("r" + "0" * 20, 0), (order.run_id, 7)):
        report = npb.RunReport(
            sequence=sequence,
            run_id=run_id,
            lease_id=order.lease_id,
            state=tpb.RUN_STATE_SUCCEEDED,
            steps=[step(tpb.STEP_STATE_RUNNING, progress=progress)],
        )
        await stranger.send(run_report=report)
    await stranger.until(lambda: 7 in stranger.acks)
    await stranger.send(command_ack=npb.CommandAck(command_id=f"run-{order.run_id}", refused=tpb.Failure(message="no")))
    full = tpb.FullReport(runs=[tpb.HeldRun(run_id=order.run_id, lease_id=order.lease_id, state=tpb.RUN_STATE_FAILED)])
    await stranger.send(full_report=full)
    await stranger.heartbeat()
    await stranger.until(lambda: len(stranger.heartbeats) > 1)
    run = await control.GetRun(cpb.GetRunRequest(run_id=order.run_id), timeout=TIMEOUT)
    assert run.state == tpb.RUN_STATE_RUNNING
    assert not run.steps[0].progress.message
    assert "r" + "0" * 20 not in rig.server._services.dispatcher.progress
    for call in (
        stranger.stub.GetObject(npb.RunRef(run_id=order.run_id, lease_id=order.lease_id), timeout=TIMEOUT),
        stranger.stub.WriteBack(
            npb.WriteBackRequest(request_id="w", run=npb.RunRef(run_id=order.run_id)), timeout=TIMEOUT
        ),
    ):
        assert isinstance(await refused(call), NotFound)
    chunk = tpb.RunLogChunk(run_id=order.run_id, step="say", attempt=1, stream=tpb.LOG_STREAM_STDOUT, data=b"forged")
    ack = await stranger.stub.StreamRunLogs(iter([npb.RunLogBatch(chunks=[chunk])]), timeout=TIMEOUT)
    assert (list(ack.unknown_runs), list(ack.positions)) == ([order.run_id], [])
    stored = control.StreamRunLogs(cpb.StreamRunLogsRequest(run_id=order.run_id), timeout=TIMEOUT)
    assert not [piece async for piece in stored]


async def test_progress_of_a_run_that_is_over_is_not_kept(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await run_on_n1(rig, control, agent)
    await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    late = step(tpb.STEP_STATE_RUNNING, progress=tpb.Progress(done=1))
    await agent.report(order, tpb.RUN_STATE_RUNNING, late, sequence=0)
    await agent.heartbeat()
    await agent.until(lambda: len(agent.heartbeats) > 1)
    assert order.run_id not in rig.server._services.dispatcher.progress


async def test_events_that_are_the_servers_own_are_not_taken_from_nodes(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    forged = ["run.finished", "run.cancel_requested", "node.removed", "node.offline", "object.changed", "env.removed"]
    batch = npb.EventBatch(
        events=[
            tpb.Event(sequence=n, type=type_, subject="forged", time=wire.timestamp(1000.0))
            for n, type_ in enumerate([*forged, "container.exited"], start=1)
        ]
    )
    assert (await agent.stub.ReportEvents(iter([batch]), timeout=TIMEOUT)).acknowledged == len(forged) + 1
    wish = cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(subject="forged"))
    found = [event.type async for event in control.SubscribeEvents(iter([wish]), timeout=TIMEOUT)]
    assert found == ["container.exited"]


async def test_step_types_that_cannot_be_read_are_refused_when_they_are_reported(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    for schema in (b"{", b"[" * 100_000, b"[]"):
        broken = tpb.StepTypeInfo()
        broken.CopyFrom(ECHO)
        broken.params_schema_json = schema
        agent.step_types = [broken]
        assert isinstance(await refused(agent.register()), InvalidInput), schema[:10]


async def test_written_back_attributes_have_names_of_attributes(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await run_on_n1(rig, control, agent)
    run = npb.RunRef(run_id=order.run_id, lease_id=order.lease_id)
    for name in ("", "a b", "\x1b[31m", "a\nb", "x" * 200):
        request = npb.WriteBackRequest(request_id="w", run=run)
        request.attributes.add(name=name, value_json=b"1")
        assert isinstance(await refused(agent.stub.WriteBack(request, timeout=TIMEOUT)), InvalidInput), name
    for value in (b"[" * 100_000, b"NaN", b"{", b'"\\ud800"'):
        request = npb.WriteBackRequest(request_id="w", run=run)
        request.attributes.add(name="a", value_json=value)
        assert isinstance(await refused(agent.stub.WriteBack(request, timeout=TIMEOUT)), InvalidInput), value[:10]
    await asyncio.sleep(0)

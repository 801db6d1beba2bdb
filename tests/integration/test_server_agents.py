"""What agents get from a real server: sessions, heartbeats, logs, envs, write-back, containers, streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard

from outrider import wire
from outrider.errors import Conflict, NotFound, OperationTimeout, PermissionDenied, Unauthenticated, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from tests.integration.server_rig import TIMEOUT, FakeAgent, Rig, add_node, refused, served, step

PIPELINE = b"""\
name: secretive
envs:
  - set: s3
  - {name: PLAIN, value: eu-1}
steps:
  - name: say
    uses: test.echo
    with: {text: hello}
    envs: {SECRET: s3.KEY, PLAIN: PLAIN}
"""
OUT, ERR = tpb.LOG_STREAM_STDOUT, tpb.LOG_STREAM_STDERR


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=0.3, command_timeout_s=1.0) as rig:
        yield rig


@pytest.fixture
async def agent(rig: Rig) -> AsyncIterator[FakeAgent]:
    agent = await (await add_node(rig)).start()
    beating = asyncio.create_task(beat(agent))
    yield agent
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    await agent.stop()


async def beat(agent: FakeAgent) -> None:
    while True:
        await asyncio.sleep(0.2)
        await agent.heartbeat()


async def started(rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent, **fields: Any) -> npb.RunPipeline:
    await control.SetEnvSet(
        cpb.SetEnvSetRequest(request_id=rig.request_id(), name="s3", values={"KEY": "hunter2", "OTHER": "x"}),
        timeout=TIMEOUT,
    )
    request = cpb.ExecutePipelineRequest(request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id="n1", **fields)
    await control.ExecutePipeline(request, timeout=TIMEOUT)
    return (await agent.runs())[0]


def ref(order: npb.RunPipeline, lease_id: str | None = None) -> npb.RunRef:
    return npb.RunRef(run_id=order.run_id, lease_id=order.lease_id if lease_id is None else lease_id)


# -- who is calling ----------------------------------------------------------------------------------------


async def test_wrong_missing_and_foreign_tokens_are_refused_at_once(rig: Rig, agent: FakeAgent) -> None:
    async with asyncio.timeout(1):
        async with rig.operator("oro_wrong") as control:
            error = await refused(control.ListNodes(cpb.ListNodesRequest(), timeout=TIMEOUT))
            assert isinstance(error, Unauthenticated)
            assert "not one that this server knows" in str(error)
        async with rig.operator(agent.token) as control:
            error = await refused(control.ListNodes(cpb.ListNodesRequest(), timeout=TIMEOUT))
            assert isinstance(error, PermissionDenied)
    liar = FakeAgent(rig, "n2", agent.token)
    assert isinstance(await refused(liar.register()), Unauthenticated)
    await liar.stop()


async def test_calls_of_an_older_session_are_refused_and_its_channel_is_closed(rig: Rig, agent: FakeAgent) -> None:
    newer = await FakeAgent(rig, "n1", agent.token).start()
    assert newer.session is not None
    assert newer.session.epoch == 2
    await agent.until(lambda: agent.error is not None)
    error = await refused(agent.stub.GetEnvs(npb.GetEnvsRequest(), timeout=TIMEOUT))
    assert isinstance(error, Conflict)
    assert error.code == "session_superseded"
    await newer.stop()


async def test_removed_node_is_cut_off_and_its_token_is_worth_nothing(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    await control.RemoveNode(cpb.RemoveNodeRequest(request_id="rm", node_id="n1"), timeout=TIMEOUT)
    await agent.until(lambda: agent.error is not None)
    assert isinstance(wire.from_rpc_error(agent.error), Unauthenticated)  # type: ignore[arg-type]
    assert isinstance(await refused(agent.register()), Unauthenticated)


async def test_same_request_id_gives_the_same_token_and_another_request_under_it_is_refused(
    control: cgrpc.ControlServiceStub,
) -> None:
    request = cpb.AddNodeRequest(request_id="add-n7", node_id="n7")
    first = await control.AddNode(request, timeout=TIMEOUT)
    assert await control.AddNode(request, timeout=TIMEOUT) == first
    other = cpb.AddNodeRequest(request_id="add-n7", node_id="n8")
    assert (await refused(control.AddNode(other, timeout=TIMEOUT))).code == "request_id_reused"
    taken = cpb.AddNodeRequest(request_id="again", node_id="n7")
    assert (await refused(control.AddNode(taken, timeout=TIMEOUT))).code == "already_exists"


# -- presence ----------------------------------------------------------------------------------------------


async def test_node_that_falls_silent_is_offline_with_the_time_it_was_last_seen(
    rig: Rig, control: cgrpc.ControlServiceStub
) -> None:
    silent = await (await add_node(rig, "n3")).start()
    assert (await control.GetNode(cpb.GetNodeRequest(node_id="n3"), timeout=TIMEOUT)).online
    await silent.until(lambda: silent.error is not None)
    assert wire.from_rpc_error(silent.error).code == "heartbeat_missed"  # type: ignore[arg-type]
    node = await control.GetNode(cpb.GetNodeRequest(node_id="n3"), timeout=TIMEOUT)
    assert not node.online
    assert node.brief.cpu_percent == 12.5
    assert node.HasField("last_seen")
    await silent.stop()


async def test_heartbeat_with_a_wrong_proof_ends_the_channel(rig: Rig) -> None:
    agent = await (await add_node(rig, "n4")).start()
    await agent.heartbeat(wrong=True)
    await agent.until(lambda: agent.error is not None)
    assert wire.from_rpc_error(agent.error).code == "wrong_proof"  # type: ignore[arg-type]
    await agent.stop()


async def test_lost_connection_is_noticed_and_told_as_events(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    call = control.SubscribeEvents(timeout=TIMEOUT)
    await call.write(cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(types=["node."], node_id="n1")))
    assert (await call.read()).type == "node.added"
    assert (await call.read()).type == "node.online"
    await agent.cut()
    assert (await call.read()).type == "node.offline"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_events_are_stored_once_however_often_they_are_sent(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    batch = npb.EventBatch(
        events=[
            tpb.Event(sequence=n, type="container.exited", subject=f"c{n}", time=wire.timestamp(1000.0 + n))
            for n in (1, 2, 3)
        ]
    )
    for _ in range(2):
        answer = await agent.stub.ReportEvents(iter([batch]), timeout=TIMEOUT)
        assert answer.acknowledged == 3
    wish = cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(types=["container."]))
    found = [event async for event in control.SubscribeEvents(iter([wish]), timeout=TIMEOUT)]
    assert [event.subject for event in found] == ["c1", "c2", "c3"]
    assert all(event.node_id == "n1" for event in found)


# -- what runs need and give -------------------------------------------------------------------------------


async def test_envs_are_given_to_the_runs_own_node_and_lease_only(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await started(rig, control, agent)
    assert list(order.env_names) == ["PLAIN", "s3.KEY"]
    got = await agent.stub.GetEnvs(npb.GetEnvsRequest(run=ref(order)), timeout=TIMEOUT)
    assert dict(got.values) == {"PLAIN": "eu-1", "s3.KEY": "hunter2"}
    assert list(got.secret_names) == ["s3.KEY"]
    error = await refused(agent.stub.GetEnvs(npb.GetEnvsRequest(run=ref(order, "x")), timeout=TIMEOUT))
    assert isinstance(error, Conflict)
    other = await (await add_node(rig, "n2")).start()
    error = await refused(other.stub.GetEnvs(npb.GetEnvsRequest(run=ref(order)), timeout=TIMEOUT))
    assert isinstance(error, NotFound)
    await other.stop()
    stored = b"".join(file.read_bytes() for file in rig.config.data_dir.glob("store.db*"))
    assert b"hunter2" not in stored
    assert agent.token.encode() not in stored
    assert rig.admin_token.encode() not in stored


async def test_write_back_is_ordered_by_run_and_outlives_an_edit(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    arena = tpb.ObjectRef(kind="game", name="arena")

    async def put(attributes: bytes, **fields: Any) -> tpb.Object:
        request = cpb.SetObjectRequest(request_id=rig.request_id(), ref=arena, attributes_json=attributes, **fields)
        return await control.SetObject(request, timeout=TIMEOUT)

    assert (await put(b'{"slots": 16, "map": "dm1"}')).version == 1
    first = await started(rig, control, agent, object=arena)
    changed = await put(b'{"map": null}', expected_version=1)
    assert (changed.version, changed.attributes_json) == (2, b'{"slots":16}')
    stale = await refused(put(b"{}", expected_version=1))
    assert stale.code == "version_conflict"
    attribute = npb.WriteBackRequest.Attribute(name="port", value_json=b"27960")
    request = npb.WriteBackRequest(request_id="w", run=ref(first), attributes=[attribute])
    for _ in range(2):
        assert (await agent.stub.WriteBack(request, timeout=TIMEOUT)).status_version == 1
    got = await agent.stub.GetObject(ref(first), timeout=TIMEOUT)
    assert got.status_json == b'{"port":27960}'
    assert got.status[0].run_id == first.run_id
    await agent.report(first, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    second_request = cpb.ExecutePipelineRequest(
        request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id="n1", object=arena
    )
    await control.ExecutePipeline(second_request, timeout=TIMEOUT)
    second = (await agent.runs(2))[1]
    later = npb.WriteBackRequest.Attribute(name="port", value_json=b"1")
    request_of_second = npb.WriteBackRequest(request_id="w2", run=ref(second), attributes=[later])
    assert (await agent.stub.WriteBack(request_of_second, timeout=TIMEOUT)).status_version == 2
    await agent.stub.WriteBack(request, timeout=TIMEOUT)  # a straggler of the first run
    got = await control.GetObject(cpb.GetObjectRequest(ref=arena), timeout=TIMEOUT)
    assert got.status_json == b'{"port":1}'
    busy = await refused(control.RemoveObject(cpb.RemoveObjectRequest(request_id="x", ref=arena), timeout=TIMEOUT))
    assert busy.code == "object_busy"


async def test_env_set_that_lacks_a_name_is_told_with_those_it_has(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    await control.SetEnvSet(cpb.SetEnvSetRequest(request_id="e", name="s3", values={"REGION": "x"}), timeout=TIMEOUT)
    request = cpb.ExecutePipelineRequest(request_id="x", pipeline_yaml=PIPELINE, node_id="n1")
    error = await refused(control.ExecutePipeline(request, timeout=TIMEOUT))
    [problem] = error.problems
    assert (problem.message, problem.hint, problem.line) == ("env set s3 has no KEY", "it has REGION", 9)


# -- logs --------------------------------------------------------------------------------------------------


def chunk(order: npb.RunPipeline, offset: int, data: bytes, **fields: Any) -> tpb.RunLogChunk:
    fields = {"step": "say", "attempt": 1, "stream": OUT} | fields
    return tpb.RunLogChunk(run_id=order.run_id, offset=offset, data=data, **fields)


async def send_logs(agent: FakeAgent, *chunks: tpb.RunLogChunk) -> npb.RunLogAck:
    return await agent.stub.StreamRunLogs(iter([npb.RunLogBatch(chunks=chunks)]), timeout=TIMEOUT)


async def logs_of(control: cgrpc.ControlServiceStub, order: npb.RunPipeline, **fields: Any) -> list[tpb.RunLogChunk]:
    request = cpb.StreamRunLogsRequest(run_id=order.run_id, **fields)
    return [piece async for piece in control.StreamRunLogs(request, timeout=TIMEOUT)]


async def test_every_byte_of_a_log_is_stored_once_in_order_and_acknowledged(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await started(rig, control, agent)
    packed = zstandard.ZstdCompressor().compress(b"two\n\xff\xfe\n")
    await send_logs(agent, chunk(order, 0, b"one\n"), chunk(order, 0, b"warn\n", stream=ERR))
    await send_logs(agent, chunk(order, 0, b"one\n"), chunk(order, 2, b"e\nt"))  # replayed, and overlapping
    ack = await send_logs(agent, chunk(order, 4, packed, zstd=True), chunk(order, 11, b"", gap_bytes=100))
    assert [(p.stream, p.offset) for p in ack.positions] == [(OUT, 111)]
    await agent.until(lambda: any(p.offset == 111 for a in agent.log_acks for p in a.positions))
    pieces = await logs_of(control, order)
    assert b"".join(p.data for p in pieces if p.stream == OUT) == b"one\ntwo\n\xff\xfe\n"
    assert b"".join(p.data for p in pieces if p.stream == ERR) == b"warn\n"
    assert [p.gap_bytes for p in pieces if p.gap_bytes] == [100]
    tail = await logs_of(control, order, tail=1)
    assert b"".join(p.data for p in tail if p.stream == OUT) == b"\xff\xfe\n"


async def test_log_with_a_hole_is_not_stored_beyond_it_and_is_told_where_to_go_on(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await started(rig, control, agent)
    ack = await send_logs(agent, chunk(order, 0, b"abc"), chunk(order, 9, b"xyz"))
    assert [position.offset for position in ack.resend] == [3]
    assert b"".join(p.data for p in await logs_of(control, order)) == b"abc"


async def test_log_of_a_run_that_the_server_does_not_know_holds_up_no_other(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await started(rig, control, agent)
    stranger = tpb.RunLogChunk(run_id="rother", step="say", attempt=1, stream=OUT, data=b"x")
    ack = await send_logs(agent, stranger, chunk(order, 0, b"abc"))
    assert list(ack.unknown_runs) == ["rother"]
    assert b"".join(p.data for p in await logs_of(control, order)) == b"abc"


@pytest.mark.parametrize("how", [{"follow": True}, {}, {"tail": 1}], ids=["followed", "read", "tail"])
async def test_log_ends_with_its_last_byte_even_if_the_run_ended_before_it_came(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent, how: dict[str, Any]
) -> None:
    order = await started(rig, control, agent)
    await send_logs(agent, chunk(order, 0, b"early\n"))
    done = step(tpb.STEP_STATE_SUCCEEDED, stdout_bytes=11)
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, done)
    await agent.until(lambda: sequence in agent.acks)
    reading = asyncio.create_task(logs_of(control, order, **how))
    await asyncio.sleep(0.2)
    assert not reading.done()
    await send_logs(agent, chunk(order, 6, b"late\n"))
    async with asyncio.timeout(2):
        assert b"".join(piece.data for piece in await reading) == (b"late\n" if "tail" in how else b"early\nlate\n")


async def test_log_that_lacks_its_end_is_not_waited_for_while_its_node_is_away(
    rig: Rig, control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    order = await started(rig, control, agent)
    await send_logs(agent, chunk(order, 0, b"early\n"))
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED, stdout_bytes=11))
    await agent.until(lambda: sequence in agent.acks)
    await agent.cut()
    async with asyncio.timeout(TIMEOUT):
        while (await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)).online:
            await asyncio.sleep(0.05)
    async with asyncio.timeout(2):
        assert b"".join(piece.data for piece in await logs_of(control, order)) == b"early\n"


# -- containers --------------------------------------------------------------------------------------------


def answering(agent: FakeAgent, command: npb.Command) -> npb.CommandResult | None:
    match command.WhichOneof("body"):
        case "list_containers":
            return npb.CommandResult(command_id=command.command_id, containers=[tpb.Container(name="arena")])
        case "container":
            container = tpb.Container(name=command.container.name, state="exited")
            return npb.CommandResult(command_id=command.command_id, containers=[container])
        case "inspect_container":
            failure = tpb.Failure(
                error_class=tpb.ERROR_CLASS_PERMANENT, code="container_not_found", message="no container x on n1"
            )
            return npb.CommandResult(command_id=command.command_id, failure=failure)
    return None


async def test_container_calls_reach_the_agent_and_come_back(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    agent.on_command = answering
    listed = await control.ListContainers(cpb.ListContainersRequest(node_id="n1"), timeout=TIMEOUT)
    assert [c.name for c in listed.containers] == ["arena"]
    request = cpb.ContainerRequest(request_id="stop-1", node_id="n1", name="arena", grace=wire.duration(3))
    for _ in range(2):
        assert (await control.StopContainer(request, timeout=TIMEOUT)).state == "exited"
    [stop] = [c for c in agent.commands if c.HasField("container")]
    assert stop.container.action == tpb.CONTAINER_ACTION_STOP
    # By one clock, so that the agent knows how long it was on its way.
    assert 0 <= wire.seconds(stop.sent_at) - wire.seconds(agent.heartbeats[-1].sent_at) < TIMEOUT
    assert wire.seconds(stop.deadline) > 0
    error = await refused(
        control.InspectContainer(cpb.InspectContainerRequest(node_id="n1", name="x"), timeout=TIMEOUT)
    )
    assert isinstance(error, NotFound)
    assert error.message == "no container x on n1"


async def test_agent_that_does_not_answer_is_a_timeout_and_one_that_leaves_is_told(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    request = cpb.ListContainersRequest(node_id="n1")
    error = await refused(control.ListContainers(request, timeout=TIMEOUT))
    assert isinstance(error, OperationTimeout)
    assert "n1 did not answer within 1 s" in str(error)
    asking = asyncio.create_task(refused(control.ListContainers(request, timeout=TIMEOUT)))
    await agent.until(lambda: len(agent.commands) >= 2)
    await agent.cut()
    assert isinstance(await asking, Unavailable)
    async with asyncio.timeout(1):
        assert "offline since" in str(await refused(control.ListContainers(request, timeout=TIMEOUT)))
    error = await refused(control.ListContainers(cpb.ListContainersRequest(node_id="n9"), timeout=TIMEOUT))
    assert isinstance(error, NotFound)


async def test_container_log_is_piped_and_stops_when_nobody_reads(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    uploads: list[asyncio.Task[Any]] = []

    def stream(agent: FakeAgent, command: npb.Command) -> None:
        if command.HasField("stream_container_logs"):
            uploads.append(asyncio.create_task(upload(command.stream_container_logs)))

    async def upload(order: npb.StreamContainerLogsCommand) -> Any:
        async def lines() -> AsyncIterator[npb.ContainerLogBatch]:
            for number in range(3 if not order.follow else 1_000_000):
                yield npb.ContainerLogBatch(stream_id=order.stream_id, stream=OUT, data=b"line %d\n" % number)

        return await agent.stub.StreamContainerLogs(lines(), timeout=TIMEOUT)

    agent.on_command = stream
    request = cpb.ContainerLogsRequest(node_id="n1", name="arena", tail=-1)
    got = [batch async for batch in control.StreamContainerLogs(request, timeout=TIMEOUT)]
    assert b"".join(batch.data for batch in got) == b"line 0\nline 1\nline 2\n"
    assert isinstance(await uploads[0], npb.StreamEnd)
    following = control.StreamContainerLogs(
        cpb.ContainerLogsRequest(node_id="n1", name="arena", follow=True), timeout=TIMEOUT
    )
    assert (await following.read()).data == b"line 0\n"
    following.cancel()
    await agent.until(lambda: any(c.HasField("stop_stream") for c in agent.commands))
    async with asyncio.timeout(5):
        assert isinstance(await uploads[1], npb.StreamEnd)


async def test_container_log_that_the_agent_cannot_open_is_told(
    control: cgrpc.ControlServiceStub, agent: FakeAgent
) -> None:
    def refuse(agent: FakeAgent, command: npb.Command) -> npb.CommandResult:
        failure = tpb.Failure(error_class=tpb.ERROR_CLASS_PERMANENT, code="not_found", message="no such container")
        return npb.CommandResult(command_id=command.command_id, failure=failure)

    agent.on_command = refuse
    call = control.StreamContainerLogs(cpb.ContainerLogsRequest(node_id="n1", name="x"), timeout=TIMEOUT)
    assert isinstance(await refused(call.read()), NotFound)

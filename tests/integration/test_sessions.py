"""Sessions against a real server: resumed or new, fenced for every message; results are judged by lease alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from outrider import wire
from outrider.errors import Conflict, TemporaryError, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from server_core.store import schema
from server_core.store.commits import Commit
from tests.integration.server_rig import PIPELINE, TIMEOUT, FakeAgent, Rig, add_node, refused, served, step

OUT = tpb.LOG_STREAM_STDOUT


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=5) as rig:
        yield rig


async def another(rig: Rig, agent: FakeAgent) -> FakeAgent:
    """The node's agent after its restart, or an impostor with its credential."""
    return FakeAgent(rig, agent.node_id, agent.token)


async def execute(rig: Rig) -> str:
    async with rig.operator() as control:
        request = cpb.ExecutePipelineRequest(request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id="n1")
        return str((await control.ExecutePipeline(request, timeout=TIMEOUT)).run_id)


async def run_of(rig: Rig, run_id: str) -> tpb.Run:
    async with rig.operator() as control:
        run: tpb.Run = await control.GetRun(cpb.GetRunRequest(run_id=run_id), timeout=TIMEOUT)
        return run


async def events_of(rig: Rig, type_: str) -> list[tpb.Event]:
    async with rig.operator() as control:
        wish = cpb.SubscribeEventsRequest(after=-1, filter=cpb.EventFilter(types=[type_]))
        return [event async for event in control.SubscribeEvents(iter([wish]), timeout=TIMEOUT)]


async def test_the_last_session_is_resumed_with_its_epoch_and_any_other_is_a_new_one(
    rig: Rig, agent: FakeAgent
) -> None:
    assert agent.session is not None
    first = agent.session
    again = await another(rig, agent)
    resumed = await again.register(first.session_id)
    assert (resumed.resumed, resumed.session_id, resumed.epoch) == (True, first.session_id, first.epoch)
    new = await again.register("s-of-long-ago")
    assert (new.resumed, new.epoch) == (False, first.epoch + 1)
    assert new.session_id != first.session_id
    late = await again.register(first.session_id)  # it was the newest once
    assert (late.resumed, late.epoch) == (False, first.epoch + 2)
    await again.stop()


async def test_a_session_is_resumed_by_a_server_that_was_restarted(rig: Rig, agent: FakeAgent) -> None:
    assert agent.session is not None
    await rig.restart()
    again = await another(rig, agent)
    resumed = await again.register(agent.session.session_id)
    assert (resumed.resumed, resumed.epoch) == (True, agent.session.epoch)
    await again.stop()


async def test_a_stream_that_was_opened_in_an_older_session_is_refused_in_its_middle(
    rig: Rig, agent: FakeAgent
) -> None:
    run_id = await execute(rig)
    await agent.runs()
    newer_came = asyncio.Event()

    def chunk(offset: int, data: bytes) -> npb.RunLogBatch:
        return npb.RunLogBatch(
            chunks=[tpb.RunLogChunk(run_id=run_id, step="say", attempt=1, stream=OUT, offset=offset, data=data)]
        )

    async def logs() -> AsyncIterator[npb.RunLogBatch]:
        yield chunk(0, b"before\n")
        await newer_came.wait()
        yield chunk(7, b"after\n")

    async def events() -> AsyncIterator[npb.EventBatch]:
        yield npb.EventBatch(events=[tpb.Event(sequence=1, type="x.before", time=wire.timestamp(1.0))])
        await newer_came.wait()
        yield npb.EventBatch(events=[tpb.Event(sequence=2, type="x.after", time=wire.timestamp(2.0))])

    streams = [
        asyncio.create_task(refused(agent.stub.StreamRunLogs(logs(), timeout=TIMEOUT))),
        asyncio.create_task(refused(agent.stub.ReportEvents(events(), timeout=TIMEOUT))),
    ]
    await agent.until(lambda: any(p.offset == 7 for ack in agent.log_acks for p in ack.positions))
    while not await events_of(rig, "x."):
        await asyncio.sleep(0.02)
    newer = await (await another(rig, agent)).start()
    newer_came.set()
    assert [(await stream).code for stream in streams] == ["session_superseded"] * 2
    assert [event.type for event in await events_of(rig, "x.")] == ["x.before"]
    async with rig.operator() as control:
        request = cpb.StreamRunLogsRequest(run_id=run_id)
        stored = [piece.data async for piece in control.StreamRunLogs(request, timeout=TIMEOUT)]
    assert b"".join(stored) == b"before\n"
    await newer.stop()


async def test_what_comes_late_on_a_control_channel_that_was_replaced_is_not_heard(rig: Rig, agent: FakeAgent) -> None:
    """A resumed session has the same epoch: there the newest channel wins."""
    run_id = await execute(rig)
    [order] = await agent.runs()
    assert agent.session is not None
    newer = await another(rig, agent)
    await newer.register(agent.session.session_id)
    newer.held = [tpb.HeldRun(run_id=run_id, lease_id=order.lease_id, state=tpb.RUN_STATE_DISPATCHED)]
    await newer.connect()
    await agent.until(lambda: agent.error is not None)
    assert wire.from_rpc_error(agent.error).code == "session_superseded"  # type: ignore[arg-type]
    await newer.heartbeat()
    await newer.until(lambda: newer.heartbeats)
    assert (await run_of(rig, run_id)).state == tpb.RUN_STATE_DISPATCHED
    await newer.stop()


async def test_a_heartbeat_that_comes_twice_ends_the_channel(rig: Rig, agent: FakeAgent) -> None:
    await agent.heartbeat(again=True)
    await agent.until(lambda: agent.error is not None)
    assert wire.from_rpc_error(agent.error).code == "heartbeat_repeated"  # type: ignore[arg-type]


async def test_a_result_reached_before_a_new_registration_still_counts(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    newer = await (await another(rig, agent)).start()  # no resume: another epoch
    assert newer.session is not None
    assert newer.session.epoch == 2
    sequence = await newer.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    await newer.until(lambda: sequence in newer.acks)
    assert (await run_of(rig, run_id)).state == tpb.RUN_STATE_SUCCEEDED
    await newer.stop()


async def test_a_result_of_a_lease_that_was_taken_away_never_counts(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    table = schema.runs
    await rig.server._services.db.write(
        Commit.RUN_SETTLED,
        lambda c: c.execute(update(table).where(table.c.run_id == run_id).values(lease_id="another")),
    )
    for _ in range(2):  # sent again, it is refused again, and acknowledged so that it does not come for ever
        sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
        await agent.until(lambda sequence=sequence: sequence in agent.acks)
    run = await run_of(rig, run_id)
    assert run.state == tpb.RUN_STATE_DISPATCHED
    assert run.steps[0].state == tpb.STEP_STATE_PENDING
    refusals = await events_of(rig, "run.report_refused")
    assert [event.subject for event in refusals] == [run_id, run_id]
    ref = npb.RunRef(run_id=run_id, lease_id=order.lease_id)
    attribute = npb.WriteBackRequest.Attribute(name="port", value_json=b"1")
    for call in (
        agent.stub.WriteBack(npb.WriteBackRequest(request_id="w", run=ref, attributes=[attribute]), timeout=TIMEOUT),
        agent.stub.GetEnvs(npb.GetEnvsRequest(run=ref), timeout=TIMEOUT),
        agent.stub.GetObject(ref, timeout=TIMEOUT),
    ):
        error = await refused(call)
        assert isinstance(error, Conflict)
        assert error.code == "lease_superseded"
    assert not (await run_of(rig, run_id)).writeback_json.strip(b"{}")


async def test_a_refusal_of_a_run_under_another_lease_does_not_end_it(rig: Rig, agent: FakeAgent) -> None:
    agent.acknowledges = False
    run_id = await execute(rig)
    await agent.runs()
    table = schema.runs
    await rig.server._services.db.write(
        Commit.RUN_SETTLED,
        lambda c: c.execute(update(table).where(table.c.run_id == run_id).values(lease_id="another")),
    )
    await agent.send(command_ack=npb.CommandAck(command_id=f"run-{run_id}", refused=tpb.Failure(message="no")))
    await agent.heartbeat()  # answered after it, on the same stream
    await agent.until(lambda: len(agent.heartbeats) >= 2)
    assert (await run_of(rig, run_id)).state == tpb.RUN_STATE_QUEUED


async def test_a_server_that_stops_says_how_long(rig: Rig) -> None:
    agents = [await (await add_node(rig, f"m{number}")).start() for number in range(20)]
    await rig.server.stop(0)
    told = []
    for agent in agents:
        await agent.until(lambda agent=agent: agent.error is not None)
        error: Any = wire.from_rpc_error(agent.error)  # type: ignore[arg-type]
        assert isinstance(error, Unavailable)
        assert error.code == "server_stopping"
        told.append(error.retry_after_s)
        await agent.stop()
    assert sorted(told) == pytest.approx([2.0 + number / 100 for number in range(20)], abs=1e-6)


async def test_nodes_beyond_the_rate_are_told_their_turn_and_get_in_then(tmp_path: Path) -> None:
    async with served(tmp_path / "server", registrations_per_second=5) as rig:
        agents = [await add_node(rig, f"m{number}") for number in range(9)]
        waits = []
        for agent in agents:
            try:
                await agent.register()
            except Exception as error:
                problem: Any = wire.from_rpc_error(error)  # type: ignore[arg-type]
                assert isinstance(problem, TemporaryError)
                assert problem.code == "resource_exhausted"
                waits.append((problem.retry_after_s, agent))
        assert 0 < len(waits) <= 3
        for wait_s, agent in waits:
            assert 0 < wait_s < 1
            await asyncio.sleep(wait_s)
            assert (await agent.register()).epoch == 1
        for agent in agents:
            await agent.stop()

"""What node and server believe after they lost each other: each difference is settled, and recorded once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_core.runtimes.fake import FakeRuntime
from outrider.reports import held_digest
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from server_core.dispatch import Dispatcher
from server_core.store import runs
from server_core.store.commits import Commit
from tests.integration import test_agent_server as whole
from tests.integration.server_rig import PIPELINE, TIMEOUT, FakeAgent, Rig, served, step
from tests.integration.test_sessions import events_of, run_of

runtime = whole.runtime
shell = whole.shell
ARENA = tpb.ObjectRef(kind="game", name="arena")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=5) as rig:
        rig.server._services.dispatcher._lost_grace_s = 0.3
        yield rig


async def execute(rig: Rig, **fields: Any) -> str:
    async with rig.operator() as control:
        request = cpb.ExecutePipelineRequest(
            request_id=rig.request_id(), pipeline_yaml=PIPELINE, node_id="n1", **fields
        )
        return str((await control.ExecutePipeline(request, timeout=TIMEOUT)).run_id)


async def cancel(rig: Rig, run_id: str) -> None:
    async with rig.operator() as control:
        await control.CancelRun(cpb.CancelRunRequest(request_id=rig.request_id(), run_id=run_id), timeout=TIMEOUT)


async def back(agent: FakeAgent, *held: tpb.HeldRun) -> None:
    """The agent loses its connection and comes back with this to say."""
    assert agent.session is not None
    await agent.cut()
    agent.error = None
    agent.commands.clear()
    await agent.register(agent.session.session_id)
    agent.held = list(held)
    await agent.connect()
    agent.heartbeats.clear()
    await agent.heartbeat()  # answered after the report, which was before it on the same channel
    await agent.until(lambda: agent.heartbeats)


def holds(order: npb.RunPipeline, state: tpb.RunState.ValueType, lease_id: str = "") -> tpb.HeldRun:
    return tpb.HeldRun(run_id=order.run_id, lease_id=lease_id or order.lease_id, state=state)


async def differences(rig: Rig, run_id: str) -> list[tuple[str, str]]:
    found = [json.loads(event.data_json) for event in await events_of(rig, "run.reconciled") if event.subject == run_id]
    return [(data["difference"], data["action"]) for data in found]


async def until(condition: Any) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not await condition():
            await asyncio.sleep(0.02)


async def state_of(rig: Rig, run_id: str) -> int:
    return (await run_of(rig, run_id)).state


async def test_sent_but_unconfirmed_and_the_node_has_it(rig: Rig, agent: FakeAgent) -> None:
    agent.acknowledges = False
    run_id = await execute(rig)
    [order] = await agent.runs()
    assert await state_of(rig, run_id) == tpb.RUN_STATE_QUEUED
    await back(agent, holds(order, tpb.RUN_STATE_DISPATCHED))
    assert await state_of(rig, run_id) == tpb.RUN_STATE_DISPATCHED
    assert not agent._runs()
    assert await differences(rig, run_id) == [("sent, not confirmed", "confirmed")]


async def test_sent_but_unconfirmed_and_the_node_never_got_it(rig: Rig, agent: FakeAgent) -> None:
    agent.acknowledges = False
    run_id = await execute(rig)
    [first] = await agent.runs()
    agent.acknowledges = True
    await back(agent)
    [again] = await agent.runs()
    assert again == first  # the same command, under the same lease

    async def is_dispatched() -> bool:
        return await state_of(rig, run_id) == tpb.RUN_STATE_DISPATCHED

    await until(is_dispatched)
    assert await differences(rig, run_id) == [("sent, not confirmed", "sent again")]


async def test_cancelled_before_it_was_confirmed_and_the_node_never_got_it(rig: Rig, agent: FakeAgent) -> None:
    agent.acknowledges = False
    run_id = await execute(rig)
    await agent.runs()
    await agent.cut()
    await cancel(rig, run_id)
    assert await state_of(rig, run_id) == tpb.RUN_STATE_QUEUED  # the node may have it
    await back(agent)
    assert await state_of(rig, run_id) == tpb.RUN_STATE_CANCELLED
    assert not agent.commands
    assert await differences(rig, run_id) == [("cancelled before it was confirmed", "cancelled")]


async def test_finished_while_away_is_recorded_by_its_report(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    await back(agent, holds(order, tpb.RUN_STATE_SUCCEEDED))
    assert await state_of(rig, run_id) == tpb.RUN_STATE_DISPATCHED
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    await agent.until(lambda: sequence in agent.acks)
    assert await state_of(rig, run_id) == tpb.RUN_STATE_SUCCEEDED
    assert await differences(rig, run_id) == [("succeeded while away", "its report is awaited")]
    assert len(await events_of(rig, "run.finished")) == 1


async def test_cancelled_while_away_is_told_to_stop_as_often_as_it_comes_back(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    await agent.cut()
    await cancel(rig, run_id)
    for _ in range(3):
        await back(agent, holds(order, tpb.RUN_STATE_RUNNING))
        [wish] = await agent.cancels()
        assert wish.run_id == run_id
    assert await differences(rig, run_id) == [("cancelled while away", "told to stop")]  # recorded once


async def test_unknown_to_the_server_is_left_alone_and_reported_once(rig: Rig, agent: FakeAgent) -> None:
    stranger = tpb.HeldRun(run_id="rstranger", lease_id="l1", state=tpb.RUN_STATE_RUNNING)
    for _ in range(3):
        await back(agent, stranger)
        assert not agent.commands
    found = await events_of(rig, "run.unrecognised")
    assert [event.subject for event in found] == ["rstranger"]
    await back(agent)
    await back(agent, stranger)  # gone, and there again: that is news
    assert len(await events_of(rig, "run.unrecognised")) == 2


async def test_unknown_to_the_agent_is_unknown_after_a_grace_that_reconnecting_does_not_begin_anew(
    rig: Rig, agent: FakeAgent
) -> None:
    run_id = await execute(rig)
    await agent.runs()
    began = asyncio.get_running_loop().time()

    async def is_unknown() -> bool:
        await back(agent)  # every time the grace would begin anew
        return await state_of(rig, run_id) == tpb.RUN_STATE_UNKNOWN

    await until(is_unknown)
    assert asyncio.get_running_loop().time() - began >= 0.3
    run = await run_of(rig, run_id)
    assert run.failure.code == "lost_by_node"
    assert await differences(rig, run_id) == [("unknown to the node", "its last report is awaited")]


async def test_a_last_report_within_the_grace_is_what_counts(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    await back(agent)
    sequence = await agent.report(order, tpb.RUN_STATE_FAILED, step(tpb.STEP_STATE_FAILED))
    await agent.until(lambda: sequence in agent.acks)
    await asyncio.sleep(0.5)
    assert await state_of(rig, run_id) == tpb.RUN_STATE_FAILED


async def test_over_on_the_server_is_told_to_stop_whatever_its_lease(rig: Rig, agent: FakeAgent) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    await agent.cut()
    await rig.server._services.db.write(
        Commit.RUN_SETTLED, lambda c: runs.settle(c, run_id, runs.FAILED, tpb.Failure(code="x", message="x"))
    )
    for lease_id in ("", "of-before"):
        await back(agent, holds(order, tpb.RUN_STATE_RUNNING, lease_id))
        [wish] = await agent.cancels()
        assert wish.run_id == run_id
    assert await differences(rig, run_id) == [("over here, running there", "told to stop")]
    assert not await events_of(rig, "run.unrecognised")


async def unknown_run(rig: Rig, agent: FakeAgent, **fields: Any) -> npb.RunPipeline:
    run_id = await execute(rig, **fields)
    [order] = await agent.runs()
    await back(agent)

    async def is_unknown() -> bool:
        return await state_of(rig, run_id) == tpb.RUN_STATE_UNKNOWN

    await until(is_unknown)
    return order


async def test_unknown_on_the_server_goes_on_where_the_node_has_it_after_all(rig: Rig, agent: FakeAgent) -> None:
    order = await unknown_run(rig, agent)
    await back(agent, holds(order, tpb.RUN_STATE_RUNNING))
    run = await run_of(rig, order.run_id)
    assert run.state == tpb.RUN_STATE_RUNNING
    assert not run.HasField("failure")
    assert ("unknown here, running there", "goes on") in await differences(rig, order.run_id)


async def test_unknown_on_the_server_is_stopped_where_another_run_has_its_object_by_now(
    rig: Rig, agent: FakeAgent
) -> None:
    async with rig.operator() as control:
        await control.SetObject(
            cpb.SetObjectRequest(request_id=rig.request_id(), ref=ARENA, attributes_json=b"{}"), timeout=TIMEOUT
        )
    order = await unknown_run(rig, agent, object=ARENA)
    agent.commands.clear()
    await execute(rig, object=ARENA)
    [second] = await agent.runs()
    await back(agent, holds(order, tpb.RUN_STATE_RUNNING), holds(second, tpb.RUN_STATE_RUNNING))
    [wish] = await agent.cancels()
    assert wish.run_id == order.run_id
    assert await state_of(rig, order.run_id) == tpb.RUN_STATE_UNKNOWN


async def test_a_full_report_is_asked_for_when_the_digests_differ_and_nothing_explains_it(
    rig: Rig, agent: FakeAgent
) -> None:
    run_id = await execute(rig)
    [order] = await agent.runs()
    await agent.until(lambda: agent.commands)

    async def wanted(held: list[tpb.HeldRun], depth: int = 0) -> bool:
        agent.heartbeats.clear()
        await agent.heartbeat(digest=held_digest(held), depth=depth)
        await agent.until(lambda: agent.heartbeats)
        return agent.heartbeats[-1].full_report_wanted

    async def is_dispatched() -> bool:
        return await state_of(rig, run_id) == tpb.RUN_STATE_DISPATCHED

    await until(is_dispatched)
    same = [holds(order, tpb.RUN_STATE_DISPATCHED)]
    ahead = [holds(order, tpb.RUN_STATE_RUNNING)]
    assert not await wanted(same)
    assert not await wanted(ahead, depth=1)  # the report of it is on its way
    assert not await wanted(ahead, depth=1)
    assert not await wanted(ahead)  # it may have crossed the heartbeat
    assert await wanted(ahead)
    agent.held = ahead
    await agent.full_report()
    assert not await wanted(ahead)  # the difference is known: it is not asked again at every heartbeat
    assert not await wanted(ahead)
    assert not await wanted(same)


async def test_between_reports_only_differences_travel(
    tmp_path: Path, runtime: FakeRuntime, shell: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole agent: runs come and go through ten heartbeats, and no full report is asked for or sent."""
    reports: list[int] = []
    reconcile = Dispatcher.reconcile

    async def counted(self: Dispatcher, channel: Any, report: tpb.FullReport) -> None:
        reports.append(len(report.runs))
        await reconcile(self, channel, report)

    monkeypatch.setattr(Dispatcher, "reconcile", counted)
    async with served(tmp_path / "server", heartbeat_interval_s=0.2) as server:
        token = await whole.add_node(server)
        async with whole.agent_of(server, tmp_path, token, runtime):
            await whole.online(server)
            run = await whole.execute(server, whole.steps("one"))
            await whole.ended(server, run.run_id)
            first = len(reports)
            assert 1 <= first <= 2
            for _ in range(3):
                run = await whole.execute(server, whole.steps("slow", "one"))
                assert (await whole.ended(server, run.run_id)).state == tpb.RUN_STATE_SUCCEEDED
    assert len(reports) == first

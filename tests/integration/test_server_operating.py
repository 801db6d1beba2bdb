"""Settling, retrying and draining through a real server, as operators do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from outrider import wire
from outrider.errors import Conflict, InvalidInput, Unavailable
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import types_pb2 as tpb
from tests.integration.server_rig import TIMEOUT, FakeAgent, Rig, refused, served, step

PIPELINE = b"""\
name: two
steps:
  - {name: one, uses: test.echo, with: {text: hello}}
  - {name: two, uses: test.echo, with: {text: "${{ steps.one.outputs.said }}"}}
"""
SUCCEEDED, FAILED, UNKNOWN = tpb.STEP_STATE_SUCCEEDED, tpb.STEP_STATE_FAILED, tpb.STEP_STATE_UNKNOWN
Control = cgrpc.ControlServiceStub
RETRY, AS_SUCCEEDED = tpb.Settlement.VERDICT_RETRY, tpb.Settlement.VERDICT_SUCCEEDED


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with served(tmp_path / "server", heartbeat_interval_s=30) as rig:
        yield rig


async def execute(rig: Rig, control: Control, **fields: Any) -> tpb.Run:
    request = cpb.ExecutePipelineRequest(
        **({"request_id": rig.request_id(), "pipeline_yaml": PIPELINE, "node_id": "n1"} | fields)
    )
    return await control.ExecutePipeline(request, timeout=TIMEOUT)


async def ended(rig: Rig, control: Control, agent: FakeAgent, state: Any, *steps: tpb.StepStatus) -> tpb.Run:
    """A run that its node has brought to this end."""
    count = len(agent._runs())
    run = await execute(rig, control)
    order = (await agent.runs(count + 1))[count]
    sequence = await agent.report(order, state, *steps)
    await agent.until(lambda: sequence in agent.acks)
    return await control.GetRun(cpb.GetRunRequest(run_id=run.run_id), timeout=TIMEOUT)


async def retry(rig: Rig, control: Control, run_id: str, **fields: Any) -> tpb.Run:
    request = cpb.RetryRunRequest(**({"request_id": rig.request_id(), "run_id": run_id} | fields))
    return await control.RetryRun(request, timeout=TIMEOUT)


async def resolve(rig: Rig, control: Control, run_id: str, verdict: Any, *steps: str, **fields: Any) -> tpb.Run:
    request = cpb.ResolveRunRequest(
        **({"request_id": rig.request_id(), "run_id": run_id, "verdict": verdict, "reason": "looked"} | fields),
        steps=steps,
    )
    return await control.ResolveRun(request, timeout=TIMEOUT)


async def drain(rig: Rig, control: Control, **fields: Any) -> tpb.Node:
    request = cpb.DrainNodeRequest(request_id=rig.request_id(), node_id="n1", **fields)
    return await control.DrainNode(request, timeout=TIMEOUT)


async def node_until(control: Control, holds: Any) -> tpb.Node:
    async with asyncio.timeout(TIMEOUT):
        while not holds(node := await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)):
            await asyncio.sleep(0.02)
    return node


async def audited(control: Control) -> list[tuple[str, str]]:
    entries = (await control.ListAudit(cpb.ListAuditRequest(), timeout=TIMEOUT)).entries
    return [(entry.verb, entry.reason) for entry in entries]


async def test_a_retry_sends_the_node_what_the_old_run_finished(rig: Rig, control: Control, agent: FakeAgent) -> None:
    one = step(SUCCEEDED, name="one", outputs_json=b'{"said":"hi"}', stdout_bytes=9)
    old = await ended(rig, control, agent, tpb.RUN_STATE_FAILED, one, step(FAILED, name="two"))
    made = await retry(rig, control, old.run_id, request_id="again", reason="the bucket is back")
    order = (await agent.runs(2))[1]
    assert (order.run_id, order.args_json, order.pipeline_yaml) == (made.run_id, b"{}", PIPELINE)
    assert [(each.name, each.outputs_json, each.from_run) for each in order.finished] == [
        ("one", b'{"said":"hi"}', old.run_id)
    ]
    assert (made.retry_of, made.steps[0].state) == (old.run_id, SUCCEEDED)
    assert made.steps[0].stdout_bytes == 0  # its log stays where it is: nobody waits for it here
    # The same request again is the same run, also now that the old one could not be retried any more.
    assert (
        await retry(rig, control, old.run_id, request_id="again", reason="the bucket is back")
    ).run_id == made.run_id
    error = await refused(retry(rig, control, old.run_id))
    assert (type(error), error.code) == (Conflict, "already_retried")
    shown = await control.GetRun(cpb.GetRunRequest(run_id=old.run_id), timeout=TIMEOUT)
    assert shown.retried_by == made.run_id
    assert ("retry", "the bucket is back") in await audited(control)


async def test_what_succeeded_or_is_under_way_is_not_retried(rig: Rig, control: Control, agent: FakeAgent) -> None:
    good = await ended(
        rig, control, agent, tpb.RUN_STATE_SUCCEEDED, step(SUCCEEDED, name="one"), step(SUCCEEDED, name="two")
    )
    assert (await refused(retry(rig, control, good.run_id))).code == "run_succeeded"
    open_ = await execute(rig, control)
    assert (await refused(retry(rig, control, open_.run_id))).code == "run_active"
    bad = await ended(rig, control, agent, tpb.RUN_STATE_FAILED, step(FAILED, name="one"))
    await agent.cut()
    await node_until(control, lambda node: not node.online)
    assert isinstance(await refused(retry(rig, control, bad.run_id)), Unavailable)
    assert (await retry(rig, control, bad.run_id, allow_offline=True)).state == tpb.RUN_STATE_QUEUED


async def test_an_operator_settles_what_is_unknown_and_the_rest_is_carried_out(
    rig: Rig, control: Control, agent: FakeAgent
) -> None:
    run = await ended(
        rig, control, agent, tpb.RUN_STATE_UNKNOWN, step(UNKNOWN, name="one"), step(tpb.STEP_STATE_SKIPPED, name="two")
    )
    assert (await refused(retry(rig, control, run.run_id))).code == "outcome_unknown"
    error = await refused(resolve(rig, control, run.run_id, AS_SUCCEEDED, "one", reason=" "))
    assert (type(error), error.code) == (InvalidInput, "reason_missing")
    error = await refused(resolve(rig, control, run.run_id, AS_SUCCEEDED, "one", outputs_json=b'{"said": 3}'))
    assert isinstance(error, InvalidInput)
    assert "outputs.said" in str(error)
    settled = await resolve(rig, control, run.run_id, AS_SUCCEEDED, "one", outputs_json=b'{"said": "hi"}')
    assert (settled.state, settled.failure.code) == (tpb.RUN_STATE_FAILED, "not_completed")
    assert settled.steps[0].settlement.by == "admin"
    assert not settled.retried_by
    made = await retry(rig, control, run.run_id)
    order = (await agent.runs(2))[1]
    assert order.run_id == made.run_id
    assert [(each.name, each.outputs_json) for each in order.finished] == [("one", b'{"said":"hi"}')]
    assert ("resolve", "looked") in await audited(control)
    verdict = await control.VerifyAudit(cpb.VerifyAuditRequest(), timeout=TIMEOUT)
    assert (verdict.problem, verdict.rows) == ("", 3)  # the node, the settling, the retry


async def test_settled_as_retry_the_run_is_tried_again_once(rig: Rig, control: Control, agent: FakeAgent) -> None:
    run = await ended(
        rig, control, agent, tpb.RUN_STATE_UNKNOWN, step(SUCCEEDED, name="one"), step(UNKNOWN, name="two")
    )
    first = await resolve(rig, control, run.run_id, RETRY, "two", request_id="settle")
    assert await resolve(rig, control, run.run_id, RETRY, "two", request_id="settle") == first
    order = (await agent.runs(2))[1]
    assert (order.run_id, [each.name for each in order.finished]) == (first.retried_by, ["one"])
    assert len((await control.ListRuns(cpb.ListRunsRequest(), timeout=TIMEOUT)).runs) == 2
    late = await agent.report((await agent.runs())[0], tpb.RUN_STATE_SUCCEEDED, step(SUCCEEDED, name="two"))
    await agent.until(lambda: late in agent.acks)
    after = await control.GetRun(cpb.GetRunRequest(run_id=run.run_id), timeout=TIMEOUT)
    assert (after.state, after.steps[1].state) == (tpb.RUN_STATE_FAILED, FAILED)


async def test_a_node_is_drained_when_server_and_node_agree_that_it_is_empty(
    rig: Rig, control: Control, agent: FakeAgent
) -> None:
    run = await execute(rig, control)
    [order] = await agent.runs()
    node = await drain(rig, control, reason="new disk")
    assert (node.drain.drained, list(node.drain.runs), node.drain.by) == (False, [run.run_id], "admin")
    error = await refused(execute(rig, control))
    assert (type(error), error.code) == (Conflict, "node_draining")
    assert "new disk" in str(error)
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(SUCCEEDED, name="one"))
    await agent.until(lambda: sequence in agent.acks)
    await node_until(control, lambda node: node.drain.drained)
    await agent.cut()
    node = await node_until(control, lambda node: not node.online)
    assert node.drain.drained  # that is what it was drained for
    await drain(rig, control, undo=True)
    assert (await execute(rig, control, allow_offline=True)).state == tpb.RUN_STATE_QUEUED
    assert [verb for verb, _ in await audited(control)][:2] == ["undrain", "drain"]


async def test_a_node_is_not_drained_while_it_has_logs_to_hand_in(rig: Rig, control: Control, agent: FakeAgent) -> None:
    await execute(rig, control)
    [order] = await agent.runs()
    await drain(rig, control)
    agent.brief.log_bytes = 4711  # said first after the end of its run: what came before is of the past
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(SUCCEEDED, name="one"))
    await agent.until(lambda: sequence in agent.acks)
    await node_until(control, lambda node: node.drain.waits_for == "it has 4711 bytes of logs to hand in")
    await asyncio.sleep(0.7)  # longer than the server takes between two looks
    assert not (await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)).drain.drained
    agent.brief.log_bytes = 0
    await agent.heartbeat()
    await node_until(control, lambda node: node.drain.drained)


async def test_a_node_that_is_away_is_not_called_drained(rig: Rig, control: Control, agent: FakeAgent) -> None:
    await agent.cut()
    await node_until(control, lambda node: not node.online)
    node = await drain(rig, control)
    assert not node.drain.drained
    assert node.drain.waits_for == "it is offline, and what it has can't be known"
    await agent.connect(report=False)
    await asyncio.sleep(0.7)  # longer than the server takes between two looks
    assert not (await control.GetNode(cpb.GetNodeRequest(node_id="n1"), timeout=TIMEOUT)).drain.drained
    agent.held = [tpb.HeldRun(run_id="rstranger", lease_id="l", state=tpb.RUN_STATE_RUNNING)]
    brief = tpb.BriefState(engine_ok=True, runs=["rstranger"])
    await agent.send(full_report=tpb.FullReport(runs=agent.held, brief=brief))
    await node_until(control, lambda node: list(node.drain.runs) == ["rstranger"] and not node.drain.drained)
    agent.held = []
    await agent.full_report()
    await node_until(control, lambda node: node.drain.drained)


async def test_the_deadline_of_a_drain_cancels_what_still_runs_also_after_a_restart_of_the_server(
    rig: Rig, control: Control, agent: FakeAgent
) -> None:
    run = await execute(rig, control)
    [order] = await agent.runs()
    await agent.report(order, tpb.RUN_STATE_RUNNING, step(tpb.STEP_STATE_RUNNING, name="one"))
    await drain(rig, control, deadline=wire.duration(2.0), reason="new disk")
    await rig.restart()
    await agent.until(lambda: agent.error is not None)
    assert agent.session is not None
    await agent.register(agent.session.session_id)
    agent.held = [tpb.HeldRun(run_id=run.run_id, lease_id=run.lease_id, state=tpb.RUN_STATE_RUNNING)]
    await agent.connect()
    [cancel] = await agent.cancels()
    assert (cancel.run_id, cancel.reason) == (run.run_id, "the deadline of the drain of node n1 is over (new disk)")
    agent.held = []
    await agent.report(order, tpb.RUN_STATE_CANCELLED, step(tpb.STEP_STATE_CANCELLED, name="one"))
    async with rig.operator() as again:
        await node_until(again, lambda node: node.drain.drained)


async def test_what_was_accepted_and_not_sent_waits_until_the_drain_is_undone(
    rig: Rig, control: Control, agent: FakeAgent
) -> None:
    await agent.cut()
    await node_until(control, lambda node: not node.online)
    run = await execute(rig, control, allow_offline=True)
    await drain(rig, control)
    agent.error = None
    await agent.connect()
    await node_until(control, lambda node: node.drain.drained)
    assert not agent.commands
    waiting = await control.GetRun(cpb.GetRunRequest(run_id=run.run_id), timeout=TIMEOUT)
    assert (waiting.state, waiting.reason) == (tpb.RUN_STATE_QUEUED, "node n1 is being drained")
    await drain(rig, control, undo=True)
    assert [order.run_id for order in await agent.runs()] == [run.run_id]

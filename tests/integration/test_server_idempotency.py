"""One key is one run, one version one change, one write-back one change: however many ask at once, and who restarts."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc

from outrider.errors import Conflict, OutriderError
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as tpb
from outrider.wire import from_rpc_error
from server_core.security import tokens
from server_core.store import tokens as token_rows
from server_core.store.commits import Commit
from tests.integration.server_rig import PIPELINE, TIMEOUT, FakeAgent, Rig, refused, step

ARENA = tpb.ObjectRef(kind="game", name="arena")
MANY = 24


def request(number: object, **fields: Any) -> cpb.ExecutePipelineRequest:
    given = {"request_id": f"q{number}", "pipeline_yaml": PIPELINE, "node_id": "n1", "key": "deploy-7"}
    return cpb.ExecutePipelineRequest(**(given | fields))


async def execute(rig: Rig, message: cpb.ExecutePipelineRequest, token: str | None = None) -> tpb.Run:
    """Over a connection of its own."""
    async with rig.operator(token) as control:
        return await control.ExecutePipeline(message, timeout=TIMEOUT)


async def listed(rig: Rig) -> list[tpb.Run]:
    async with rig.operator() as control:
        return list((await control.ListRuns(cpb.ListRunsRequest(), timeout=TIMEOUT)).runs)


async def test_many_that_ask_at_once_with_one_key_get_one_run(rig: Rig, agent: FakeAgent) -> None:
    answers = await asyncio.gather(*(execute(rig, request(number)) for number in range(MANY)))
    assert len({run.run_id for run in answers}) == 1
    assert len(await listed(rig)) == 1
    [order] = await agent.runs()
    await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    async with rig.operator() as control, asyncio.timeout(TIMEOUT):
        watch = control.WatchRun(cpb.WatchRunRequest(run_id=order.run_id), timeout=TIMEOUT)
        assert [run.state async for run in watch][-1] == tpb.RUN_STATE_SUCCEEDED
    again = await execute(rig, request("later"))
    assert (again.run_id, again.state) == (order.run_id, tpb.RUN_STATE_SUCCEEDED)
    assert len(agent._runs()) == 1


async def test_key_stands_for_its_run_across_restarts_though_all_that_it_was_checked_against_is_gone(
    rig: Rig, agent: FakeAgent
) -> None:
    async with rig.operator() as control:
        await control.SetObject(cpb.SetObjectRequest(request_id="o", ref=ARENA), timeout=TIMEOUT)
    first = await execute(rig, request(1, object=ARENA))
    [order] = await agent.runs()
    await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    await agent.until(lambda: agent.acks)
    async with rig.operator() as control:
        await control.RemoveObject(cpb.RemoveObjectRequest(request_id="x", ref=ARENA), timeout=TIMEOUT)
    await agent.stop()
    for _ in range(2):
        await rig.restart()
        again = await execute(rig, request("later", object=ARENA))
        assert (again.run_id, again.state) == (first.run_id, tpb.RUN_STATE_SUCCEEDED)
    assert len(await listed(rig)) == 1


async def test_one_key_with_different_requests_at_once_is_one_run_and_refusals_that_name_it(
    rig: Rig, agent: FakeAgent
) -> None:
    texts = [PIPELINE.replace(b"hello", b"hello %d" % number) for number in range(MANY)]
    calls = (execute(rig, request(number, pipeline_yaml=text)) for number, text in enumerate(texts))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    [made] = [answer for answer in answers if isinstance(answer, tpb.Run)]
    refusals = [from_rpc_error(answer) for answer in answers if isinstance(answer, grpc.RpcError)]
    assert len(refusals) == MANY - 1
    assert {error.code for error in refusals} == {"key_reused"}
    assert all(made.run_id in str(error) and "deploy-7" in str(error) for error in refusals)
    assert [run.run_id for run in await listed(rig)] == [made.run_id]


async def test_key_is_its_callers_own(rig: Rig, agent: FakeAgent) -> None:
    token = tokens.mint(tokens.OPERATOR_PREFIX)
    other = token_rows.Caller(token_rows.OPERATOR, "platform", "admin", tokens.digest(token))
    await rig.server._services.db.write(Commit.SERVER_INIT, lambda c: token_rows.add(c, other))
    mine, theirs = await execute(rig, request(1)), await execute(rig, request(1), token)
    assert mine.run_id != theirs.run_id
    assert (await execute(rig, request(2), token)).run_id == theirs.run_id


async def test_of_many_changes_to_one_version_one_is_made_and_the_others_are_told(rig: Rig) -> None:
    async def change(control: cgrpc.ControlServiceStub, number: int, version: int) -> tpb.Object | OutriderError:
        wish = cpb.SetObjectRequest(
            request_id=f"v{version}-{number}",
            ref=ARENA,
            attributes_json=b'{"n": %d}' % (version * 1000 + number),  # what is so already is no change
            expected_version=version,
        )
        try:
            return await control.SetObject(wish, timeout=TIMEOUT)
        except grpc.RpcError as error:
            return from_rpc_error(error)

    async with rig.operator() as control:
        for version in range(4):  # 0: it must not be there yet
            answers = await asyncio.gather(*(change(control, number, version) for number in range(MANY)))
            [made] = [answer for answer in answers if isinstance(answer, tpb.Object)]
            assert made.version == version + 1
            errors = [answer for answer in answers if isinstance(answer, OutriderError)]
            assert len(errors) == MANY - 1
            assert all(isinstance(error, Conflict) and error.code == "version_conflict" for error in errors)
            assert all(f"version {version + 1}" in error.message for error in errors)
            found = await control.GetObject(cpb.GetObjectRequest(ref=ARENA), timeout=TIMEOUT)
            assert found == made


async def test_stale_versions_are_refused_for_env_sets_and_across_restarts(rig: Rig) -> None:
    async with rig.operator() as control:
        for version in (0, 1):
            wish = cpb.SetEnvSetRequest(
                request_id=f"e{version}", name="builds", values={"K": "v"}, expected_version=version
            )
            assert (await control.SetEnvSet(wish, timeout=TIMEOUT)).version == version + 1
    await rig.restart()
    async with rig.operator() as control:
        wish = cpb.SetEnvSetRequest(request_id="late", name="builds", values={"K": "w"}, expected_version=1)
        error = await refused(control.SetEnvSet(wish, timeout=TIMEOUT))
        assert (error.code, error.hint) == ("version_conflict", "read it again, then change it")
        assert error.message == "env set builds has version 2, not 1"
        # What was done is answered as it was, however stale it is by now.
        again = cpb.SetEnvSetRequest(request_id="e0", name="builds", values={"K": "v"}, expected_version=0)
        assert (await control.SetEnvSet(again, timeout=TIMEOUT)).version == 1


async def test_write_back_counts_once_however_often_and_whenever_it_comes(rig: Rig, agent: FakeAgent) -> None:
    async with rig.operator() as control:
        await control.SetObject(cpb.SetObjectRequest(request_id="o", ref=ARENA), timeout=TIMEOUT)
        first, second = [await order_of(rig, agent, number) for number in (1, 2)]
        wish = write_back(first, b"27960")
        answers = await asyncio.gather(*(agent.stub.WriteBack(wish, timeout=TIMEOUT) for _ in range(MANY)))
        assert Counter(answer.status_version for answer in answers) == {1: MANY}
        assert (await agent.stub.WriteBack(write_back(second, b"1"), timeout=TIMEOUT)).status_version == 2
        # A straggler of the first, and its repetition after a restart: neither changes anything.
        await agent.cut()
        await rig.restart()
    late = FakeAgent(rig, "n1", agent.token)
    await late.register()
    assert (await late.stub.WriteBack(wish, timeout=TIMEOUT)).status_version == 1
    async with rig.operator() as control:
        found = await control.GetObject(cpb.GetObjectRequest(ref=ARENA), timeout=TIMEOUT)
        assert (found.status_json, found.status_version) == (b'{"port":1}', 2)
    changed = await refused(late.stub.WriteBack(write_back(first, b"5"), timeout=TIMEOUT))
    assert changed.code == "request_id_reused"
    await late.stop()


async def test_write_back_of_a_run_does_not_reach_another_object_of_the_same_name(rig: Rig, agent: FakeAgent) -> None:
    async with rig.operator() as control:
        await control.SetObject(cpb.SetObjectRequest(request_id="o", ref=ARENA), timeout=TIMEOUT)
        order = await order_of(rig, agent, 1)
        await control.RemoveObject(cpb.RemoveObjectRequest(request_id="x", ref=ARENA), timeout=TIMEOUT)
        await control.SetObject(cpb.SetObjectRequest(request_id="o2", ref=ARENA), timeout=TIMEOUT)
        assert (await agent.stub.WriteBack(write_back(order, b"27960"), timeout=TIMEOUT)).status_version == 0
        found = await control.GetObject(cpb.GetObjectRequest(ref=ARENA), timeout=TIMEOUT)
        assert (found.status_json, found.status_version) == (b"{}", 0)


async def order_of(rig: Rig, agent: FakeAgent, number: int) -> npb.RunPipeline:
    """A run of the arena that its node has finished and not written back yet."""
    run = await execute(rig, request(number, key=f"k{number}", object=ARENA))
    order = (await agent.runs(number))[-1]
    assert order.run_id == run.run_id
    sequence = await agent.report(order, tpb.RUN_STATE_SUCCEEDED, step(tpb.STEP_STATE_SUCCEEDED))
    await agent.until(lambda: sequence in agent.acks)
    return order


def write_back(order: npb.RunPipeline, value: bytes) -> npb.WriteBackRequest:
    return npb.WriteBackRequest(
        request_id=f"{order.run_id}:{order.lease_id}",
        run=npb.RunRef(run_id=order.run_id, lease_id=order.lease_id),
        attributes=[npb.WriteBackRequest.Attribute(name="port", value_json=value)],
    )

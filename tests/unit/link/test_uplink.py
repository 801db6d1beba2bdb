"""What waits on the node for the server: kept while it is the link that fails, placed where the server wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent_core.journal import Journal
from agent_core.outbox import Outbox
from agent_core.reconnect import SUPERSEDED
from agent_core.spool import LogKey, Spool
from agent_core.state import State, migrations
from agent_core.transitions import Transition
from agent_core.uplink import Uplink
from outrider import wire
from outrider.errors import Conflict, NotFound, OutriderError, Unauthenticated, Unavailable
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

OUT = types.LOG_STREAM_STDOUT
LOST = Unavailable("the connection was reset")


def rpc_error(error: OutriderError) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata((wire.STATUS_DETAILS_KEY, wire.to_status(error).SerializeToString()))
    return grpc.aio.AioRpcError(wire.status_code(error), grpc.aio.Metadata(), trailers, str(error))


class LogCall:
    """A StreamRunLogs call that reads batches until ``ends`` says how it ends."""

    def __init__(self, batches: AsyncIterator[pb.RunLogBatch]) -> None:
        self.batches = batches
        self.got: list[tuple[int, bytes]] = []
        self.ends: asyncio.Future[pb.RunLogAck] = asyncio.get_running_loop().create_future()
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        # As gRPC does, it goes on asking after the call has ended.
        async for batch in self.batches:
            self.got += [(chunk.offset, chunk.data) for chunk in batch.chunks]

    def __await__(self) -> Any:
        return self.ends.__await__()

    def cancel(self) -> None:
        self.ends.cancel()


class Server:
    """In the place of the stub."""

    def __init__(self) -> None:
        self.write_backs: list[str] = []
        self.refusals: list[OutriderError] = []
        self.log_calls: list[LogCall] = []

    async def WriteBack(self, request: pb.WriteBackRequest, timeout: float) -> pb.WriteBackResponse:
        assert timeout
        if self.refusals:
            raise rpc_error(self.refusals.pop(0))
        self.write_backs.append(request.run.run_id)
        return pb.WriteBackResponse()

    async def ReportEvents(self, batches: AsyncIterator[pb.EventBatch], timeout: float) -> pb.ReportEventsResponse:
        assert timeout
        numbers = [event.sequence async for batch in batches for event in batch.events]
        return pb.ReportEventsResponse(acknowledged=max(numbers))

    def StreamRunLogs(self, batches: AsyncIterator[pb.RunLogBatch]) -> LogCall:
        self.log_calls.append(LogCall(batches))
        return self.log_calls[-1]


class Node:
    def __init__(self, path: Path) -> None:
        self.journal = Journal(path / "journal.db", migrations())
        self.outbox = Outbox(self.journal)
        self.spool = Spool(path / "spool", self.journal)
        self.uplink = Uplink(self.outbox, self.spool)
        self.sent: list[pb.RunReport] = []
        self.server = Server()

    def connect(self) -> asyncio.Task[None]:
        async def room() -> None:
            return

        stub: Any = self.server
        return asyncio.create_task(self.uplink.run(stub, lambda m: self.sent.append(m.run_report), room))

    async def add(self, *run_ids: str) -> None:
        requests = [pb.WriteBackRequest(run=pb.RunRef(run_id=each)) for each in run_ids]
        changes = [self.outbox.write_back(each) for each in requests]
        changes += [self.outbox.run_report(pb.RunReport(run_id=each)) for each in run_ids]
        await State(self.journal).commit(Transition.RUN_FINISHED, *changes)
        self.outbox.notify()

    def waiting(self) -> list[str]:
        return [item.run_id for item in self.outbox.read(("write_back",))]

    async def log(self, run_id: str, data: bytes, *, done: bool = False) -> None:
        file = (await self.spool.open(run_id, "a", 1))["stdout"]
        if data:
            assert self.spool.append(file, data)
        await self.spool.flush()
        if done:
            await State(self.journal).commit(Transition.ATTEMPT_SETTLED, self.spool.finished(file))
        self.uplink.wake()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    yield made
    made.spool.close()
    made.journal.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@pytest.mark.parametrize("refusal", [Conflict("a newer session", code=SUPERSEDED), Unauthenticated("who are you?")])
async def test_a_write_back_outlives_a_session_and_a_credential_that_are_refused(
    node: Node, refusal: OutriderError
) -> None:
    await node.add("r1", "r2")
    node.server.refusals = [refusal]
    session = node.connect()
    with pytest.raises(BaseExceptionGroup) as raised:
        await asyncio.wait_for(session, 10)
    problem = first_of(raised.value)
    assert isinstance(problem, OutriderError)
    assert problem.code == refusal.code  # it ends the session, whose owner knows what to do
    assert node.waiting() == ["r1", "r2"]
    session = node.connect()
    await until(lambda: node.server.write_backs == ["r1", "r2"])
    await until(lambda: not node.waiting())
    await end(session)


async def test_reports_name_the_outbox_that_numbers_them(tmp_path: Path, node: Node) -> None:
    await node.add("r1")
    session = node.connect()
    await until(lambda: node.sent)
    await end(session)
    assert node.sent[0].outbox_id == node.outbox.id
    assert Outbox(node.journal).id == node.outbox.id  # the next agent's
    rebuilt = Node(tmp_path / "rebuilt")
    assert rebuilt.outbox.id not in ("", node.outbox.id)
    rebuilt.spool.close()
    rebuilt.journal.close()


async def test_a_write_back_that_is_refused_for_itself_holds_up_no_other(node: Node) -> None:
    await node.add("r1", "r2")
    node.server.refusals = [NotFound("no such run", code="unknown_run")]
    session = node.connect()
    await until(lambda: node.server.write_backs == ["r2"])
    await until(lambda: not node.waiting())
    await end(session)


async def test_a_write_back_is_sent_until_the_server_is_able_again(node: Node) -> None:
    unforeseen = OutriderError("the server failed", code="internal")
    await node.add("r1")
    node.server.refusals = [LOST, unforeseen, LOST]
    session = node.connect()
    await until(lambda: node.server.write_backs == ["r1"])
    await end(session)


async def test_a_log_call_that_has_failed_takes_nothing_from_the_next(node: Node) -> None:
    session = node.connect()
    await node.log("r1", b"one ")
    await until(lambda: node.server.log_calls and node.server.log_calls[0].got)
    first = node.server.log_calls[0]
    first.ends.set_exception(rpc_error(LOST))
    await until(lambda: len(node.server.log_calls) == 2)
    second = node.server.log_calls[1]
    for word in (b"two ", b"three ", b"four "):
        count = len(second.got)
        await node.log("r1", word)
        await until(lambda count=count: len(second.got) > count)
    assert first.got == [(0, b"one ")]
    assert b"".join(data for _, data in second.got) == b"one two three four "
    ends = [offset + len(data) for offset, data in second.got]
    assert [offset for offset, _ in second.got] == [0, *ends[:-1]], "each byte once, in order"
    await end(session)


async def test_the_log_of_a_run_that_the_server_does_not_know_is_held_back_and_forgotten_at_its_end(node: Node) -> None:
    session = node.connect()
    await node.log("stranger", b"x")
    await until(lambda: node.server.log_calls and node.server.log_calls[0].got)
    await node.uplink.logs_acknowledged(pb.RunLogAck(unknown_runs=["stranger"]))
    call = node.server.log_calls[0]
    await node.log("stranger", b"y")
    await node.log("r1", b"z")
    await until(lambda: (0, b"z") in call.got)
    assert (1, b"y") not in call.got
    await node.log("stranger", b"", done=True)
    assert not node.journal.query_now("SELECT 1 FROM logs WHERE run_id = 'stranger' AND stream = 'stdout'")
    await end(session)


async def test_a_log_that_a_restored_server_has_less_of_is_sent_again_from_there(node: Node) -> None:
    session = node.connect()
    await node.log("r1", b"0123456789")
    await until(lambda: node.server.log_calls and node.server.log_calls[0].got)
    position = pb.RunLogAck.Position(run_id="r1", step="a", attempt=1, stream=OUT, offset=10)
    await node.uplink.logs_acknowledged(pb.RunLogAck(positions=[position]))
    position.offset = 4
    first = node.server.log_calls[0]
    first.ends.set_result(pb.RunLogAck(resend=[position]))
    await until(lambda: len(node.server.log_calls) == 2 and node.server.log_calls[1].got)
    assert node.server.log_calls[1].got == [(4, b"456789")]
    await end(session)


async def test_a_finished_log_is_kept_until_all_of_it_is_acknowledged(node: Node) -> None:
    session = node.connect()
    await node.log("r1", b"0123", done=True)
    await until(lambda: node.server.log_calls and node.server.log_calls[0].got)
    key = LogKey("r1", "a", 1, "stdout")
    await node.spool.acknowledge(key, 3)
    assert node.journal.query_now("SELECT 1 FROM logs WHERE run_id = 'r1' AND stream = 'stdout'")
    await node.spool.acknowledge(key, 4)
    assert not node.journal.query_now("SELECT 1 FROM logs WHERE run_id = 'r1' AND stream = 'stdout'")
    await end(session)

"""The uplink: everything that the server must learn, sent until it says that it has it.

Run reports and write-backs go in the order of the outbox, so that whoever sees a run's end also sees what the
run wrote back. Events and logs have calls of their own and delay neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

import grpc
import structlog
import zstandard

from agent_core.differences import Differences
from agent_core.outbox import Item, Outbox
from agent_core.reconnect import SUPERSEDED
from agent_core.runtimes.base import StreamName
from agent_core.spool import WIRE_STREAM, LogFile, LogKey, Spool
from outrider.errors import OutriderError, PermissionDenied, Unauthenticated
from outrider.retry import FOREVER, OperationCounts
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.v1 import types_pb2 as types
from outrider.wire import from_rpc_error

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 30.0
EVENT_BATCH = 200
REPORT_BATCH = 200
REPORT_FLUSH_S = 0.01  # the end of a step and the beginning of the next lie closer together
EVENT_FLUSH_S = 0.2
LOG_CHUNK_BYTES = 128 * 1024
LOG_FLUSH_S = 0.05
LOG_IDLE_S = 10.0
COMPRESS_FROM_BYTES = 1024
_NAME_OF_STREAM: dict[int, StreamName] = {types.LOG_STREAM_STDOUT: "stdout", types.LOG_STREAM_STDERR: "stderr"}

Send = Callable[[pb.AgentMessage], None]
Room = Callable[[], Awaitable[None]]
_UNFORESEEN_TRIES = 5


def of_the_link(problem: OutriderError) -> bool:
    """Whether a call was refused for the connection that it came on, and not for what it asked: the session is not the
    newest any more, or the credential is not taken. The same may succeed in the next session."""
    return problem.code == SUPERSEDED or isinstance(problem, (Unauthenticated, PermissionDenied))


class Uplink:
    """Sends what outbox and spool hold over one connection after another."""

    def __init__(self, outbox: Outbox, spool: Spool, operations: OperationCounts | None = None) -> None:
        self._operations = operations or OperationCounts()
        self._outbox = outbox
        self._spool = spool
        self._reports = asyncio.Event()
        self._merged: dict[int, list[int]] = {}  # outbox numbers told in one report, by the number that it went under
        self._events = asyncio.Event()
        self._logs = asyncio.Event()
        self._log_stream = 0

    def wake(self) -> None:
        """Look again for something to send."""
        for each in (self._reports, self._events, self._logs):
            each.set()

    async def run(self, stub: pb_grpc.NodeServiceAsyncStub, send: Send, room: Room) -> None:
        """Serve one connection until it ends; what it did not acknowledge is sent again on the next."""
        self._spool.rewind()
        self._merged.clear()
        self.wake()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_outbox())
            tasks.create_task(self._watch_spool())
            tasks.create_task(self._send_reports(stub, send, room))
            tasks.create_task(self._send_events(stub))
            tasks.create_task(self._send_logs(stub))

    async def acknowledged(self, sequences: Iterable[int]) -> None:
        """The server has these run reports."""
        await self._outbox.acknowledge(
            [each for sequence in sequences for each in self._merged.pop(sequence, [sequence])]
        )

    async def logs_acknowledged(self, ack: pb.RunLogAck) -> None:
        """The server has these logs up to these offsets, wants some from an earlier one, and others not at all."""
        for key, offset in _placed(ack.positions):
            await self._spool.acknowledge(key, offset)
        for key, offset in _placed(ack.resend):
            log.warning("the server goes back in a log", run=key.run_id, step=key.step, offset=offset)
            self._spool.go_back(key, offset)
        for run_id in ack.unknown_runs:
            self._spool.set_aside(run_id)

    async def _watch_outbox(self) -> None:
        loop = asyncio.get_running_loop()
        flush: asyncio.TimerHandle | None = None
        try:
            while True:
                await self._outbox.wait()
                self._events.set()
                if self._outbox.urgent:
                    self._outbox.urgent = False
                    self._reports.set()
                elif flush is None or flush.when() <= loop.time():
                    flush = loop.call_later(REPORT_FLUSH_S, self._reports.set)
        finally:
            if flush is not None:
                flush.cancel()

    async def _watch_spool(self) -> None:
        while True:
            await self._spool.wait()
            self._logs.set()

    # Reports and write-backs.

    async def _send_reports(self, stub: pb_grpc.NodeServiceAsyncStub, send: Send, room: Room) -> None:
        sent = 0
        while True:
            await self._reports.wait()
            self._reports.clear()
            more = True
            while more:
                items = self._outbox.read(("run_report", "write_back"), after=sent, limit=REPORT_BATCH)
                more = len(items) == REPORT_BATCH  # what is committed after this read also wakes after it
                await room()
                differences = Differences()
                for item in items:
                    sent = item.sequence
                    if item.kind == "write_back":
                        self._send_merged(differences, send)
                        await self._write_back(stub, item)
                    else:
                        differences.add(item)
                self._send_merged(differences, send)

    def _send_merged(self, differences: Differences, send: Send) -> None:
        for report, sequences in differences.take():
            if len(sequences) > 1:
                self._merged[report.sequence] = sequences
            report.outbox_id = self._outbox.id
            send(pb.AgentMessage(run_report=report))

    async def _write_back(self, stub: pb_grpc.NodeServiceAsyncStub, item: Item) -> None:
        request = pb.WriteBackRequest.FromString(item.body)
        for tries, wait_s in enumerate(FOREVER.waits(), start=1):
            try:
                await stub.WriteBack(request, timeout=CALL_TIMEOUT_S)
                break
            except grpc.aio.AioRpcError as error:
                problem = from_rpc_error(error)
                if of_the_link(problem):
                    raise problem from error  # it stays in the outbox, and goes again in the next session
                if problem.error_class == "permanent" and (problem.code != "internal" or tries > _UNFORESEEN_TRIES):
                    # The run has ended and can't be failed for it; it must not hold up the others for ever either.
                    self._operations.failed("writeback.send", problem)
                    log.error("writeback.refused", run=item.run_id, error=str(problem), code=problem.code)
                    await self._outbox.emit(
                        "writeback.refused", item.run_id, {"error": problem.message, "code": problem.code}
                    )
                    break
                self._operations.retried("writeback.send", problem)
                await asyncio.sleep(FOREVER.obeying(wait_s, problem))
        await self._outbox.acknowledge([item.sequence])

    # Events.

    async def _send_events(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        waits = FOREVER.waits()
        while True:
            await self._events.wait()
            await asyncio.sleep(EVENT_FLUSH_S)
            self._events.clear()
            try:
                while items := self._outbox.read(("event",), limit=EVENT_BATCH):
                    answer = await stub.ReportEvents(_batches(items), timeout=CALL_TIMEOUT_S)
                    await self._outbox.acknowledge_events(answer.acknowledged)
                    if answer.acknowledged < items[0].sequence:
                        break  # nothing got through: not again at once
                waits = FOREVER.waits()
            except grpc.aio.AioRpcError as error:
                problem = self._failed("events", error)
                await asyncio.sleep(FOREVER.obeying(next(waits), problem))
                self._events.set()

    # Logs.

    async def _send_logs(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        waits = FOREVER.waits()
        while True:
            await self._logs.wait()
            self._logs.clear()
            await self._spool.forget_settled()
            if not self._spool.pending():
                continue  # a whole fleet that comes back need not open a call each for nothing
            try:
                await self._stream_logs(stub)
                waits = FOREVER.waits()
            except grpc.aio.AioRpcError as error:
                problem = self._failed("logs", error)
                self._spool.rewind()
                await asyncio.sleep(FOREVER.obeying(next(waits), problem))
                self._logs.set()

    async def _stream_logs(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """One StreamRunLogs call: as long as there is something to say, closed when idle."""
        self._log_stream += 1
        call = stub.StreamRunLogs(self._log_batches(self._log_stream))
        try:
            await self.logs_acknowledged(await call)
        finally:
            self._log_stream += 1
            call.cancel()

    async def _log_batches(self, stream: int) -> AsyncIterator[pb.RunLogBatch]:
        # gRPC goes on asking for batches for a while after a call has failed: what they took would be missing in the
        # next call. So only the batches of the present one may take anything.
        while stream == self._log_stream:
            self._logs.clear()
            await self._spool.forget_settled()
            for file in self._spool.pending():
                while stream == self._log_stream and (chunk := self._next_chunk(file)):
                    yield pb.RunLogBatch(chunks=[chunk])
            try:
                await asyncio.wait_for(self._logs.wait(), LOG_IDLE_S)
            except TimeoutError:
                return
            # Small writes travel together; a person who follows does not notice.
            await asyncio.sleep(LOG_FLUSH_S)

    def _next_chunk(self, file: LogFile) -> types.RunLogChunk | None:
        key, offset = file.key, file.sent
        chunk = types.RunLogChunk(
            run_id=key.run_id, step=key.step, attempt=key.attempt, stream=WIRE_STREAM[key.stream], offset=offset
        )
        chunk.time.GetCurrentTime()
        data = self._spool.read(file, offset, LOG_CHUNK_BYTES)
        if data:
            file.sent += len(data)
            if len(data) >= COMPRESS_FROM_BYTES:
                chunk.data, chunk.zstd = zstandard.compress(data, 1), True
            else:
                chunk.data = data
            return chunk
        if file.length is not None and file.gap and not file.gap_sent:
            file.sent, file.gap_sent = file.length, True
            chunk.gap_bytes = file.gap
            return chunk
        return None

    def _failed(self, what: str, error: grpc.aio.AioRpcError) -> OutriderError:
        problem = from_rpc_error(error)
        self._operations.retried(f"{what}.send", problem)
        log.info("uplink.retry", what=what, error=str(problem), code=problem.code)
        return problem


def _placed(positions: Iterable[pb.RunLogAck.Position]) -> Iterator[tuple[LogKey, int]]:
    for each in positions:
        stream = _NAME_OF_STREAM.get(each.stream)
        if stream is not None:
            yield LogKey(each.run_id, each.step, each.attempt, stream), each.offset


async def _batches(items: list[Item]) -> AsyncIterator[pb.EventBatch]:
    batch = pb.EventBatch()
    for item in items:
        event = types.Event.FromString(item.body)
        event.sequence = item.sequence
        batch.events.append(event)
    yield batch

"""One agent's control channel: what goes down it, and who waits for what comes up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator

from google.protobuf.message import Message

from outrider import wire
from outrider.errors import Conflict, OperationTimeout, OutriderError, Unavailable
from outrider.v1 import node_service_pb2
from server_core.store.common import monotonic_us

_QUEUED_MESSAGES = 256


class Answer:
    """What comes back for a command: it is acknowledged, and later there is a result."""

    def __init__(self) -> None:
        self.acknowledged = asyncio.Event()
        self.result: asyncio.Future[node_service_pb2.CommandResult] = asyncio.get_running_loop().create_future()


class ControlChannel:
    """One agent's control channel: what goes down it, and who waits for what comes up."""

    def __init__(self, node_id: str, session_id: str, epoch: int) -> None:
        self.node_id = node_id
        self.session_id = session_id
        self.epoch = epoch
        self.reported = False
        """Whether the agent has said what it holds; until then no run is sent."""
        self.sent: set[str] = set()
        """Ids of run commands that went down this channel."""
        self.leases: dict[str, str] = {}
        """By run: the lease under which it went down this channel."""
        self.acknowledged: set[str] = set()
        """Runs that were acknowledged on this channel."""
        self._outgoing: asyncio.Queue[node_service_pb2.ServerMessage] = asyncio.Queue(_QUEUED_MESSAGES)
        # A list, because two callers may ask for the same command: it is done once and answers both.
        self._answers: list[tuple[str, Answer]] = []
        self.detached = asyncio.Event()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: OutriderError | None = None

    @property
    def open(self) -> bool:
        return not self._closed.done()

    async def send(self, message: node_service_pb2.ServerMessage) -> None:
        """Queue ``message``; waits while the agent does not read. Raises Unavailable once the channel is closed."""
        if self.open:
            put = asyncio.ensure_future(self._outgoing.put(message))
            try:
                await asyncio.wait({put, self._closed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not put.done():
                    put.cancel()
        if not self.open:
            raise self.gone()

    async def next_message(self) -> node_service_pb2.ServerMessage:
        return await self._outgoing.get()

    async def wait_closed(self) -> None:
        """Return, or raise the reason, once the server has closed the channel."""
        await asyncio.shield(self._closed)
        if self._error is not None:
            raise self._error

    async def request(self, command: node_service_pb2.Command, timeout_s: float) -> node_service_pb2.CommandResult:
        """Send a command and await its result. Raises what the agent answered, or OperationTimeout."""
        with self.expect(command.command_id) as answer:
            async with self._answer_within(timeout_s):
                await self._send_command(command, timeout_s)
                result = await asyncio.shield(answer.result)
        if result.HasField("failure"):
            raise wire.error_of(result.failure)
        return result

    async def order(self, command: node_service_pb2.Command, answer: Answer, timeout_s: float) -> None:
        """Send a command and wait until it is acknowledged, or answered; ``answer`` comes from `expect`."""
        async with self._answer_within(timeout_s):
            await self._send_command(command, timeout_s)
            await answer.acknowledged.wait()

    @contextlib.contextmanager
    def expect(self, command_id: str) -> Iterator[Answer]:
        """What will be answered to a command; forgotten on leaving."""
        answer = Answer()
        # Nobody may be left to ask for it: the caller can have gone.
        answer.result.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._answers.append((command_id, answer))
        try:
            yield answer
        finally:
            self._answers.remove((command_id, answer))

    def take_ack(self, ack: node_service_pb2.CommandAck) -> None:
        """A refusal is the answer."""
        for command_id, answer in self._answers:
            if command_id == ack.command_id:
                answer.acknowledged.set()
        if ack.HasField("refused"):
            self.take_result(node_service_pb2.CommandResult(command_id=ack.command_id, failure=ack.refused))

    def take_result(self, result: node_service_pb2.CommandResult) -> None:
        for command_id, answer in self._answers:
            if command_id == result.command_id and not answer.result.done():
                answer.acknowledged.set()
                answer.result.set_result(result)

    async def ask_for_report(self) -> None:
        """Have the agent say all that it holds. Raises as `send` does."""
        await self.send(node_service_pb2.ServerMessage(full_report_request=node_service_pb2.FullReportRequest()))

    async def _send_command(self, command: node_service_pb2.Command, timeout_s: float) -> None:
        command.deadline.FromMicroseconds(round(timeout_s * 1e6))
        command.sent_at.FromMicroseconds(monotonic_us())
        await self.send(node_service_pb2.ServerMessage(command=command))

    @contextlib.asynccontextmanager
    async def _answer_within(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise OperationTimeout(
                f"node {self.node_id} did not answer within {timeout_s:g} s",
                code="node_timeout",
                hint="whether it was done can be looked up with `outrider container list`",
            ) from error

    def close(self, error: OutriderError | None) -> None:
        """End the channel; the agent is told ``error``. Idempotent."""
        if not self.open:
            return
        self._error = error
        self._closed.set_result(None)
        for _, answer in self._answers:
            if not answer.result.done():
                answer.acknowledged.set()
                answer.result.set_exception(self.gone())

    def gone(self) -> Unavailable:
        return Unavailable(
            f"the connection of node {self.node_id} was lost before it answered",
            code="node_lost",
            hint="whether it was done can be looked up once the node is back",
        )


def superseded(node_id: str) -> Conflict:
    return Conflict(
        f"this session of node {node_id} is not the newest", code="session_superseded", hint="register again"
    )


def command(
    command_id: str,
    *,
    run_pipeline: node_service_pb2.RunPipeline | None = None,
    cancel_run: node_service_pb2.CancelRun | None = None,
    container: node_service_pb2.ContainerCommand | None = None,
    list_containers: node_service_pb2.ListContainersCommand | None = None,
    inspect_container: node_service_pb2.InspectContainerCommand | None = None,
    stream_container_logs: node_service_pb2.StreamContainerLogsCommand | None = None,
    stop_stream: node_service_pb2.StopStreamCommand | None = None,
) -> node_service_pb2.Command:
    """A command with its digest: SHA-256 of the one body that is given, serialised deterministically."""
    made = node_service_pb2.Command(
        command_id=command_id,
        run_pipeline=run_pipeline,
        cancel_run=cancel_run,
        container=container,
        list_containers=list_containers,
        inspect_container=inspect_container,
        stream_container_logs=stream_container_logs,
        stop_stream=stop_stream,
    )
    which = made.WhichOneof("body")
    assert which is not None
    body: Message = getattr(made, which)
    made.digest = hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
    return made

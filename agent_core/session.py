"""The session: registration, heartbeats and the control channel, kept up for ever.

One connection at a time. It begins with Register (offering the last session to be resumed), then the control
channel carries heartbeats, commands, acknowledgements and reports until something ends it; then it begins
again, after a backoff. A lost connection changes nothing on the node: runs, outbox and logs do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import grpc
import structlog

from agent_core.heartbeat import Heartbeats
from agent_core.outbox import Outbox
from agent_core.reconnect import SUPERSEDED, Reconnect
from agent_core.spool import Spool
from agent_core.state import State
from agent_core.transitions import Transition
from agent_core.uplink import Uplink, of_the_link
from outrider import __version__
from outrider.errors import Conflict, InvalidInput, OutriderError, PermissionDenied, Unauthenticated, Unavailable
from outrider.retry import FOREVER, OperationCounts, RetryPolicy
from outrider.tls import Identity, open_channel, read_ca
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.v1 import types_pb2 as types
from outrider.wire import dump_json, from_rpc_error, seconds

log = structlog.get_logger(__name__)

REGISTER_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 30.0
CREDENTIAL_POLL_S = 5.0
FIRST_REPORT_S = 0.1
"""How long the engine has to add its containers to the first full report; afterwards they come in a second one."""
_QUEUED_REPORTS = 256


class Host(Protocol):
    """What the session asks of the agent."""

    def step_types(self) -> list[types.StepTypeInfo]: ...

    def plugins(self) -> list[types.Plugin]: ...

    def facts(self) -> dict[str, Any]: ...

    def held_runs(self) -> list[types.HeldRun]: ...

    def brief(self) -> types.BriefState: ...

    async def count_containers(self) -> Mapping[str, int]: ...

    async def full_report(self) -> types.FullReport: ...

    async def handle(self, command: pb.Command) -> pb.CommandAck:
        """Take a command on; what is durable is journalled before this returns."""

    async def retell(self, run_ids: Sequence[str]) -> None:
        """Report once more how these runs ended, as far as it is known."""

    async def recover(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """Find out what a lost journal held, before anything is said of what the node holds."""

    async def stop_streams(self) -> None:
        """The connection is gone: end what only served it."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where the session dials, and as whom. The files are read anew at every registration."""

    server: str
    node_id: str
    read_token: Callable[[], str]
    ca_file: Path | None = None
    server_name: str | None = None


class Session:
    """The link of one agent. `run` never returns by itself; cancel it."""

    def __init__(
        self,
        credentials: Credentials,
        host: Host,
        state: State,
        outbox: Outbox,
        spool: Spool,
        *,
        labels: dict[str, str] | None = None,
        on_refused: Callable[[OutriderError], None] | None = None,
        on_answered: Callable[[], None] = lambda: None,
        retry: RetryPolicy = FOREVER,
        operations: OperationCounts | None = None,
        rng: random.Random | None = None,
        environment: Callable[[], types.Environment | None] = lambda: None,
    ) -> None:
        self._environment = environment
        self._credentials = credentials
        self._host = host
        self._state = state
        self._labels = labels or {}
        self._on_refused = on_refused
        self._on_answered = on_answered
        self._retry = retry
        self._operations = operations or OperationCounts()
        self._uplink = Uplink(outbox, spool, self._operations)
        self._outgoing: asyncio.Queue[pb.AgentMessage] = asyncio.Queue()
        self._stub: pb_grpc.NodeServiceAsyncStub | None = None
        self._connected = asyncio.Event()
        self._registered_once = asyncio.Event()
        self.asked = asyncio.Event()  # a registration has worked, or failed, for the first time
        self._closing = False
        self._room = asyncio.Event()
        self._report_wanted = asyncio.Event()
        self.last_error = ""
        self.identity = Identity(token="", node_id=credentials.node_id)
        rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._reconnect = Reconnect(retry, rng)
        self._heartbeats = Heartbeats(self.identity, host.brief, host.count_containers, self._send, rng=rng)

    # What the rest of the agent uses.

    def age_s(self, command: pb.Command) -> float:
        """At most how long ago the server sent ``command``; 0 if it does not say when."""
        return self._heartbeats.age_s(command.sent_at) if command.HasField("sent_at") else 0.0

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def stub(self) -> pb_grpc.NodeServiceAsyncStub | None:
        """For streams that a command opened; None while there is no connection."""
        return self._stub if self.connected else None

    async def get_envs(self, run_id: str, lease_id: str) -> tuple[dict[str, str], frozenset[str]]:
        """The values of the run's envs, and the names of those that are secret.

        Waits for a session for as long as it takes; raises only what trying again does not change.
        """
        request = pb.GetEnvsRequest(run=pb.RunRef(run_id=run_id, lease_id=lease_id))
        waits = self._retry.waits()
        while True:
            await self._connected.wait()
            try:
                assert self._stub is not None
                answer = await self._stub.GetEnvs(request, timeout=CALL_TIMEOUT_S)
                return dict(answer.values), frozenset(answer.secret_names)
            except grpc.aio.AioRpcError as error:
                problem = from_rpc_error(error, target=self._credentials.server)
                if problem.error_class == "permanent" and not of_the_link(problem):
                    self._operations.failed("envs.get", problem)
                    raise problem from error
                self._operations.retried("envs.get", problem)
                await asyncio.sleep(self._retry.obeying(next(waits, self._retry.max_wait_s), problem))

    async def removed_objects(self, refs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of the objects (kind, name) that somebody has removed. Waits for a session; asks once."""
        await self._connected.wait()
        assert self._stub is not None
        request = pb.FindRemovedObjectsRequest(objects=[types.ObjectRef(kind=k, name=n) for k, n in refs])
        try:
            answer = await self._stub.FindRemovedObjects(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self._credentials.server) from error
        return {(ref.kind, ref.name) for ref in answer.removed} & set(refs)

    def wake(self) -> None:
        """The outbox or a log has something new."""
        self._uplink.wake()

    def send_result(self, result: pb.CommandResult) -> None:
        """Answer a command; dropped while there is no connection, because nobody waits for it then."""
        self._send(pb.AgentMessage(command_result=result))

    def send_progress(self, report: pb.RunReport) -> None:
        """Progress alone, not kept: dropped while there is no connection or the channel is behind."""
        if self._outgoing.qsize() < 100:
            self._send(pb.AgentMessage(run_report=report))

    def _send(self, message: pb.AgentMessage) -> None:
        if self.connected:
            self._outgoing.put_nowait(message)

    def close(self) -> None:
        """Say that `run` is about to be cancelled."""
        self._closing = True

    # The life of the link.

    async def run(self) -> None:
        """Keep the node connected until cancelled."""
        while True:
            # In a task of its own: a task group that ends because of its tasks leaves, before Python 3.13, a cancel
            # counted in the task that it was entered in, and whoever asks that task is told that somebody cancelled it.
            connection = asyncio.create_task(self._connection(), name="connection")
            try:
                await connection
            except (Unauthenticated, PermissionDenied) as error:
                self._operations.failed("session.connect", error)
                self._note(error)
                if self._on_refused is not None:
                    self._on_refused(error)
                await self._until_the_credential_changes()
            except OutriderError as error:
                self._operations.retried("session.connect", error)
                self._note(error)
                await self._pause(error)
            except Exception as error:
                # A defect of ours, or a disk that fails, must not cut the node off for ever.
                log.exception("session.failed", server=self._credentials.server)
                problem = OutriderError(f"the session failed: {error}", code="internal")
                self._note(problem)
                await self._pause(problem)

    async def _connection(self) -> None:
        """One registration, and one control channel; always raises."""
        async with self._registered() as stub:
            await self._hold(stub)

    async def _pause(self, error: OutriderError) -> None:
        if self._closing:
            raise asyncio.CancelledError  # a task group whose tasks fail while it is cancelled tells of them alone
        await asyncio.sleep(self._reconnect.wait_s(error))

    def _note(self, error: OutriderError) -> None:
        # Said once, not at every try: a server that is away for a night would fill the log.
        if str(error) != self.last_error:
            log.warning("session.down", server=self._credentials.server, error=str(error), code=error.code)
        self.last_error = str(error)
        self.asked.set()

    async def _until_the_credential_changes(self) -> None:
        refused = self.identity.token
        for _ in range(int(60 / CREDENTIAL_POLL_S)):
            await asyncio.sleep(CREDENTIAL_POLL_S)
            with contextlib.suppress(OutriderError):
                if self._credentials.read_token() != refused:
                    return
        # A server restored from a backup may have refused wrongly: ask again, once a minute.

    @asynccontextmanager
    async def _registered(self) -> AsyncIterator[pb_grpc.NodeServiceAsyncStub]:
        ca = read_ca(self._credentials.ca_file) if self._credentials.ca_file else None
        self.identity.token = self._credentials.read_token()
        self.identity.session_id, self.identity.epoch = "", 0
        channel = open_channel(
            self._credentials.server, ca=ca, identity=self.identity, server_name=self._credentials.server_name
        )
        async with channel:
            stub = cast("pb_grpc.NodeServiceAsyncStub", pb_grpc.NodeServiceStub(channel))
            await self._register(stub)
            yield stub

    async def _register(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        request = pb.RegisterRequest(
            request_id=str(uuid.uuid4()),
            last_session_id=await self._state.get_meta("session_id") or "",
            agent_version=__version__,
            boot_id=self._state.clock.boot_id,
            labels=self._labels,
            facts_json=dump_json(self._host.facts()),
            step_types=self._host.step_types(),
            plugins=self._host.plugins(),
            runs=self._host.held_runs(),
            environment=self._environment(),
        )
        try:
            answer = await stub.Register(request, timeout=REGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self._credentials.server) from error
        await self._state.set_meta(Transition.SESSION_KEPT, "session_id", answer.session_id)
        self.identity.session_id, self.identity.epoch = answer.session_id, answer.epoch
        self._obey(answer.heartbeat)
        self._heartbeats.began()
        self.last_error = ""
        self.asked.set()
        log.info("session.up", server=self._credentials.server, epoch=answer.epoch, resumed=answer.resumed)

    async def _hold(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """Serve one control channel until it ends; always raises."""
        await self._host.recover(stub)
        connect: Any = stub.Connect  # its stub file wants an iterator; writing by hand is the other way
        call = connect()
        self._outgoing = asyncio.Queue()
        commands: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._stub = stub
        self._reconnect.began()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._connected.set()
                tasks.create_task(self._heartbeats.run(self._credentials.server))
                tasks.create_task(self._write(call))
                tasks.create_task(self._read(call, commands))
                tasks.create_task(self._carry_out(commands))
                tasks.create_task(self._give_account(stub))
        except BaseExceptionGroup as group:
            raise self._why(group) from group
        finally:
            self._connected.clear()
            self._stub = None
            call.cancel()
            await self._host.stop_streams()

    def _why(self, group: BaseExceptionGroup[Any]) -> BaseException:
        """The one error that ended the control channel, of those that its tasks met with at the same time."""
        errors = list(_leaves(group))
        for each in errors:
            if not isinstance(each, (OutriderError, grpc.aio.AioRpcError)):
                return group  # nobody foresaw it
        for each in errors:
            if isinstance(each, grpc.aio.AioRpcError):
                return from_rpc_error(each, target=self._credentials.server)
        return errors[0]

    async def _give_account(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        # First what the node holds, then what changes. On a link that breaks every half second all of it has to get
        # through between two breaks, so an engine that is slow to say what it has delays nothing.
        async with asyncio.TaskGroup() as tasks:
            full = tasks.create_task(self._host.full_report())
            await asyncio.wait({full}, timeout=FIRST_REPORT_S)
            if not full.done():
                self._send_account(types.FullReport())
            tasks.create_task(self._uplink.run(stub, self._send, self._has_room))
            self._send_account(await full)
            tasks.create_task(self._report_when_asked())

    async def _report_when_asked(self) -> None:
        while True:
            await self._report_wanted.wait()
            await self._report()

    async def _report(self) -> None:
        self._report_wanted.clear()
        self._send_account(await self._host.full_report())

    def _send_account(self, report: types.FullReport) -> None:
        # An engine may be slow to say what it has. Behind the report of a run's end a list of runs from before it would
        # have the run go on, and a brief from before it would say that nothing is left to hand in.
        report.runs.extend(self._host.held_runs())
        if report.HasField("brief"):
            report.brief.MergeFrom(self._host.brief())
        self._send(pb.AgentMessage(full_report=report))

    async def _write(self, call: Any) -> None:
        # InvalidStateError is grpc.aio's word for writing to a call that has ended; the reader hears why it has.
        with contextlib.suppress(asyncio.InvalidStateError):
            while True:
                await call.write(await self._outgoing.get())
                if self._outgoing.qsize() < _QUEUED_REPORTS:
                    self._room.set()

    async def _has_room(self) -> None:
        """Until the channel keeps up: after a long time alone there may be more reports than memory."""
        while self._outgoing.qsize() >= _QUEUED_REPORTS:
            self._room.clear()
            await self._room.wait()

    async def _read(self, call: Any, commands: asyncio.Queue[pb.Command]) -> None:
        async for message in call:
            match message.WhichOneof("body"):
                case "command":
                    commands.put_nowait(message.command)
                case "heartbeat":
                    self._heartbeat_answered(message.heartbeat)
                case "outbox_ack":
                    await self._uplink.acknowledged(message.outbox_ack.sequences)
                case "log_ack":
                    await self._uplink.logs_acknowledged(message.log_ack)
                case "full_report_request":
                    self._report_wanted.set()
                case "retell_request":
                    await self._host.retell(message.retell_request.run_ids)
        raise Unavailable(f"the server {self._credentials.server} closed the connection")

    async def _carry_out(self, commands: asyncio.Queue[pb.Command]) -> None:
        # One after the other: a cancel must not overtake the run that it is about.
        while True:
            command = await commands.get()
            self._send(pb.AgentMessage(command_ack=await self._host.handle(command)))

    def _heartbeat_answered(self, answer: pb.HeartbeatResponse) -> None:
        self._obey(answer.heartbeat)
        if answer.register_again:
            raise Conflict("the server knows a newer session of this node", code=SUPERSEDED)
        self._heartbeats.answered(answer)
        self._reconnect.worked()
        self._on_answered()
        if answer.full_report_wanted:
            self._report_wanted.set()

    def _obey(self, policy: types.HeartbeatPolicy) -> None:
        self._heartbeats.obey(policy)
        if policy.HasField("interval"):
            self._reconnect.told_spread(seconds(policy.reconnect_spread))


def token_reader(token: str | None, token_file: Path | None) -> Callable[[], str]:
    """Reads the token anew each time, so that a replaced file is noticed. Raises InvalidInput if there is none."""

    def read() -> str:
        if token_file is None:
            return (token or "").strip()
        try:
            return token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"the token file {token_file} can't be read: {error}", code="token_unreadable"
            ) from error

    return read


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, however deep."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error

"""The session: registration, heartbeats and the control channel, kept up for ever.

One connection at a time. It begins with Register (offering the last session to be resumed), then the control
channel carries heartbeats, commands, acknowledgements and reports until something ends it; then it begins
again, after a backoff. A lost connection changes nothing on the node: runs, outbox and logs do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import random
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import grpc
import structlog

from agent_core.outbox import Outbox
from agent_core.spool import Spool
from agent_core.state import State
from agent_core.transitions import Transition
from agent_core.uplink import Uplink
from outrider import __version__
from outrider.errors import InvalidInput, OutriderError, PermissionDenied, Unauthenticated, Unavailable
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
MISSED_HEARTBEATS = 2
"""A control channel on which so many heartbeats stay unanswered is half-open: it is given up."""


class Host(Protocol):
    """What the session asks of the agent."""

    def step_types(self) -> list[types.StepTypeInfo]: ...

    def plugins(self) -> list[types.Plugin]: ...

    def facts(self) -> dict[str, Any]: ...

    def held_runs(self) -> list[types.HeldRun]: ...

    async def brief(self) -> types.BriefState: ...

    async def full_report(self) -> types.FullReport: ...

    async def handle(self, command: pb.Command) -> pb.CommandAck:
        """Take a command on; what is durable is journalled before this returns."""

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


class _RegisterAgain(Exception):
    """The server does not know this session any more."""


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
        retry: RetryPolicy = FOREVER,
        operations: OperationCounts | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._credentials = credentials
        self._host = host
        self._state = state
        self._labels = labels or {}
        self._on_refused = on_refused
        self._retry = retry
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._operations = operations or OperationCounts()
        self._uplink = Uplink(outbox, spool, self._operations)
        self._outgoing: asyncio.Queue[pb.AgentMessage] = asyncio.Queue()
        self._stub: pb_grpc.NodeServiceAsyncStub | None = None
        self._connected = asyncio.Event()
        self._registered_once = asyncio.Event()
        self.asked = asyncio.Event()  # a registration has worked, or failed, for the first time
        self._sequence = 0
        self._heartbeat = (10.0, 0.2)
        self._unanswered = 0
        self.last_error = ""
        self.identity = Identity(token="", node_id=credentials.node_id)

    # What the rest of the agent uses.

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
                if problem.error_class == "permanent":
                    self._operations.failed("envs.get", problem)
                    raise problem from error
                self._operations.retried("envs.get", problem)
                await asyncio.sleep(next(waits, self._retry.max_wait_s))

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

    # The life of the link.

    async def run(self) -> None:
        """Keep the node connected until cancelled."""
        tries = 0
        while True:
            try:
                async with self._registered() as stub:
                    tries = 0
                    await self._hold(stub)
            except _RegisterAgain:
                await self._state.set_meta(Transition.SESSION_KEPT, "session_id", "")
                log.info("session.lost", reason="the server asks for a new registration")
                continue
            except (Unauthenticated, PermissionDenied) as error:
                self._operations.failed("session.connect", error)
                self._note(error)
                if self._on_refused is not None:
                    self._on_refused(error)
                await self._until_the_credential_changes()
                continue
            except OutriderError as error:
                self._operations.retried("session.connect", error)
                self._note(error)
            tries += 1
            await asyncio.sleep(self._retry.wait_s(tries))

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
        )
        try:
            answer = await stub.Register(request, timeout=REGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self._credentials.server) from error
        await self._state.set_meta(Transition.SESSION_KEPT, "session_id", answer.session_id)
        self.identity.session_id, self.identity.epoch = answer.session_id, answer.epoch
        self._obey(answer.heartbeat)
        self._sequence, self._unanswered = 0, 0
        self.last_error = ""
        log.info("session.up", server=self._credentials.server, epoch=answer.epoch, resumed=answer.resumed)

    async def _hold(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """Serve one control channel until it ends; always raises."""
        connect: Any = stub.Connect  # its stub file wants an iterator; writing by hand is the other way
        call = connect()
        self._outgoing = asyncio.Queue()
        commands: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._stub = stub
        try:
            async with asyncio.TaskGroup() as tasks:
                await call.write(pb.AgentMessage(full_report=await self._host.full_report()))
                tasks.create_task(self._write(call))
                tasks.create_task(self._read(call, commands))
                tasks.create_task(self._carry_out(commands))
                tasks.create_task(self._beat())
                tasks.create_task(self._uplink.run(stub, self._send))
                self._connected.set()
                self.asked.set()
        except* grpc.aio.AioRpcError as group:
            raise from_rpc_error(_first(group), target=self._credentials.server) from group
        except* (OutriderError, _RegisterAgain) as group:
            raise _first(group) from group
        except* asyncio.InvalidStateError as group:  # grpc.aio's word for writing to a call that has ended
            raise Unavailable(f"the connection to {self._credentials.server} ended") from group
        finally:
            self._connected.clear()
            self._stub = None
            call.cancel()
            await self._host.stop_streams()

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _read(self, call: Any, commands: asyncio.Queue[pb.Command]) -> None:
        async for message in call:
            match message.WhichOneof("body"):
                case "command":
                    commands.put_nowait(message.command)
                case "heartbeat":
                    await self._heartbeat_answered(message.heartbeat)
                case "outbox_ack":
                    await self._uplink.acknowledged(message.outbox_ack.sequences)
                case "log_ack":
                    await self._uplink.logs_acknowledged(message.log_ack)
                case "full_report_request":
                    self._send(pb.AgentMessage(full_report=await self._host.full_report()))
        raise Unavailable(f"the server {self._credentials.server} closed the connection")

    async def _carry_out(self, commands: asyncio.Queue[pb.Command]) -> None:
        # One after the other: a cancel must not overtake the run that it is about.
        while True:
            command = await commands.get()
            self._send(pb.AgentMessage(command_ack=await self._host.handle(command)))

    async def _beat(self) -> None:
        while True:
            if self._unanswered >= MISSED_HEARTBEATS:
                raise Unavailable(
                    f"the server {self._credentials.server} left {self._unanswered} heartbeats unanswered"
                )
            self._sequence += 1
            self._unanswered += 1
            session_id, epoch = self.identity.session_id, self.identity.epoch
            self._send(
                pb.AgentMessage(
                    heartbeat=pb.HeartbeatRequest(
                        session_id=session_id,
                        epoch=epoch,
                        sequence=self._sequence,
                        proof=heartbeat_proof(self.identity.token, session_id, epoch, self._sequence),
                        brief=await self._host.brief(),
                    )
                )
            )
            interval, jitter = self._heartbeat
            await asyncio.sleep(interval * self._rng.uniform(1 - jitter, 1 + jitter))

    async def _heartbeat_answered(self, answer: pb.HeartbeatResponse) -> None:
        self._unanswered = 0
        self._obey(answer.heartbeat)
        if answer.register_again:
            raise _RegisterAgain
        if answer.full_report_wanted:
            self._send(pb.AgentMessage(full_report=await self._host.full_report()))

    def _obey(self, policy: types.HeartbeatPolicy) -> None:
        interval = seconds(policy.interval) or 0.0
        if interval > 0:
            self._heartbeat = (interval, min(max(policy.jitter, 0.0), 0.9))


def heartbeat_proof(token: str, session_id: str, epoch: int, sequence: int) -> bytes:
    """HMAC-SHA256 (RFC 2104), keyed with the token's SHA-256, over session, epoch and sequence, a line each."""
    key = hashlib.sha256(token.encode()).digest()
    return hmac.digest(key, f"{session_id}\n{epoch}\n{sequence}".encode("ascii"), "sha256")


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


def _first(group: BaseExceptionGroup[Any]) -> Any:
    """The first error of a group, however deep."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

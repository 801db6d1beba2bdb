"""A real server over TLS in this process, and an agent that does as it is told, speaking the real NodeService."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from outrider import tls, wire
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import node_service_pb2_grpc as ngrpc
from outrider.v1 import types_pb2 as tpb
from server_core.config import ServerConfig
from server_core.security import tokens
from server_core.server import Server, init

TIMEOUT = 10.0

ECHO = tpb.StepTypeInfo(
    name="test.echo",
    plugin="test",
    distribution="outrider-step-test",
    version="1",
    params_schema_json=wire.dump_json(
        {
            "type": "object",
            "properties": {"text": {"type": "string"}, "times": {"type": "integer"}},
            "required": ["text"],
            "additionalProperties": False,
        }
    ),
    outputs_schema_json=wire.dump_json({"type": "object", "properties": {"said": {"type": "string"}}}),
    envs=["SECRET", "PLAIN"],
    idempotent=True,
)

PIPELINE = b"""\
name: greet
steps:
  - name: say
    uses: test.echo
    with: {text: hello}
"""


@dataclass
class Rig:
    """The server, and how to call it."""

    config: ServerConfig
    server: Server
    admin_token: str
    _count: int = 0

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"

    @property
    def ca(self) -> bytes:
        return self.config.ca_file.read_bytes()

    def request_id(self) -> str:
        self._count += 1
        return f"request-{self._count}"

    @asynccontextmanager
    async def operator(self, token: str | None = None) -> AsyncIterator[cgrpc.ControlServiceStub]:
        identity = tls.Identity(self.admin_token if token is None else token)
        async with tls.open_channel(self.address, ca=self.ca, identity=identity) as channel:
            yield cgrpc.ControlServiceStub(channel)

    async def restart(self) -> None:
        """The same server on the same port, as after a crash that was noticed."""
        port = self.server.port
        await self.server.stop(0)
        self.server = Server(self.config.model_copy(update={"listen": f"127.0.0.1:{port}"}))
        await self.server.start()


@asynccontextmanager
async def served(data_dir: Path, **settings: Any) -> AsyncIterator[Rig]:
    config = ServerConfig(data_dir=data_dir, listen="127.0.0.1:0", **settings)
    made = await init(config)
    server = Server(config)
    await server.start()
    rig = Rig(config, server, made.admin_token)
    try:
        yield rig
    finally:
        await rig.server.stop(0)


Handler = Callable[["FakeAgent", npb.Command], Any]


@dataclass
class FakeAgent:
    """An agent that answers commands with ``on_command`` and keeps what it got."""

    rig: Rig
    node_id: str
    token: str
    step_types: list[tpb.StepTypeInfo] = field(default_factory=lambda: [ECHO])
    plugins: list[tpb.Plugin] = field(default_factory=list)
    version: str = "test"
    environment: tpb.Environment | None = None
    commands: list[npb.Command] = field(default_factory=list)
    acks: list[int] = field(default_factory=list)
    log_acks: list[npb.RunLogAck] = field(default_factory=list)
    heartbeats: list[npb.HeartbeatResponse] = field(default_factory=list)
    held: list[tpb.HeldRun] = field(default_factory=list)
    brief: tpb.BriefState = field(default_factory=lambda: tpb.BriefState(engine_ok=True))
    acknowledges: bool = True
    on_command: Handler | None = None
    session: npb.RegisterResponse | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.identity = tls.Identity(self.token, self.node_id)
        self.channel = tls.open_channel(self.rig.address, ca=self.rig.ca, identity=self.identity)
        self.stub = ngrpc.NodeServiceStub(self.channel)
        self.news = asyncio.Condition()
        self.writing = asyncio.Lock()
        self.sequence = 0
        self.reader: asyncio.Task[None] | None = None
        self.call: Any = None

    async def register(self, last_session_id: str = "") -> npb.RegisterResponse:
        self.identity.session_id = ""
        self.session = await self.stub.Register(
            npb.RegisterRequest(
                request_id="r",
                last_session_id=last_session_id,
                agent_version=self.version,
                step_types=self.step_types,
                plugins=self.plugins,
                environment=self.environment,
            ),
            timeout=TIMEOUT,
        )
        self.identity.session_id, self.identity.epoch = self.session.session_id, self.session.epoch
        return self.session

    async def connect(self, *, report: bool = True) -> None:
        self.call = self.stub.Connect()
        self.reader = asyncio.create_task(self._read())
        if report:
            await self.full_report()

    async def full_report(self) -> None:
        await self.send(full_report=tpb.FullReport(runs=self.held, brief=self.brief))

    async def start(self) -> FakeAgent:
        """Registered, connected, and known to be."""
        await self.register()
        await self.connect()
        await self.heartbeat()
        await self.until(lambda: self.heartbeats)
        return self

    async def send(self, **body: Any) -> None:
        async with self.writing:  # gRPC takes one write at a time, and the reader acknowledges by itself
            await self.call.write(npb.AgentMessage(**body))

    async def heartbeat(self, *, wrong: bool = False, again: bool = False, digest: bytes = b"", depth: int = 0) -> None:
        assert self.session is not None
        self.sequence += not again
        brief = tpb.BriefState(cpu_percent=12.5, state_digest=digest, outbox_depth=depth)
        brief.MergeFrom(self.brief)
        proof = tokens.heartbeat_proof(
            tokens.digest(self.token), self.session.session_id, self.session.epoch, self.sequence
        )
        await self.send(
            heartbeat=npb.HeartbeatRequest(
                session_id=self.session.session_id,
                epoch=self.session.epoch,
                sequence=self.sequence,
                proof=b"wrong" if wrong else proof,
                brief=brief,
            )
        )

    async def report(
        self,
        run: npb.RunPipeline,
        state: tpb.RunState.ValueType,
        *steps: tpb.StepStatus,
        sequence: int | None = None,
        lease_id: str | None = None,
        failure: tpb.Failure | None = None,
    ) -> int:
        if sequence is None:
            self.sequence += 1
            sequence = self.sequence
        await self.send(
            run_report=npb.RunReport(
                sequence=sequence,
                run_id=run.run_id,
                lease_id=run.lease_id if lease_id is None else lease_id,
                state=state,
                steps=steps,
                failure=failure,
            )
        )
        return sequence

    async def runs(self, count: int = 1) -> list[npb.RunPipeline]:
        """The first ``count`` runs that it was told to do."""
        await self.until(lambda: len(self._runs()) >= count)
        return self._runs()

    def _runs(self) -> list[npb.RunPipeline]:
        return [command.run_pipeline for command in self.commands if command.HasField("run_pipeline")]

    async def cancels(self, count: int = 1) -> list[npb.CancelRun]:
        def found() -> list[npb.CancelRun]:
            return [command.cancel_run for command in self.commands if command.HasField("cancel_run")]

        await self.until(lambda: len(found()) >= count)
        return found()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(TIMEOUT), self.news:
            await self.news.wait_for(condition)

    async def cut(self) -> None:
        """Lose the connection."""
        if self.call is not None:
            self.call.cancel()
        if self.reader is not None:
            await asyncio.gather(self.reader, return_exceptions=True)

    async def stop(self) -> None:
        await self.cut()
        await self.channel.close()

    async def _read(self) -> None:
        try:
            async for message in self.call:
                await self._take(message)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            self.error = error
        async with self.news:
            self.news.notify_all()

    async def _take(self, message: npb.ServerMessage) -> None:
        match message.WhichOneof("body"):
            case "command":
                command = message.command
                body = getattr(command, command.WhichOneof("body") or "")
                assert command.digest == hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
                self.commands.append(command)
                if self.acknowledges:
                    await self.send(command_ack=npb.CommandAck(command_id=command.command_id))
                if self.on_command is not None:
                    result = self.on_command(self, command)
                    if result is not None:
                        await self.send(command_result=result)
            case "outbox_ack":
                self.acks.extend(message.outbox_ack.sequences)
            case "log_ack":
                self.log_acks.append(message.log_ack)
            case "heartbeat":
                self.heartbeats.append(message.heartbeat)
            case "full_report_request":
                await self.full_report()
        async with self.news:
            self.news.notify_all()


async def add_node(rig: Rig, node_id: str = "n1", role: str = "") -> FakeAgent:
    async with rig.operator() as control:
        request = cpb.AddNodeRequest(request_id=rig.request_id(), node_id=node_id, role=role)
        answer = await control.AddNode(request, timeout=TIMEOUT)
    return FakeAgent(rig, node_id, answer.token)


async def refused(call: Any) -> Any:
    """The OutriderError that a call is refused with."""
    try:
        await call
    except grpc.RpcError as error:
        return wire.from_rpc_error(error)
    raise AssertionError("the call was not refused")


def step(state: tpb.StepState.ValueType, *, name: str = "say", attempt: int = 1, **fields: Any) -> tpb.StepStatus:
    return tpb.StepStatus(name=name, state=state, attempt=attempt, **fields)

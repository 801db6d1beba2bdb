"""Server and agent in one process: what `outrider dev` starts, in order, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc

from agent_core.agent import Agent
from agent_core.config import AgentConfig
from agent_core.policy import NodePolicy
from agent_core.telemetry.logs import configure_logging
from outrider import settings, tls
from outrider.cli._client import request_id
from outrider.cli._context import ContextFile
from outrider.cli._output import note
from outrider.errors import NotFound, OperationTimeout
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.v1.control_service_pb2_grpc import ControlServiceStub
from outrider.wire import from_rpc_error
from server_core.config import ServerConfig
from server_core.server import Server, init

if TYPE_CHECKING:
    from outrider.v1.control_service_pb2_grpc import ControlServiceAsyncStub  # known to the stubs alone

LogLevel = Literal["debug", "info", "warning", "error"]

ONLINE_WITHIN_S = 20.0
ENGINE_WITHIN_S = 5.0
AGENT_STOP_S = 20.0
SERVER_STOP_S = 3.0
CALL_S = 10.0


@dataclass(slots=True)
class Dev:
    """One `outrider dev`: the directory, both configurations, and the context to write."""

    folder: Path
    server_config: ServerConfig
    node_id: str
    policy_file: Path | None
    log_level: LogLevel
    contexts: ContextFile
    context: str

    @classmethod
    def prepare(
        cls,
        folder: Path,
        listen: str,
        node_id: str,
        contexts: ContextFile,
        context: str,
        policy_file: Path | None,
        log_level: LogLevel,
    ) -> Dev:
        """Check both configurations before anything starts. Raises InvalidInput."""
        host = listen.rpartition(":")[0].strip("[]")
        flags = {
            "data_dir": folder / "server",
            "listen": listen,
            "names": (host,) if host not in ("", "0.0.0.0", "::") else None,
            "log_level": log_level,
        }
        config = settings.load(ServerConfig, env_prefix="OUTRIDER_SERVER_", environ=os.environ, flags=flags).value
        dev = cls(folder, config, node_id, policy_file, log_level, contexts, context)
        dev._agent_config("127.0.0.1:1")
        if policy_file is not None:
            NodePolicy.load(policy_file)  # before the server has made anything
        return dev

    async def run(self, stop: asyncio.Event) -> None:
        """Start the server, then the agent; serve until ``stop`` is set; stop the agent, then the server."""
        configure_logging(self.log_level)
        token = await self._operator_token()
        server = Server(self.server_config)
        await server.start()
        try:
            address = tls.join_address(self._host(), server.port)
            await self._run_agent(address, token, stop)
        finally:
            await server.stop(SERVER_STOP_S)

    async def _run_agent(self, address: str, token: str, stop: asyncio.Event) -> None:
        identity = tls.Identity(token)
        async with tls.open_channel(address, ca=self._ca.read_bytes(), identity=identity) as channel:
            stub: ControlServiceAsyncStub = ControlServiceStub(channel)  # type: ignore[assignment]
            await self._register(stub)
            agent = Agent(self._agent_config(address))
            running = asyncio.create_task(agent.run())
            asked = asyncio.create_task(stop.wait())
            try:
                node = await self._online(stub, running, asked)
                if node is not None:
                    self._ready(address, token, node)
                await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
                if asked.done():
                    note("stopping; containers go on")
            finally:
                asked.cancel()
                agent.stop()
                _done, late = await asyncio.wait({running}, timeout=AGENT_STOP_S)
                for task in late:
                    note(f"the agent did not stop within {AGENT_STOP_S:g} s; it is cut off")
                    task.cancel()
        # Whatever ended the agent is the reason to end: it is said as any other error.
        with contextlib.suppress(asyncio.CancelledError):
            await running

    async def _operator_token(self) -> str:
        file = self.folder / "operator.token"
        if file.exists():
            return file.read_text().strip()
        # A store that is there without our file: its former token can't be known, so it is replaced.
        made = await init(self.server_config, new_token=True)
        _write_private(file, made.admin_token)
        return str(made.admin_token)

    async def _register(self, stub: ControlServiceAsyncStub) -> None:
        """Make the node, or take the one that is there from the last time with its token."""
        file = self._token_file
        try:
            await stub.GetNode(pb.GetNodeRequest(node_id=self.node_id), timeout=CALL_S)
            known = True
        except grpc.RpcError as error:
            if not isinstance(reason := from_rpc_error(error), NotFound):
                raise reason from error
            known = False
        if known and file.exists():
            return
        try:
            if known:  # its token is lost: it can only be made anew
                await stub.RemoveNode(
                    pb.RemoveNodeRequest(request_id=request_id(), node_id=self.node_id), timeout=CALL_S
                )
            answer = await stub.AddNode(
                pb.AddNodeRequest(request_id=request_id(), node_id=self.node_id), timeout=CALL_S
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        _write_private(file, answer.token)

    async def _online(
        self, stub: ControlServiceAsyncStub, running: asyncio.Task[None], asked: asyncio.Task[bool]
    ) -> types.Node | None:
        """Wait until the node is online; None if the agent ended or a stop was asked for before."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not running.done() and not asked.done():
            with contextlib.suppress(grpc.RpcError):
                node = await stub.GetNode(pb.GetNodeRequest(node_id=self.node_id), timeout=CALL_S)
                # The engine is asked a moment after the registration.
                if node.online and (node.brief.engine_ok or loop.time() > started + ENGINE_WITHIN_S):
                    return node
            if loop.time() > started + ONLINE_WITHIN_S:
                raise OperationTimeout(f"the agent was not online within {ONLINE_WITHIN_S:g} s")
            await asyncio.wait({running, asked}, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        return None

    def _ready(self, address: str, token: str, node: types.Node) -> None:
        entry = {
            "server": address,
            "ca": str(self._ca),
            "token": token,
            "node": self.node_id,
            "data_dir": str(self.folder),  # whose context this is
        }
        self.contexts = ContextFile(self.contexts.path)  # it may have changed while we started
        self.contexts.put(self.context, entry, make_current=False)
        chosen = "" if self.contexts.current == self.context else f" --context {self.context}"
        if not node.brief.engine_ok:
            engine = f"online, but without its container engine: {node.brief.engine_error}"
        else:
            engine = f"online, {len(node.step_types)} step types"
        note(f"server   {address}, data in {self.folder}")
        note(f"node     {self.node_id} is {engine}")
        note(f"context  {self.context!r} in {self.contexts.path}")
        for plugin in node.plugins:
            if not plugin.ok and plugin.state != "disabled":
                note(f"plugin   {plugin.name} can't be used: {plugin.error}")
        note("")
        note("Outrider is ready. In another terminal:")
        note(f"  outrider{chosen} node show {self.node_id}")
        note(f"  outrider{chosen} run FILE --node {self.node_id}")
        note("Ctrl-C stops it.")

    def _agent_config(self, address: str) -> AgentConfig:
        flags = {
            "server": address,
            "node_id": self.node_id,
            "token_file": self._token_file,
            "ca_file": self._ca,
            "state_dir": self.folder / "agent",
            "policy_file": self.policy_file,
            "log_level": self.log_level,
        }
        return settings.load(AgentConfig, env_prefix="OUTRIDER_AGENT_", environ=os.environ, flags=flags).value

    def _host(self) -> str:
        host = self.server_config.listen.rpartition(":")[0].strip("[]")
        return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)

    @property
    def _ca(self) -> Path:
        return self.server_config.ca_file

    @property
    def _token_file(self) -> Path:
        return self.folder / "node.token"


def _write_private(file: Path, text: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text + "\n")
    temporary.replace(file)

"""A fleet of simulated agents: the real session (TLS, gRPC, heartbeats, backoff, hints) of each, and nothing behind it.

All of them live in this process; the server is a process of its own, which is killed or stopped and started again.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil

from agent_core.outbox import Outbox
from agent_core.session import Credentials, Session
from agent_core.spool import Spool
from agent_core.state import State
from benchmarks._rig import OUTRIDER
from outrider.errors import OutriderError
from outrider.reports import held_digest
from outrider.tls import Identity, open_channel
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import node_service_pb2 as npb
from outrider.v1 import types_pb2 as types

_ADDING_AT_ONCE = 20


class _Idle:
    """In the place of outbox and spool: nothing ever comes."""

    async def wait(self) -> None:
        await asyncio.Event().wait()

    def read(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def pending(self) -> list[Any]:
        return []

    def rewind(self, *_: Any) -> None:
        return

    async def forget_settled(self) -> None:
        return


class _Memory:
    """In the place of the journal: what a session keeps there, in memory."""

    class clock:
        boot_id = "simulated"

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    async def get_meta(self, key: str) -> str | None:
        return self._values.get(key)

    async def set_meta(self, _transition: object, key: str, value: str) -> None:
        self._values[key] = value


class _Host:
    """A node that holds nothing."""

    def step_types(self) -> list[types.StepTypeInfo]:
        return []

    def plugins(self) -> list[types.Plugin]:
        return []

    def facts(self) -> dict[str, Any]:
        return {"os": "simulated"}

    def held_runs(self) -> list[types.HeldRun]:
        return []

    def brief(self) -> types.BriefState:
        return types.BriefState(engine_ok=True, state_digest=held_digest([]))

    async def count_containers(self) -> dict[str, int]:
        return {}

    async def full_report(self) -> types.FullReport:
        return types.FullReport(brief=types.BriefState())

    async def handle(self, command: npb.Command) -> npb.CommandAck:
        return npb.CommandAck(command_id=command.command_id)

    async def stop_streams(self) -> None:
        return

    async def retell(self, run_ids: Sequence[str]) -> None:
        return

    async def recover(self, stub: Any) -> None:
        return


class SimulatedAgent(Session):
    """A session that notes when it asked to be registered, and when it was."""

    def __init__(self, credentials: Credentials) -> None:
        host, state, idle = _Host(), cast("State", _Memory()), _Idle()
        super().__init__(credentials, host, state, cast("Outbox", idle), cast("Spool", idle))
        self.asked_at: list[float] = []
        self.up_at: list[float] = []
        self.refused_at: list[float] = []

    async def _register(self, stub: Any) -> None:
        self.asked_at.append(time.monotonic())
        try:
            await super()._register(stub)
        except OutriderError as error:
            if error.code == "resource_exhausted":
                self.refused_at.append(time.monotonic())
            raise
        self.up_at.append(time.monotonic())


@dataclass
class ServerProcess:
    """`outrider server run`, which can be killed, stopped and started again on the same port."""

    folder: Path
    port: int
    settings: dict[str, str]
    token: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.folder / "server" / "tls" / "ca.pem"

    def start(self) -> None:
        self.process = self._run("run")

    def listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def end(self, how: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(60)

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def let_in(self, after: int) -> list[float]:
        """When it registered nodes, by its log from byte ``after`` on; in seconds."""
        lines = self.log.read_bytes()[after:].decode().splitlines()
        return [datetime.fromisoformat(line.split()[0]).timestamp() for line in lines if " node registered " in line]

    def cpu_s(self) -> float:
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command(*command), env=self._env(), stdout=log, stderr=log)

    def _command(self, *command: str) -> list[str]:
        return [str(OUTRIDER), "server", *command, "--data-dir", str(self.folder / "server")]

    def _env(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")}
        settings = {f"OUTRIDER_SERVER_{name.upper()}": value for name, value in self.settings.items()}
        return (
            env | settings | {"OUTRIDER_SERVER_LISTEN": self.address, "OUTRIDER_CONTEXT": str(self.folder / "c.yaml")}
        )

    def init(self) -> None:
        done = subprocess.run(
            [*self._command("init"), "-o", "json"], env=self._env(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"error: 'outrider server init' failed: {done.stderr}")
        self.token = json.loads(done.stdout)["token"]


@contextmanager
def server_process(**settings: Any) -> Iterator[ServerProcess]:
    """A server of its own, running; ``settings`` as in its configuration."""
    # Both sides have a descriptor and more for each agent; children inherit the limit.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="outrider-fleet-"))
    server = ServerProcess(folder, port, {name: str(value) for name, value in settings.items()})
    try:
        server.init()
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.end(signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Fleet:
    """Simulated agents of one server."""

    server: ServerProcess
    agents: list[SimulatedAgent] = field(default_factory=list)

    @property
    def connected(self) -> int:
        return sum(agent.connected for agent in self.agents)

    async def until_connected(self, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while self.connected < len(self.agents):
                await asyncio.sleep(0.02)


@asynccontextmanager
async def fleet_of(server: ServerProcess, count: int, within_s: float = 120) -> AsyncIterator[Fleet]:
    """``count`` agents, all connected."""
    fleet = Fleet(server)
    async with asyncio.timeout(30):
        while not server.listening():
            await asyncio.sleep(0.05)
    tokens = await _add_nodes(server, [f"sim-{number:04}" for number in range(count)])
    tasks = []
    for node_id, token in tokens.items():
        credentials = Credentials(server.address, node_id, lambda token=token: token, server.ca_file)  # type: ignore[misc]
        agent = SimulatedAgent(credentials)
        fleet.agents.append(agent)
        tasks.append(asyncio.create_task(agent.run()))
    try:
        await fleet.until_connected(within_s)
        yield fleet
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _add_nodes(server: ServerProcess, names: Iterable[str]) -> dict[str, str]:
    ca, tokens = server.ca_file.read_bytes(), {}
    gate = asyncio.Semaphore(_ADDING_AT_ONCE)
    async with open_channel(server.address, ca=ca, identity=Identity(server.token)) as channel:
        stub = cast("cgrpc.ControlServiceAsyncStub", cgrpc.ControlServiceStub(channel))

        async def add(name: str) -> None:
            async with gate:
                answer = await stub.AddNode(cpb.AddNodeRequest(request_id=f"add-{name}", node_id=name), timeout=30)
            tokens[name] = answer.token

        await asyncio.gather(*map(add, names))
    return tokens


@dataclass(frozen=True, slots=True)
class Return:
    """How a fleet came back. Times in seconds from the moment when the server listened again."""

    agents: int
    first_s: float
    median_s: float
    all_s: float
    asked: int
    """Registrations asked for after the server was back, with those that were told another turn."""
    refused: int
    peak_asked: int
    """The most registrations asked for within one second."""
    peak_let_in: int
    """The most that the server let in within one second, by its own log."""
    server_cpu_s: float
    """Processor time of the server from its start until all were back."""
    server_rss_mib: float

    def sentence(self) -> str:
        return (
            f"{self.agents} agents: first after {self.first_s:.1f} s, half after {self.median_s:.1f} s, all after "
            f"{self.all_s:.1f} s; {self.asked} registrations asked for, at most {self.peak_asked} within a second, "
            f"{self.refused} told another turn; server {self.server_cpu_s:.1f} s of processor, "
            f"{self.server_rss_mib:.0f} MiB"
        )


async def cut_off(fleet: Fleet, how: signal.Signals, away_s: float, within_s: float = 180) -> Return:
    """End the server by ``how``, start it again ``away_s`` later, and watch everybody come back."""
    server = fleet.server
    await asyncio.to_thread(server.end, how)
    logged = server.log.stat().st_size
    async with asyncio.timeout(30):
        while fleet.connected:
            await asyncio.sleep(0.02)
    await asyncio.sleep(away_s)
    server.start()
    async with asyncio.timeout(60):
        while not server.listening():
            await asyncio.sleep(0.01)
    back_at = time.monotonic()
    await fleet.until_connected(within_s)
    cpu_s, rss_mib = server.cpu_s(), server.rss_mib()
    up = sorted(agent.up_at[-1] - back_at for agent in fleet.agents)
    asked = sorted(at - back_at for agent in fleet.agents for at in agent.asked_at if at >= back_at)
    return Return(
        agents=len(fleet.agents),
        first_s=up[0],
        median_s=up[len(up) // 2],
        all_s=up[-1],
        asked=len(asked),
        refused=sum(at >= back_at for agent in fleet.agents for at in agent.refused_at),
        peak_asked=_peak(asked),
        peak_let_in=_peak(await asyncio.to_thread(server.let_in, logged)),
        server_cpu_s=cpu_s,
        server_rss_mib=rss_mib,
    )


def _peak(times: list[float]) -> int:
    """The most of them within any one second."""
    best = begin = 0
    for end, moment in enumerate(times):
        while times[begin] < moment - 1:
            begin += 1
        best = max(best, end - begin + 1)
    return best

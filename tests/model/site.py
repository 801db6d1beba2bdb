"""One server, one node and one engine in one event loop: how they begin, live, die and are buried."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self
from unittest import mock

import grpc
import structlog

from agent_core.agent import Agent
from agent_core.config import AgentConfig
from agent_core.runtimes.base import ContainerSpec
from agent_core.state import Clock
from outrider import tls
from outrider.errors import OutriderError
from outrider.retry import FOREVER
from outrider.v1 import control_service_pb2 as cpb
from outrider.v1 import control_service_pb2_grpc as cgrpc
from outrider.v1 import types_pb2 as types
from outrider.wire import from_rpc_error
from server_core.config import ServerConfig
from server_core.server import Server, init
from tests.model.engine import Connection, Engine
from tests.model.network import Link, MemoryChannel, MemoryServer
from tests.model.virtual import Clocks, Process, VirtualLoop, one_thread

NODE = "n1"
TIMEOUT_S = 10.0
MOMENT_S = 1.0
UNWIND_S = 60.0
_SHM = Path("/dev/shm")
_ROOM_BYTES = 512 * 1024**2


def _memory() -> Path | None:
    """A folder in memory, which is quicker to sync; None where it has too little room, as in many containers."""
    return _SHM if _SHM.is_dir() and shutil.disk_usage(_SHM).free > _ROOM_BYTES else None


class Site:
    """``with Site() as site``; everything in it is synchronous for who uses it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="outrider-model-", dir=_memory()))
        self.loop = VirtualLoop()
        self.clocks = Clocks(self.loop)
        self.link = Link()
        self.operator = Link()
        self.history: list[str] = []
        self.agent_process: Process | None = None
        self.server_process: Process | None = None
        self._agent: Agent | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._stack = contextlib.ExitStack()
        self.kills = 0

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self._tear_down()
            raise
        return self

    def _set_up(self) -> None:
        self._stack.enter_context(one_thread(self.loop, self.clocks))
        self._stack.enter_context(_repeatable_chance())
        self._stack.enter_context(mock.patch.object(Clock, "of_this_boot", self._clock))
        self._stack.enter_context(_plugin(self.folder / "site"))
        for name in ("outrider.tls.open_channel", "agent_core.session.open_channel"):
            self._stack.enter_context(mock.patch(name, self._open_channel))
        self._stack.enter_context(mock.patch("grpc.aio.server", self._make_server))
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[_nothing])
        self._stack.callback(structlog.reset_defaults)
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._begin())

    def __exit__(self, *_: object) -> None:
        try:
            self.loop.run_until_complete(self._end())
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        self._stack.close()
        asyncio.set_event_loop(None)
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _begin(self) -> None:
        self.engine = Engine()
        self.config = ServerConfig(data_dir=self.folder / "server", listen="127.0.0.1:0")
        made = await init(self.config)
        self.admin = tls.Identity(made.admin_token)
        await self._start_server()
        self.control: Any = cgrpc.ControlServiceStub(MemoryChannel(self.operator, self.admin))
        node = await self.control.AddNode(cpb.AddNodeRequest(request_id="add", node_id=NODE), timeout=TIMEOUT_S)
        self.token = str(node.token)
        await self.control.SetEnvSet(
            cpb.SetEnvSetRequest(request_id="envs", name="store", values={"KEY": "hunter2-hunter2"}), timeout=TIMEOUT_S
        )
        for name in ("a", "b"):
            await self.control.SetObject(
                cpb.SetObjectRequest(
                    request_id=f"object-{name}", ref=types.ObjectRef(kind="game", name=name), attributes_json=b"{}"
                ),
                timeout=TIMEOUT_S,
            )
        policy = self.folder / "policy.yaml"
        policy.write_text("warm_none: 1\nnetworks: {}\n")
        # A game of this node's, which nothing here may ever touch.
        self.game = await self.engine.create(
            ContainerSpec(name="game-1", image="game:1", labels={"outrider.node": NODE, "outrider.kind": "managed"})
        )
        await self.engine.start(self.game)
        await self._start_agent()
        await asyncio.sleep(5)

    async def _end(self) -> None:
        for process in (self.agent_process, self.server_process):
            if process is not None:
                process.kill("the end")
        await self._bury()
        await self.engine.aclose()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _clock(self) -> Clock:
        return Clock(self.clocks.boot_id)

    def _open_channel(self, _server: str, *, identity: Any = None, **_: Any) -> MemoryChannel:
        return MemoryChannel(self.link, identity)

    def _make_server(self, *_: Any, **options: Any) -> MemoryServer:
        return MemoryServer([self.link, self.operator], **options)

    def do(self, work: Any, moment_s: float = MOMENT_S) -> Any:
        """Carry out a coroutine, then let a moment pass. What died of it is buried."""

        async def both() -> Any:
            await self._bury()
            result = await work
            await asyncio.sleep(moment_s)
            await self._bury()
            await self._look()
            await self._bury()
            return result

        return self.loop.run_until_complete(both())

    def let(self, seconds: float) -> None:
        """Time passes."""
        self.do(asyncio.sleep(seconds), 0)

    @property
    def agent_up(self) -> bool:
        return self.agent_process is not None and self.agent_process.alive

    @property
    def server_up(self) -> bool:
        return self.server_process is not None and self.server_process.alive

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _ask(self, method: Any, request: Any) -> None:
        with contextlib.suppress(OutriderError):
            await self._call(method, request)

    async def _start_server(self) -> None:
        process = Process("server")
        server = Server(self.config)
        self._server, self.server_process = server, process
        starting = process.start(server.start())
        await asyncio.wait({starting})
        if process.alive:
            starting.result()

    async def _start_agent(self) -> None:
        process = Process("agent")
        agent = Agent(
            AgentConfig(
                node_id=NODE,
                server="localhost:1",
                token=self.token,
                state_dir=self.folder / "agent",
                plugins=["shell"],
                policy_file=self.folder / "policy.yaml",
                cancel_grace_s=5,
            ),
            runtime=Connection(self.engine, process),
        )
        self._agent, self.agent_process = agent, process
        self._agent_task = process.start(agent.run())
        ready = asyncio.ensure_future(agent.ready.wait())
        await asyncio.wait({self._agent_task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if process.alive and self._agent_task.done():
            self._agent_task.result()
            raise AssertionError("the agent ended by itself")
        if process.alive:
            self.loop.threads = [_settler(self.loop, agent)]

    async def _bury(self) -> None:
        """See off what died: its tasks have ended before anything takes its place."""
        for process in (self.agent_process, self.server_process):
            if process is None or process.alive or process.buried:
                continue
            process.buried = True
            self.history.append(f"{process.name} died of {process.died_of}")
            self.kills += process.died_of not in ("it stopped", "the end")
            process._reap()
            if process.tasks:
                _, late = await asyncio.wait(set(process.tasks), timeout=UNWIND_S)
                assert not late, f"a dead {process.name} does not let go: {late}"
            if process is self.server_process and self._server is not None:
                # Its files are closed and its lock is let go, as the kernel does it.
                closing = asyncio.Task(self._server._stack.aclose(), loop=self.loop, context=process.context.copy())
                await asyncio.wait({closing}, timeout=UNWIND_S)
                closing.cancelled() or closing.exception()  # it may ask for what the dead don't get
                services = getattr(self._server, "_services", None)
                if services is not None:
                    services.db.close()

    async def _look(self) -> None:
        """Called after everything that happened: what is to be seen each time."""


def _settler(loop: VirtualLoop, agent: Agent) -> Callable[[], None]:
    """Waits until the agent's spool has written all that it was given."""
    spool = agent._services.spool
    busy = False

    def noting(call: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            nonlocal busy
            busy = True
            return call(*arguments)

        return noted

    spool.append, spool.flush = noting(spool.append), noting(spool.flush)  # type: ignore[method-assign]

    def settle() -> None:
        nonlocal busy
        if not busy or not spool._thread.is_alive():
            return
        busy = False
        mark: Future[None] = Future()
        heard = threading.Event()

        def is_it(callback: Any) -> bool:
            if getattr(callback, "__self__", None) is not mark:
                return False
            heard.set()
            return True

        loop.swallow = is_it
        spool._queue.put(mark)
        assert heard.wait(20), "the spool does not write"

    return settle


@contextlib.contextmanager
def _plugin(site: Path) -> Any:
    """The model's step types in a distribution of their own, as an installer would leave it."""
    info = site / "test_shell-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "outrider_model_shell.py").write_text(
        "from tests.agent_rig import ShellPlugin\noutrider_step_types = ShellPlugin().outrider_step_types\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-shell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[outrider.steps]\nshell = outrider_model_shell\n")
    sys.path.insert(0, str(site))
    try:
        yield
    finally:
        sys.path.remove(str(site))
        sys.modules.pop("outrider_model_shell", None)


@contextlib.contextmanager
def _repeatable_chance() -> Any:
    """What spreads waits does so alike in every history: generators without a seed get the next number."""
    numbers = itertools.count(1)
    seed = random.Random.seed

    def seeded(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed(self, next(numbers) if a is None else a, version)

    with mock.patch.object(random.Random, "seed", seeded):
        FOREVER.rng.seed(7)
        yield


def _nothing(_logger: Any, _method: str, event: Any) -> Any:
    raise structlog.DropEvent

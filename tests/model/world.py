"""One server, one node, one engine, and everything that can befall them; the book of what truly happened.

`World` is driven by a test: each method lets one thing happen and then gives the others a moment. `judge` heals what
is broken, lets every program end, and compares what the server says with the book.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
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
from tests.agent_rig import BASE_IMAGE
from tests.model.engine import Connection, Engine, Execution
from tests.model.network import Direction, Link, MemoryChannel, MemoryServer
from tests.model.pipelines import Pipeline
from tests.model.virtual import PROCESS, Clocks, Process, VirtualLoop, one_thread

NODE = "n1"
TIMEOUT_S = 10.0
MOMENT_S = 1.0
_UNWIND_S = 60.0
_SHM = Path("/dev/shm")


@dataclass
class Submitted:
    """What an operator asked for. ``run_id`` is known once the server has answered."""

    key: str
    pipeline: Pipeline
    object_name: str
    run_id: str = ""
    cancel_asked: bool = False
    resolved: bool = False  # an operator was asked, or may have been heard, to settle what is unknown of it
    retry_of: str = ""  # the run that it goes on from
    states: list[int] = field(default_factory=list)  # those that were seen, each once, in order


class World:
    """``with World() as world``; everything in it is synchronous for who uses it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="outrider-model-", dir=_SHM if _SHM.is_dir() else None))
        self.loop = VirtualLoop()
        self.clocks = Clocks(self.loop)
        self.link = Link()
        self.operator = Link()
        self.submitted: list[Submitted] = []
        self.history: list[str] = []
        self.agent_process: Process | None = None
        self.server_process: Process | None = None
        self._agent: Agent | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._stack = contextlib.ExitStack()
        self._sequence = 0
        self.kills = 0
        self.cuts = 0

    # -- beginning and end

    def __enter__(self) -> World:
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
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.loop.run_until_complete(self._end())
        finally:
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

    # -- what a test lets happen; each ends with a moment for the others

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

    def submit(self, pipeline: Pipeline, object_name: str = "") -> Submitted:
        """An operator asks for a run; whether the server could answer shows in its run_id."""
        self._sequence += 1
        asked = Submitted(f"key-{self._sequence}", pipeline, object_name)
        self.submitted.append(asked)
        self.do(self._submit(asked))
        return asked

    def submit_again(self, asked: Submitted, times: int = 1) -> None:
        """The same request under the same key, ``times`` at once: it stays one run."""

        async def all_at_once() -> None:
            await asyncio.gather(*(self._submit(asked) for _ in range(times)))

        self.do(all_at_once())

    def cancel(self, asked: Submitted) -> None:
        asked.cancel_asked = True
        request = cpb.CancelRunRequest(request_id=f"cancel-{asked.key}", run_id=asked.run_id, reason="a test")
        request.grace.FromMilliseconds(5000)

        self.do(self._ask(self.control.CancelRun, request))

    def resolve(self, asked: Submitted, verdict: int) -> None:
        """An operator settles what is unknown of a run."""
        self._sequence += 1
        asked.resolved = True
        request = cpb.ResolveRunRequest(
            request_id=f"resolve-{self._sequence}", run_id=asked.run_id, verdict=verdict, reason="a test"
        )
        self.do(self._ask(self.control.ResolveRun, request))
        self.find_retries()

    def retry(self, asked: Submitted) -> None:
        """An operator has a run go on in another."""
        self._sequence += 1
        request = cpb.RetryRunRequest(
            request_id=f"retry-{self._sequence}", run_id=asked.run_id, allow_offline=True, reason="a test"
        )
        self.do(self._ask(self.control.RetryRun, request))
        self.find_retries()

    def drain(self, *, undo: bool, deadline_s: float = 0) -> None:
        """An operator empties the node, or lets it take runs again."""
        self._sequence += 1
        request = cpb.DrainNodeRequest(request_id=f"drain-{self._sequence}", node_id=NODE, reason="a test", undo=undo)
        if deadline_s:
            request.deadline.FromSeconds(int(deadline_s))
            for asked in self.submitted:
                asked.cancel_asked = True  # what is not over by then is cancelled
        self.do(self._ask(self.control.DrainNode, request))

    def find_retries(self) -> None:
        """Take note of the runs that go on from others."""

        async def find() -> None:
            with contextlib.suppress(OutriderError):
                found = await self._call(self.control.ListRuns, cpb.ListRunsRequest(node_id=NODE, limit=1000))
                known = {asked.run_id: asked for asked in self.submitted if asked.run_id}
                for run in reversed(found.runs):
                    if run.run_id not in known and run.retry_of in known:
                        former = known[run.retry_of]
                        made = Submitted(
                            run.run_id, former.pipeline, former.object_name, run.run_id, retry_of=former.run_id
                        )
                        made.cancel_asked = former.cancel_asked
                        known[run.run_id] = made
                        self.submitted.append(made)

        self.do(find(), 0)

    def finish(self, run: Execution, code: int, output: str = "") -> None:
        """A program ends by itself."""

        async def end() -> None:
            if output and code == 0:
                self.engine.outputs(run, output)
            if not run.told.done():
                run.told.set_result(code)

        self.do(end())

    def write(self, run: Execution, data: bytes) -> None:
        """A program prints."""

        async def put() -> None:
            self.engine.write(run, data)

        self.do(put(), 0.1)

    def start_agent(self) -> None:
        self.do(self._start_agent())

    def kill_agent(self) -> None:
        assert self.agent_process is not None

        async def kill() -> None:
            assert self.agent_process is not None
            self.agent_process.kill("the test")

        self.do(kill())

    def kill_agent_within(self, instants: int) -> None:
        """At a later instant: the n-th write, request or message from now."""
        assert self.agent_process is not None
        self.agent_process.die_within(instants)

    def kill_server_within(self, instants: int) -> None:
        assert self.server_process is not None
        self.server_process.die_within(instants)

    def stop_agent(self) -> None:
        """In order, as on SIGTERM."""

        async def stop() -> None:
            assert self._agent is not None
            assert self._agent_task is not None
            assert self.agent_process is not None
            self._agent.stop()
            await asyncio.wait({self._agent_task}, timeout=_UNWIND_S)
            self.agent_process.kill("it stopped")

        self.do(stop())

    def start_server(self) -> None:
        self.do(self._start_server())

    def kill_server(self) -> None:
        async def kill() -> None:
            assert self.server_process is not None
            self.server_process.kill("the test")

        self.do(kill())

    def stop_server(self) -> None:
        async def stop() -> None:
            assert self._server is not None
            assert self.server_process is not None
            stopping = self.server_process.start(self._server.stop(1.0))
            await asyncio.wait({stopping}, timeout=_UNWIND_S)
            self.server_process.kill("it stopped")

        self.do(stop())

    def cut(self) -> None:
        self.cuts += 1

        async def cut() -> None:
            self.link.cut()

        self.do(cut())

    def hush(self, *directions: Direction) -> None:
        """The link goes silent; nobody is told."""
        self.cuts += 1

        async def hush() -> None:
            self.link.hush(*directions)

        self.do(hush())

    def heal(self) -> None:
        async def heal() -> None:
            self.link.heal()

        self.do(heal())

    def stop_engine(self) -> None:
        async def stop() -> None:
            self.engine.stop_engine()

        self.do(stop())

    def start_engine(self) -> None:
        async def start() -> None:
            self.engine.start_engine()
            await self.engine.start(self.game)

        self.do(start())

    def reboot(self) -> None:
        """The machine of the node is switched off and on; the engine is back before the agent is."""

        async def reboot() -> None:
            if self.agent_process is not None:
                self.agent_process.kill("a reboot")
            await self._bury()
            if self.engine.up:
                self.engine.stop_engine()
            self.clocks.boot()
            await asyncio.sleep(MOMENT_S)
            self.engine.start_engine()
            await self.engine.start(self.game)

        self.do(reboot())

    def meddle(self, run: Execution, *, remove: bool) -> None:
        self.do(self.engine.meddle(run.process.spec.name, remove=remove))

    # -- inside

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _ask(self, method: Any, request: Any) -> None:
        with contextlib.suppress(OutriderError):
            await self._call(method, request)

    async def _submit(self, asked: Submitted) -> None:
        request = cpb.ExecutePipelineRequest(
            request_id=asked.key,
            key=asked.key,
            pipeline_yaml=asked.pipeline.text.encode(),
            node_id=NODE,
            allow_offline=True,
        )
        if asked.object_name:
            request.object.CopyFrom(types.ObjectRef(kind="game", name=asked.object_name))
        try:
            run = await self._call(self.control.ExecutePipeline, request)
        except OutriderError:
            return
        assert asked.run_id in ("", run.run_id), f"the key {asked.key} made two runs: {asked.run_id}, {run.run_id}"
        asked.run_id = run.run_id

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
                _, late = await asyncio.wait(set(process.tasks), timeout=_UNWIND_S)
                assert not late, f"a dead {process.name} does not let go: {late}"
            if process is self.server_process and self._server is not None:
                # Its files are closed and its lock is let go, as the kernel does it.
                closing = asyncio.Task(self._server._stack.aclose(), loop=self.loop, context=process.context.copy())
                await asyncio.wait({closing}, timeout=_UNWIND_S)
                closing.cancelled() or closing.exception()  # it may ask for what the dead don't get
                services = getattr(self._server, "_services", None)
                if services is not None:
                    services.db.close()

    async def _look(self) -> None:
        """Note each state that the server tells of a run."""
        if not self.server_up:
            return
        for asked in self.submitted:
            if not asked.run_id:
                continue
            with contextlib.suppress(OutriderError):
                run = await self._call(self.control.GetRun, cpb.GetRunRequest(run_id=asked.run_id))
                if not asked.states or asked.states[-1] != run.state:
                    asked.states.append(run.state)
        with contextlib.suppress(OutriderError):
            node = await self._call(self.control.GetNode, cpb.GetNodeRequest(node_id=NODE))
            if node.HasField("drain") and node.drain.drained:
                running = [each.key for each in self.engine.running()]
                assert not running, f"the node is told to be drained, and {running} run"


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


__all__ = ["BASE_IMAGE", "PROCESS", "Execution", "Submitted", "World", "json"]

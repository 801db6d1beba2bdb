"""What the parts of a running agent share, and the seams at which tests put something else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from agent_core.config import AgentConfig
from agent_core.outbox import Outbox
from agent_core.plugins import PluginHost
from agent_core.runtimes.base import Runtime
from agent_core.spool import Spool
from agent_core.state import State
from outrider.retry import OperationCounts
from outrider.v1 import node_service_pb2 as pb

if TYPE_CHECKING:
    from agent_core.containers import Containers
    from agent_core.diskwatch import DiskWatch
    from agent_core.engine import EngineWatch
    from agent_core.identities import Identities
    from agent_core.images import Images
    from agent_core.netpool import NetPool
    from agent_core.policy import NodePolicy
    from agent_core.volumes import Volumes

log = structlog.get_logger(__name__)


class EnvSource(Protocol):
    """Where envs come from: the session with the server."""

    async def get_envs(self, run_id: str, lease_id: str) -> tuple[dict[str, str], frozenset[str]]:
        """Values by "set.NAME", and the names of the secret ones.

        Waits for a session as long as it takes; raises PermanentError if they are refused.
        """


class Background:
    """Work off the critical path: owned by one task group, its failures logged, none of them orphaned."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Background:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        assert self._group is not None
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*exc)

    def start(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[None]:
        """Run ``work``; what it raises is logged."""
        assert self._group is not None, "the agent is not running"
        task = self._group.create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Removals:
    """Containers and directories of attempts that are over, removed a little later and never many at once.

    Removing takes the engine as long as a step's own work often does: it waits for a moment in which no step is
    being started, nor was just before, though not for ever, because what is finished takes room.
    """

    DELAY_S = 2.0
    CALM_S = 0.5
    LATEST_S = 30.0
    PATIENCE_S = 10.0  # for one removal; what takes longer goes on beside the next

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[float, Coroutine[Any, Any, object]]] = asyncio.Queue()
        self._slow: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._calm = asyncio.Event()
        self._calm.set()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Nothing that can wait is removed within this context: a step is being started."""
        self._starting += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._starting -= 1
            asyncio.get_running_loop().call_later(self.CALM_S, self._look_again)

    def add(self, removal: Coroutine[Any, Any, object]) -> None:
        """Have ``removal`` done."""
        self._queue.put_nowait((asyncio.get_running_loop().time() + self.DELAY_S, removal))

    async def run(self) -> None:
        """For ever; start it twice for two at a time. One that the engine hangs on holds up no other."""
        try:
            while True:
                due, removal = await self._queue.get()
                try:
                    await asyncio.sleep(due - asyncio.get_running_loop().time())
                    await self.calm(due + self.LATEST_S)
                except asyncio.CancelledError:
                    self._queue.put_nowait((due, removal))
                    raise
                task = asyncio.create_task(_logged(removal, "removal"), name="removal")
                self._slow.add(task)
                task.add_done_callback(self._slow.discard)
                await asyncio.wait({task}, timeout=self.PATIENCE_S)
        finally:
            for task in self._slow:
                task.cancel()
            await asyncio.gather(*self._slow, return_exceptions=True)

    async def calm(self, latest_at: float | None = None) -> None:
        """Until no step is being started, nor was just before; until ``latest_at`` (of the loop's clock) at the latest,
        which is ``LATEST_S`` from now unless given."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(latest_at or asyncio.get_running_loop().time() + self.LATEST_S):
                await self._calm.wait()

    def _look_again(self) -> None:
        if not self._starting:
            self._calm.set()

    async def drain(self, within_s: float) -> None:
        """Do what is left, now; what takes too long is left to the next agent's clean-up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._queue.empty():
                    await _logged(self._queue.get_nowait()[1], "removal")
        while not self._queue.empty():
            self._queue.get_nowait()[1].close()


async def _logged(work: Coroutine[Any, Any, object], name: str) -> None:
    try:
        await work
    except Exception as error:  # the one place where what nobody foresaw in the background is told
        log.exception("background work failed", work=name, error=str(error))


@dataclass
class Services:
    """All of an agent's parts that runs are made with."""

    config: AgentConfig
    state: State
    outbox: Outbox
    spool: Spool
    runtime: Runtime
    engine: EngineWatch
    disk: DiskWatch
    plugins: PluginHost
    policy: NodePolicy
    volumes: Volumes
    identities: Identities
    netpool: NetPool
    containers: Containers
    images: Images
    envs: EnvSource
    background: Background
    removals: Removals
    operations: OperationCounts = field(default_factory=OperationCounts)
    facts: Mapping[str, Any] = field(default_factory=dict)
    live: Callable[[pb.RunReport], None] = lambda _report: None  # progress, if anybody listens

    @property
    def attempts_dir(self) -> Path:
        """Where the directories of attempts are."""
        return self.config.state_dir / "attempts"

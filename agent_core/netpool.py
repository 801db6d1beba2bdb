"""Network namespaces for steps, made ahead: pause containers that step containers join.

Two thirds of the time that an engine takes to start a container goes into its network namespace. So a few
pause containers per network class wait, each is given to one run only, and thrown away with it: nothing
leaks from run to run. Steps of a run that follow one another share one; side-by-side steps get their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace

from agent_core.images import Images
from agent_core.journal import Journal
from agent_core.networks import ready_network
from agent_core.policy import AUTO_RUNTIME, NodePolicy
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, LABEL_POOL, ContainerSpec, Runtime
from agent_core.transitions import Transition
from outrider.errors import NotFound, OutriderError

MIGRATION = """
CREATE TABLE network_leases (
    container_id TEXT PRIMARY KEY,
    run_id TEXT NOT NULL,
    network_class TEXT NOT NULL
)
"""

PAUSE_IMAGE = "outrider/pause:1"
_QUICK_RUNTIME = "crun"
# Refilling takes the engine's time; a short run is over before it starts.
_REFILL_DELAY_S = 3.0
_READY_FOR_S = 15.0

log = logging.getLogger(__name__)


async def _at_once() -> None:
    return


@dataclass(slots=True)
class _Held:
    """What one run holds: all its namespaces, and which of them no step uses at the moment."""

    all: dict[str, str] = field(default_factory=dict)  # container id -> class
    idle: list[str] = field(default_factory=list)


class NetPool:
    """The warm pool of one node. `start` before the first lease, `aclose` at the end."""

    def __init__(
        self,
        runtime: Runtime,
        policy: NodePolicy,
        node_id: str,
        journal: Journal,
        *,
        image: str = PAUSE_IMAGE,
        calm: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        """``calm`` returns when the engine has nothing more urgent to do than to fill the pool."""
        self._runtime = runtime
        self._policy = policy
        self._images = Images(runtime, policy.images.of_the_agents_own())
        self._node_id = node_id
        self._journal = journal
        self._image = image
        self._calm = calm
        # No random id: an agent that has lost its journal still finds what it left.
        self._pool = hashlib.sha256(os.fsencode(journal.path.resolve())).hexdigest()[:16]
        self._warm: dict[str, list[str]] = defaultdict(list)
        self._runs: dict[str, _Held] = defaultdict(_Held)
        self._tasks: set[asyncio.Task[None]] = set()
        self._refilling: dict[str, asyncio.Task[None]] = {}
        self._urgent: dict[str, asyncio.Event] = {}
        self._ready_until: dict[str, float] = {}  # by network class, in the loop's time
        self._making: set[str] = set()  # names of those that are being created and started just now
        self._closed = False
        self._oci_runtime = "" if policy.oci_runtime == AUTO_RUNTIME else policy.oci_runtime
        self._chosen = False

    @property
    def oci_runtime(self) -> str:
        """What the engine carries steps out with, by its name for it; "" is its default.

        Who has a namespace from `lease` can rely on it: the pause container was started with the same.
        """
        return self._oci_runtime

    async def start(self) -> None:
        """Find what a former agent left, give up what nobody uses, and begin to fill the pool.

        Raises EngineUnavailable; call it again when the engine is back (or has been restarted).
        """
        await self._choose_oci_runtime()
        known = {str(row["container_id"]): row for row in await self._journal.query("SELECT * FROM network_leases")}
        mine = self._all()
        found = await self._runtime.list(labels={LABEL_NODE: self._node_id, LABEL_KIND: "pause"})
        fresh = self._all() - mine  # made while the engine was asked, for runs that go on: its answer may not know them
        alive: set[str] = set()
        for info in found:
            if info.id in known and info.state == "running":
                row = known[info.id]
                alive.add(info.id)
                # Whether a step that outlived the former agent still uses it is not known: never idle.
                self._runs[str(row["run_id"])].all[info.id] = str(row["network_class"])
            elif info.labels.get(LABEL_POOL) != self._pool:
                continue  # of another agent on this engine, whose node has the same name under another server
            elif info.id in fresh or info.name in self._making:
                continue
            elif info.id not in mine or info.state != "running":
                self._background(self._discard(info.id))
        running = {info.id for info in found if info.state == "running"} | fresh
        for warm in self._warm.values():
            warm[:] = [container for container in warm if container in running]
        for held in self._runs.values():
            held.idle[:] = [container for container in held.idle if container in running]
            for gone in set(held.all) - running:
                del held.all[gone]
        gone_rows = [(container,) for container in known if container not in alive]
        if gone_rows:
            sql = "DELETE FROM network_leases WHERE container_id = ?"
            await self._journal.write(Transition.NETWORK_RETURNED, lambda db: db.executemany(sql, gone_rows))
        for network_class in ("none", *self._policy.networks):
            self._refill(network_class, delay_s=0)

    async def lease(self, run_id: str, network_class: str) -> str:
        """The id of a running pause container of this class, for one step of this run; join ``container:<id>``.

        Hand it to `give_back` when the step is over. PolicyViolation if the node has no such class.
        """
        self._policy.network_of(network_class)
        held = self._runs[run_id]
        for container in held.idle:
            if held.all[container] == network_class:
                held.idle.remove(container)
                return container
        warm = self._warm[network_class]
        if warm:
            await self._ready(network_class)
        container = warm.pop() if warm else await self._make(network_class)
        held.all[container] = network_class
        row = (container, run_id, network_class)
        await self._journal.execute(Transition.NETWORK_LEASED, "INSERT INTO network_leases VALUES (?, ?, ?)", row)
        self._refill(network_class, delay_s=_REFILL_DELAY_S)
        return container

    def give_back(self, run_id: str, container: str) -> None:
        """The step that leased it has ended: the run's next step may have it."""
        held = self._runs.get(run_id)
        if held and container in held.all and container not in held.idle:
            held.idle.append(container)

    def discard(self, run_id: str, container: str) -> None:
        """It does not work (the engine was restarted, somebody removed it): never lease it again."""
        held = self._runs.get(run_id)
        if held and held.all.pop(container, None) is not None and container in held.idle:
            held.idle.remove(container)
        self._background(self._forget([container]))

    def release(self, run_id: str) -> None:
        """The run is over: throw away what it held (in the background) and fill the pool up. Idempotent."""
        held = self._runs.pop(run_id, None)
        if held is None:
            return
        self._background(self._forget(list(held.all)))
        for network_class in set(held.all.values()):
            self._refill(network_class, delay_s=0)

    def release_others(self, active: Collection[str]) -> None:
        """Throw away what runs hold that are over: a former agent may have died between their end and `release`."""
        for run_id in [each for each in self._runs if each not in active]:
            self.release(run_id)

    async def settle(self) -> None:
        """Wait until nothing goes on in the background; for tests and an orderly end."""
        while tasks := [*self._tasks, *self._refilling.values()]:
            await asyncio.gather(*tasks, return_exceptions=True)
            # From Python 3.12 on this gives way to nobody where all are done, and those who are keep themselves listed
            # until their callbacks have run.
            await asyncio.sleep(0)

    async def aclose(self, *, remove: bool = True) -> None:
        """Stop filling; with ``remove``, remove the warm ones. Those of runs stay for the next agent."""
        self._closed = True
        for task in self._refilling.values():
            task.cancel()
        await self.settle()
        if remove:
            warm = [container for containers in self._warm.values() for container in containers]
            self._warm.clear()
            await asyncio.gather(*(self._discard(container) for container in warm))

    async def _ready(self, network_class: str) -> str:
        """The class's network, there and guarded. Asked for again now and then, as others may have undone it."""
        now = asyncio.get_running_loop().time()
        if now >= self._ready_until.get(network_class, 0.0):
            await ready_network(self._runtime, self._policy, self._node_id, network_class)
            self._ready_until[network_class] = now + _READY_FOR_S
        return self._policy.network_of(network_class)

    async def _make(self, network_class: str) -> str:
        network = await self._ready(network_class)
        spec = ContainerSpec(
            name=f"outrider-pause-{network_class}-{secrets.token_hex(6)}",
            image=self._image,
            labels={LABEL_NODE: self._node_id, LABEL_KIND: "pause", LABEL_POOL: self._pool},
            network=network,
            tmp_size_bytes=0,
            memory_bytes=32 * 1024**2,
            pids=16,
            log_max_bytes=1024**2,
            oci_runtime=self._oci_runtime,
        )
        making = asyncio.create_task(self._create_and_start(spec))
        self._making.add(spec.name)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            # The engine makes it all the same: nobody would know of it.
            self._background(self._discard_when_made(making))
            raise
        except OutriderError as error:
            if error.code != "cannot_start" or self._policy.oci_runtime != AUTO_RUNTIME or not spec.oci_runtime:
                self._ready_until.pop(network_class, None)
                raise
            # It is offered by name alone: whether it is there, and likes this machine, shows when it starts something.
            self._oci_runtime = ""
            log.warning("steps run with the engine's default, as %s starts nothing here: %s", spec.oci_runtime, error)
        finally:
            self._making.discard(spec.name)
        return await self._make(network_class)

    async def _create_and_start(self, spec: ContainerSpec) -> str:
        image_id = await self._images.before_create(self._image)
        try:
            container = await self._runtime.create(replace(spec, image_id=image_id))
        except NotFound as error:
            if error.code != "image_not_found":
                raise
            await self._images.ensure(self._image)
            container = await self._runtime.create(spec)
        try:
            await self._runtime.start(container)
        except BaseException:
            self._background(self._discard(container))
            raise
        return container

    async def _discard_when_made(self, making: asyncio.Task[str]) -> None:
        with suppress(OutriderError):
            await self._discard(await making)

    async def _choose_oci_runtime(self) -> None:
        if self._policy.oci_runtime != AUTO_RUNTIME:
            return
        offered = _QUICK_RUNTIME in (await self._runtime.info()).oci_runtimes
        if not offered:
            self._oci_runtime = ""
        elif not self._chosen:
            # Once: the namespaces that wait would not tell whether one that comes later works.
            self._oci_runtime = _QUICK_RUNTIME
        self._chosen = True

    def _all(self) -> set[str]:
        warm = {container for containers in self._warm.values() for container in containers}
        return warm.union(*(held.all for held in self._runs.values()))

    def _wanted(self, network_class: str) -> int:
        found = self._policy.networks.get(network_class)
        return self._policy.warm_none if found is None else found.warm

    def _refill(self, network_class: str, *, delay_s: float) -> None:
        if self._closed:
            return
        urgent = self._urgent.setdefault(network_class, asyncio.Event())
        if delay_s == 0:
            urgent.set()
        if network_class in self._refilling:
            return
        task = asyncio.create_task(self._fill(network_class, urgent, delay_s), name=f"netpool-{network_class}")
        self._refilling[network_class] = task
        task.add_done_callback(lambda _: self._refilling.pop(network_class, None))

    async def _fill(self, network_class: str, urgent: asyncio.Event, delay_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(urgent.wait(), delay_s or None)
        urgent.clear()
        await self._calm()
        try:
            while not self._closed and len(self._warm[network_class]) < self._wanted(network_class):
                container = await self._make(network_class)
                self._warm[network_class].append(container)
        except OutriderError as error:
            # A pool that is not full only costs time: leases make their own, and say what is wrong.
            log.warning("the pool of network namespaces (%s) can't be filled: %s", network_class, error)

    async def _forget(self, containers: list[str]) -> None:
        for container in containers:
            await self._discard(container)

        def drop(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM network_leases WHERE container_id = ?", [(c,) for c in containers])

        await self._journal.write(Transition.NETWORK_RETURNED, drop)

    async def _discard(self, container: str) -> None:
        try:
            await self._runtime.remove(container, force=True)
        except OutriderError as error:
            log.warning("the pause container %s can't be removed now: %s", container[:12], error)

    def _background(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

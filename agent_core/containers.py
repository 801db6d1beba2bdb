"""Managed containers: started, stopped, replaced and found again by name; adopted when they are there already.

All containers of the engine can be listed and inspected. Those that Outrider did not start are controlled
only where the node's policy says so, those of steps and namespaces only by the agent itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent_core.container_spec import (
    NEXT,
    ContainerScope,
    ManagedSpec,
    Replace,
)
from agent_core.execs import ExecRequest, Execs, Executed, Piece
from agent_core.images import Images, Tell
from agent_core.journal import Journal
from agent_core.liveness import supervision_of
from agent_core.managed_files import ManagedFiles
from agent_core.managed_orders import Order, Orders, advertised_address, aliases_of
from agent_core.managed_rows import ManagedRow, ManagedRows
from agent_core.networks import ready_network
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.private_networks import PrivateNetworks
from agent_core.readiness import NotReady, wait_ready
from agent_core.replacing import Replacing, base_of
from agent_core.runtimes.base import (
    LABEL_KIND,
    LABEL_NAME,
    LABEL_NODE,
    LABEL_OBJECT,
    LABEL_RUN,
    LABEL_SPEC,
    ContainerInfo,
    Exit,
    Runtime,
    StreamName,
)
from agent_core.volumes import Volumes
from outrider.errors import Conflict, NotFound, OutriderError, PermissionDenied, PolicyViolation, TemporaryError
from outrider.masking import Masker

Owner = Literal["managed", "step", "pause", "foreign"]
DEFAULT_GRACE_S = 10.0
_MAKING_S = 5.0  # that a container which is being made is waited for by one that is cancelled
_STATES_TO_ADOPT = ("running", "created", "exited")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A managed container that runs and is ready.

    ``ports``: host ports by name. ``address``: where they are. ``host_paths``: where its volumes are on the node.
    """

    id: str
    name: str
    image: str
    ports: dict[str, int]
    address: str
    host_paths: dict[str, str] = field(default_factory=dict)
    adopted: bool = False
    replaced: bool = False


class Containers:
    """The managed containers of one node. ``scope=None`` is the operator, who reaches all of them.

    ``health`` is what their liveness is, by name, as far as they have one; ``changed`` is told the name of each that
    is started, replaced or removed.
    """

    def __init__(
        self, runtime: Runtime, journal: Journal, ports: Ports, volumes: Volumes, policy: NodePolicy, node_id: str
    ) -> None:
        self._runtime = runtime
        self._ports = ports
        self._volumes = volumes
        self._policy = policy
        self._images = Images(runtime, policy.images)
        self._node_id = node_id
        self._files = ManagedFiles(journal.path.parent / "managed")
        self._networks = PrivateNetworks(runtime, policy, node_id)
        self._execs = Execs(runtime, journal)
        self._orders = Orders(policy, self._files, node_id)
        self.rows = ManagedRows(journal)
        self._replacing = Replacing(runtime, self.rows, ports, volumes, self._files, self._networks)
        self.health: dict[str, str] = {}
        self.changed: Callable[[str], object] = lambda _name: None
        self._missing_since: dict[str, float] = {}
        # Held by whoever works on that name, and gone with the last of them: any name can be asked for.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # -- looking

    async def list(self, scope: ContainerScope | None = None) -> list[ContainerInfo]:
        """All containers of the engine, foreign ones too; with a scope, the managed ones that it reaches."""
        found = await self._runtime.list()
        if scope is not None:
            found = [info for info in found if self.owner(info) == "managed" and _reaches(scope, info)]
        return [self._described(info) for info in found]

    async def inspect(self, name: str, scope: ContainerScope | None = None) -> ContainerInfo:
        """One container by name or id. NotFound; PermissionDenied if the scope does not reach it."""
        info = await self._runtime.inspect(name)
        if scope is not None:
            self._check_control(info, scope)
        return self._described(info)

    def owner(self, info: ContainerInfo) -> Owner:
        """Whose it is: "foreign" for what this agent did not make."""
        if info.labels.get(LABEL_NODE) != self._node_id:
            return "foreign"
        kind = info.labels.get(LABEL_KIND)
        return kind if kind in ("managed", "step", "pause") else "foreign"  # type: ignore[return-value]

    async def logs(
        self, name: str, *, follow: bool = False, tail: int | None = None, scope: ContainerScope | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        """Its log, from the engine's own, with the secrets masked that it was given; it is never attached to."""
        info = await self.inspect(name, scope)
        secrets = await self._secrets_of(info)
        maskers: dict[StreamName, Masker] = defaultdict(lambda: Masker(secrets))
        async with contextlib.aclosing(self._runtime.logs(info.id, follow=follow, tail=tail)) as items:
            async for stream, data in items:
                if masked := maskers[stream].feed(data):
                    yield stream, masked
        for stream, masker in maskers.items():
            if rest := masker.flush():
                yield stream, rest

    async def execute(
        self, name: str, request: ExecRequest, scope: ContainerScope
    ) -> AsyncGenerator[Piece | Executed, None]:
        """Run a program inside a container that runs, with no more rights than it has: its output, masked, and at last
        how it ended. Asked again with the same id, it is not run again; see `agent_core.execs`."""
        info = await self._controlled(name, scope)
        self._policy.check_additions(
            capabilities=(), devices=(), host_network=False, writable_root=False, user=request.user
        )
        if info.state != "running":
            raise Conflict(
                f"the container {info.name} is {info.state}, so nothing can be run inside it",
                code="container_not_running",
                hint="start it first",
            )
        secrets = [*await self._secrets_of(info), *scope.secrets]
        async with contextlib.aclosing(self._execs.run(owner_of(scope), info.id, request, secrets)) as items:
            async for item in items:
                yield item

    async def wait(self, name: str, scope: ContainerScope | None = None) -> Exit:
        """How it ended, once it has."""
        info = await self.inspect(name, scope)
        return await self._runtime.exited(info.id)

    # -- starting

    async def start(
        self,
        spec: ManagedSpec,
        scope: ContainerScope,
        *,
        replace: Replace = "no",
        tell: Tell | None = None,
    ) -> Started:
        """Start a container, or adopt the one of this name if it was made from the same specification.

        ``tell`` hears how the pull of its image goes on. One made from another specification is a Conflict, or gives
        way as ``replace`` says (`agent_core.replacing`). What does not get ready is removed again, and the error has
        its last log lines.
        """
        order = self._orders.of(spec, scope)
        found = await self._find(spec.name)
        image_id = None
        if found is not None:
            self._check_replaceable(found, order, replace)
        if found is None or not order.is_made_as(found):
            # Before the name is taken hold of: a pull may take an hour, and the former container is to be watched.
            image_id = await self._images.ensure(spec.image, run=scope.run_id, tell=tell)
        try:
            async with self._alone(spec.name):
                await self._replacing.settle(spec.name, order.digest)
                return await self._start(order, replace, image_id)
        finally:
            self.changed(spec.name)

    async def _start(self, order: Order, replace: Replace, image_id: str | None) -> Started:
        name = order.spec.name
        existing = await self._find(name)
        if existing is None:
            return await self._make(order, name, image_id)
        self._check_replaceable(existing, order, replace)
        if order.is_made_as(existing):
            if existing.state in _STATES_TO_ADOPT:
                return await self._adopt(existing, order)
            await self._runtime.stop(existing.id, grace_s=self._grace(name))
            await self._replacing.drop(name, existing.id)
            return await self._make(order, name, image_id)
        if replace == "start-first" and existing.state in ("running", "restarting", "paused"):
            return await self._start_beside(order, image_id)
        await self._replacing.set_aside(name, existing, order.intent())
        return await self._make(order, name, image_id)

    async def _start_beside(self, order: Order, image_id: str | None) -> Started:
        """A successor while the former runs on; it takes the name once it is ready."""
        name, beside = order.spec.name, order.spec.name + NEXT
        wanted = [port.name for port in order.spec.ports if port.host is not None]
        if wanted or (order.network == "host" and order.spec.ports):
            raise Conflict(
                f"the container {name} can't be replaced by one that is started first: its port "
                f"{(wanted or [order.spec.ports[0].name])[0]} can't be two containers' at a time",
                code="port_taken",
                hint="leave `host` out to get another port, or use `replace: stop-first`",
            )
        found = await self._find(beside)
        if found is not None:
            started = await self._adopt(found, order, beside)
        else:
            started = await self._make(order, beside, image_id)
        await self.rows.switching(name, supervision_of(order.spec, self._ports.held(beside)))
        await self._replacing.switch(name)
        return replace(started, name=name, adopted=False, replaced=True)

    async def _make(self, order: Order, name: str, image_id: str | None) -> Started:
        """From nothing to ready, or to nothing again. ``image_id``: as `Images.ensure` gave it, if it was asked."""
        spec = order.spec
        await self.rows.starting(name, order.intent())
        try:
            ports = await self._ports.lease(name, spec.wishes())
            if image_id is None:
                image_id = await self._images.ensure(spec.image, run=order.scope.run_id)
            if order.network != "host":
                await ready_network(self._runtime, self._policy, self._node_id, spec.network)
            await self._volumes.use(name, [mount.source for mount in order.mounts])
            if order.as_another:
                written = [mount.source for mount in order.mounts if mount.writable]
                await self._volumes.share(written, order.scope.gid)
            await asyncio.to_thread(
                self._files.write,
                spec.name,
                order.digest,
                spec.files,
                ports=ports,
                user=order.user,
                secrets=order.scope.secrets,
            )
            container_id = await _seen_through(self._create(order, name, ports, image_id))
            await self._runtime.start(container_id)
            await wait_ready(self._runtime, container_id, spec, ports, secrets=order.scope.secrets)
        except OutriderError as error:
            await self._give_up(name, error)
            if error.code == "port_taken" and all(port.host is None for port in spec.ports):
                # It was free when it was chosen: at the next try another one is.
                raise TemporaryError(error.message, code=error.code, hint=error.hint) from error
            raise
        return await self._is_ready(order, name, container_id, ports)

    async def _create(self, order: Order, name: str, ports: dict[str, int], image_id: str) -> str:
        async with contextlib.AsyncExitStack() as stack:
            private = ""
            if order.spec.private_network:
                private = await stack.enter_async_context(self._networks.ensured(order.scope))
            container = self._orders.container(order, name, ports, private)
            container_id = await self._runtime.create(replace(container, image_id=image_id))
            if private and order.network != "none":
                await self._runtime.connect(private, container_id, aliases=aliases_of(order.spec))
        return container_id

    async def _is_ready(self, order: Order, name: str, container_id: str, ports: dict[str, int]) -> Started:
        spec = order.spec
        replaced = False
        if name == spec.name:
            await self.rows.ready(name, supervision_of(spec, ports))
            await self._ports.release(name, but=[port.name for port in spec.ports])
            replaced = len(self.rows.family(name)) > 1
            if replaced:
                await self._replacing.leave(name)
        return self._started(order, container_id, ports, replaced=replaced)

    async def _adopt(self, info: ContainerInfo, order: Order, name: str = "") -> Started:
        spec = order.spec
        name = name or spec.name
        known = self.rows.get(name)
        proven = known is not None and known.state == "ready" and known.digest == order.digest
        ports = await self._ports.lease(name, spec.wishes()) if info.state != "running" else {}
        ports = ports or self._ports.held(name)
        if not proven:
            await self.rows.starting(name, order.intent())
        try:
            if info.state != "running":
                await self._runtime.start(info.id)
            if info.state != "running" or not proven:
                secrets, since = order.scope.secrets, info.finished_at
                await wait_ready(self._runtime, info.id, spec, ports, secrets=secrets, since=since)
        except OutriderError as error:
            # One that was ready once is somebody's game: it is stopped only by those who mean it.
            if not proven:
                await self._give_up(name, error)
            raise
        # Also where it runs on as it was: how it is watched is no part of what it was made from.
        started = await self._is_ready(order, name, info.id, ports)
        return replace(started, adopted=True)

    async def _give_up(self, name: str, error: OutriderError) -> None:
        """After a start that failed: undo it, and say in the error what became of the former container."""
        row = self.rows.get(name)
        told = await self._replacing.abandon(row) if row is not None else ""
        if told and isinstance(error, NotReady):
            error.became(told)
        elif told:
            error.hint = "; ".join(filter(None, (error.hint, told)))

    async def start_existing(self, name: str, scope: ContainerScope | None = None) -> ContainerInfo:
        """Start one that was stopped. Starting a running one does nothing."""
        async with self._alone(name):
            info = await self._controlled(name, scope)
            await self._runtime.start(info.id)
            self.changed(info.name)
            return await self.inspect(info.id)

    # -- stopping

    async def stop(
        self, name: str, *, grace_s: float | None = None, scope: ContainerScope | None = None
    ) -> ContainerInfo:
        """Stop signal, then kill after the grace (default: its own, else 10 s). It stays, and keeps its ports."""
        async with self._alone(name):
            info = await self._controlled(name, scope)
            await self._runtime.stop(info.id, grace_s=self._grace(info.name) if grace_s is None else grace_s)
            return await self.inspect(info.id)

    async def restart(
        self, name: str, *, grace_s: float | None = None, scope: ContainerScope | None = None
    ) -> ContainerInfo:
        """Restart in place: the same container, the same ports."""
        async with self._alone(name):
            info = await self._controlled(name, scope)
            await self._runtime.restart(info.id, grace_s=self._grace(info.name) if grace_s is None else grace_s)
            return await self.inspect(info.id)

    async def restart_failed(
        self, name: str, run: ContainerInfo, *, restarts: int, reason: str, restart: bool
    ) -> ContainerInfo | None:
        """Restart one that does not work any more, or only write that down; None if it is not the same run of it now.

        ``run``: what was found not to work. Somebody may have stopped, restarted or replaced it meanwhile.
        """
        async with self._alone(name):
            info = await self._find(name)
            if info is None or info.state != "running" or (info.id, info.started_at) != (run.id, run.started_at):
                return None
            await self.rows.restarting(name, restarts, reason)
            if restart:
                await self._runtime.restart(info.id, grace_s=self._grace(name))
            return await self._find(name)

    async def remove(self, name: str, *, force: bool = False, scope: ContainerScope | None = None) -> None:
        """Remove it and give its ports back. Conflict if it runs and not ``force``. One that is gone is no error
        for a scope that could have had it."""
        async with self._alone(name):
            info = await self._find(name)
            if info is None:
                row = self.rows.get(name)
                if row is None or (scope is not None and not _could_reach(scope, row)):
                    raise NotFound(f"there is no container named {name} on this node")
                await self._replacing.drop(name, "")  # gone behind our back: only what we hold for it is left
                self.changed(name)
                return
            self._check_control(info, scope)
            if info.state in ("running", "paused", "restarting") and not force:
                raise Conflict(
                    f"the container {info.name} is {info.state}",
                    code="container_running",
                    hint="stop it first, or use force",
                )
            if self.owner(info) == "managed":
                await self._replacing.drop(info.name, info.id)
                self.changed(info.name)
            else:
                await self._runtime.remove(info.id, force=force)

    async def end_attempt(self, scope: ContainerScope) -> None:
        """The attempt is over for good: undo what it began to start and what never got ready, and end the programs
        that it runs inside containers."""
        await self._execs.end(owner_of(scope))
        for row in self.rows.unfinished():
            if (row.run_id, row.step, row.attempt) != (scope.run_id, scope.step, scope.attempt):
                continue
            await self._undo(row)

    async def recover(self) -> None:
        """Go on with what a former agent left in the middle of, unless its attempt is still to do that itself."""
        for row in self.rows.unfinished():
            if row.state != "starting" or self.rows.attempt_is_over(row.run_id, row.step, row.attempt):
                await self._undo(row)
        for owner in self._execs.owners():
            run_id, step, attempt = owner.rsplit("/", 2)
            if self.rows.attempt_is_over(run_id, step, int(attempt)):
                await self._execs.end(owner)
        await self._networks.collect()
        for name in await asyncio.to_thread(self._files.names):
            async with self._alone(name):
                digests = {row.digest for row in self.rows.family(name)}
                await asyncio.to_thread(self._files.keep, name, digests)

    async def forget_missing(
        self, found: Sequence[ContainerInfo], *, older_than_s: float, active: Collection[str]
    ) -> None:
        """Give back ports and volumes of containers that somebody removed long ago, but for those of ``active`` runs.

        ``found`` is what the engine has now. How long one has been missing counts from when that was first seen.
        """
        there, now = {info.name for info in found}, time.monotonic()
        rows = self.rows.all()
        missing = {row.name for row in rows if row.name not in there}
        beginning = {row.name for row in rows if row.state != "ready" and row.run_id in active}
        self._missing_since = {name: self._missing_since.get(name, now) for name in missing - beginning}
        for name, since in list(self._missing_since.items()):
            if now - since < older_than_s:
                continue
            async with self._alone(base_of(name)):
                if await self._find(name) is None:
                    log.info("the container %s is gone for good: what was held for it is given back", name)
                    await self._replacing.drop(name, "")
                    self._missing_since.pop(name, None)
                    self.changed(base_of(name))
        await self._ports.reap()

    async def aclose(self) -> None:
        """The agent stops. Containers, and programs inside them, go on."""
        await self._execs.aclose()

    # -- inside

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield

    async def _undo(self, row: ManagedRow) -> None:
        base = base_of(row.name)
        async with self._alone(base):
            try:
                now = self.rows.get(row.name)
                if now is not None and now.state == "starting" == row.state:
                    await self._replacing.abandon(now)
                await self._replacing.settle(base)
            except OutriderError as error:
                log.warning("the container %s could not be settled: %s", row.name, error)
        self.changed(base)

    def _check_replaceable(self, info: ContainerInfo, order: Order, replace: Replace) -> None:
        self._check_adoptable(info, order.spec, order.scope)
        if not order.is_made_as(info) and replace == "no" and not self._replacement_under_way(order):
            raise Conflict(
                f"the container {order.spec.name} exists already and was made from another specification",
                code="container_exists",
                hint="stop and remove it first, or give `replace: stop-first` or `replace: start-first`",
            )

    def _replacement_under_way(self, order: Order) -> bool:
        row = self.rows.get(order.spec.name)
        return row is not None and row.state == "starting" and row.digest == order.digest

    async def _controlled(self, name: str, scope: ContainerScope | None) -> ContainerInfo:
        info = await self._runtime.inspect(name)
        self._check_control(info, scope)
        return info

    def _check_control(self, info: ContainerInfo, scope: ContainerScope | None) -> None:
        owner = self.owner(info)
        if owner == "managed":
            if scope is None or _reaches(scope, info):
                return
            raise PermissionDenied(
                f"the container {info.name} belongs to {_belongs(info)}, not to this run or its object",
                code="foreign_container",
            )
        if owner == "foreign":
            if scope is None and self._policy.control_foreign:
                return
            raise PolicyViolation(
                f"the container {info.name} was not started by Outrider, and this node's policy leaves such alone",
                code="foreign_container",
                hint="control_foreign: true in the node's policy lets operators control it",
            )
        raise PolicyViolation(
            f"the container {info.name} is one of the agent's own ({owner})",
            code="agents_container",
            hint="cancel its run instead",
        )

    def _check_adoptable(self, info: ContainerInfo, spec: ManagedSpec, scope: ContainerScope) -> None:
        if self.owner(info) != "managed":
            raise Conflict(
                f"there is a container named {spec.name} on this node already that is not Outrider's to use",
                code="name_taken",
                hint="rename or remove it, or choose another name",
            )
        if not _reaches(scope, info):
            raise Conflict(
                f"the container {spec.name} exists already and belongs to {_belongs(info)}",
                code="name_taken",
                hint="choose another name",
            )

    async def _find(self, name: str) -> ContainerInfo | None:
        try:
            return await self._runtime.inspect(name)
        except NotFound:
            return None

    def _started(self, order: Order, container_id: str, ports: dict[str, int], *, replaced: bool = False) -> Started:
        spec = order.spec
        return Started(
            id=container_id,
            name=spec.name,
            image=spec.image,
            ports={port.name: ports[port.name] for port in spec.ports if port.name in ports},
            address=advertised_address(self._policy),
            host_paths={name: order.scope.volumes[name].host_path for name in sorted(spec.volumes)},
            replaced=replaced,
        )

    def _described(self, info: ContainerInfo) -> ContainerInfo:
        """With what the agent alone knows of it: the names of its ports, and its liveness."""
        if self.owner(info) != "managed":
            return info
        info = replace(info, health=self.health.get(info.name, info.health))
        if not info.ports:
            return info
        names = {port: name for name, port in self._ports.held(info.name).items()}
        return replace(info, ports=tuple(replace(port, name=names.get(port.host, "")) for port in info.ports))

    def _grace(self, name: str) -> float:
        known = self.rows.get(name)
        return known.grace_s if known else DEFAULT_GRACE_S

    async def _secrets_of(self, info: ContainerInfo) -> tuple[str, ...]:
        labels = info.labels
        in_files = await asyncio.to_thread(
            self._files.secrets, labels.get(LABEL_NAME) or info.name, labels.get(LABEL_SPEC, "-")
        )
        return (*info.secrets, *in_files)


async def _seen_through(making: Coroutine[Any, Any, str]) -> str:
    """What is made, or that it was, though who wants it is cancelled meanwhile.

    The engine goes on with a request that is broken off: what it made a moment later would be undone by nobody, and
    adopted by the next one who asks for it.
    """
    task = asyncio.ensure_future(making)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=_MAKING_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def owner_of(scope: ContainerScope) -> str:
    """Whose executions they are: those of one attempt."""
    return f"{scope.run_id}/{scope.step}/{scope.attempt}"


def _reaches(scope: ContainerScope, info: ContainerInfo) -> bool:
    if scope.object_ref and info.labels.get(LABEL_OBJECT) == scope.object_ref:
        return True
    return info.labels.get(LABEL_RUN) == scope.run_id


def _belongs(info: ContainerInfo) -> str:
    object_ref = info.labels.get(LABEL_OBJECT)
    return f"the object {object_ref}" if object_ref else f"the run {info.labels.get(LABEL_RUN, '?')}"


def _could_reach(scope: ContainerScope, row: ManagedRow) -> bool:
    return row.run_id == scope.run_id or bool(scope.object_ref and row.object_ref == scope.object_ref)

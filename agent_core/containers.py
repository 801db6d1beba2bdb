"""Managed containers: started, stopped and found again by name; adopted when they are there already.

All containers of the engine can be listed and inspected. Those that Outrider did not start are controlled
only where the node's policy says so, those of steps and namespaces only by the agent itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import sqlite3
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agent_core.container_spec import (
    ContainerScope,
    ManagedSpec,
    check_against_policy,
    digest_of,
    mounts_of,
    substitute,
)
from agent_core.images import Images
from agent_core.journal import Journal
from agent_core.networks import ready_network
from agent_core.policy import NodePolicy, capability_name
from agent_core.ports import Ports
from agent_core.readiness import wait_ready
from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_NAME,
    LABEL_NODE,
    LABEL_OBJECT,
    LABEL_PORTS,
    LABEL_RUN,
    LABEL_SECRETS,
    LABEL_SPEC,
    LABEL_STEP,
    ContainerInfo,
    ContainerSpec,
    Exit,
    PortBinding,
    Runtime,
    StreamName,
)
from agent_core.transitions import Transition
from agent_core.volumes import Volumes
from outrider.errors import Conflict, NotFound, OutriderError, PermissionDenied, PolicyViolation
from outrider.masking import Masker, contains_secret

MIGRATION = """
CREATE TABLE managed (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    state TEXT NOT NULL,
    run_id TEXT NOT NULL,
    step TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    object_ref TEXT,
    grace_s REAL NOT NULL
)
"""

Owner = Literal["managed", "step", "pause", "foreign"]
DEFAULT_GRACE_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A managed container that runs and is ready. ``ports``: host ports by name. ``address``: where they are."""

    id: str
    name: str
    image: str
    ports: dict[str, int]
    address: str
    adopted: bool = False


class Containers:
    """The managed containers of one node. ``scope=None`` is the operator, who reaches all of them."""

    def __init__(
        self, runtime: Runtime, journal: Journal, ports: Ports, volumes: Volumes, policy: NodePolicy, node_id: str
    ) -> None:
        self._runtime = runtime
        self._journal = journal
        self._ports = ports
        self._volumes = volumes
        self._policy = policy
        self._images = Images(runtime, policy.images)
        self._node_id = node_id
        self._missing_since: dict[str, float] = {}
        # Held by whoever works on that name, and gone with the last of them: any name can be asked for.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    # -- looking

    async def list(self, scope: ContainerScope | None = None) -> list[ContainerInfo]:
        """All containers of the engine, foreign ones too; with a scope, the managed ones that it reaches."""
        found = await self._runtime.list()
        if scope is not None:
            found = [info for info in found if self.owner(info) == "managed" and _reaches(scope, info)]
        return [self._with_port_names(info) for info in found]

    async def inspect(self, name: str, scope: ContainerScope | None = None) -> ContainerInfo:
        """One container by name or id. NotFound; PermissionDenied if the scope does not reach it."""
        info = await self._runtime.inspect(name)
        if scope is not None:
            self._check_control(info, scope)
        return self._with_port_names(info)

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
        maskers: dict[StreamName, Masker] = defaultdict(lambda: Masker(info.secrets))
        async with contextlib.aclosing(self._runtime.logs(info.id, follow=follow, tail=tail)) as items:
            async for stream, data in items:
                if masked := maskers[stream].feed(data):
                    yield stream, masked
        for stream, masker in maskers.items():
            if rest := masker.flush():
                yield stream, rest

    async def wait(self, name: str, scope: ContainerScope | None = None) -> Exit:
        """How it ended, once it has."""
        info = await self.inspect(name, scope)
        return await self._runtime.exited(info.id)

    # -- starting

    async def start(self, spec: ManagedSpec, scope: ContainerScope, *, replace: bool = False) -> Started:
        """Start a container, or adopt the one of this name if it was made from the same specification.

        One made from another specification is a Conflict, or stopped and removed first with ``replace``. What
        does not get ready is removed again, and the error has its last log lines.
        """
        network, limits = check_against_policy(spec, self._policy)
        mounts = mounts_of(spec, scope)
        user = spec.user or f"{scope.uid}:{scope.gid}"
        digest = digest_of(spec, mounts, user)
        async with self._alone(spec.name):
            existing = await self._find(spec.name)
            if existing is not None:
                self._check_adoptable(existing, spec, scope)
                if existing.labels.get(LABEL_SPEC) == digest and existing.state in ("running", "created", "exited"):
                    return await self._adopt(existing, spec, scope, digest)
                if existing.labels.get(LABEL_SPEC) != digest and not replace:
                    raise Conflict(
                        f"the container {spec.name} exists already and was made from another specification",
                        code="container_exists",
                        hint="stop and remove it first, or give `replace: true`",
                    )
                await self._runtime.stop(existing.id, grace_s=self._grace(spec.name))
                await self._drop(spec.name, existing.id)
            ports = await self._ports.lease(spec.name, spec.wishes())
            container = ContainerSpec(
                name=spec.name,
                image=spec.image,
                args=tuple(substitute(arg, ports) for arg in spec.args),
                entrypoint=None if spec.entrypoint is None else tuple(substitute(e, ports) for e in spec.entrypoint),
                env={name: substitute(value, ports) for name, value in spec.env.items()},
                labels=self._labels(spec, scope, digest, ports),
                mounts=mounts,
                user=user,
                groups=tuple(sorted({g.group for n, g in scope.volumes.items() if n in spec.volumes and g.group})),
                workdir=spec.workdir,
                network=network,
                read_only_root=not spec.writable_root,
                tmp_size_bytes=spec.tmp_size_bytes,
                cap_add=tuple(capability_name(name) for name in spec.capabilities),
                devices=spec.devices,
                memory_bytes=limits.memory_bytes,
                cpus=limits.cpus,
                pids=limits.pids,
                ports=() if network == "host" else self._bindings(spec, ports),
                restart_policy=spec.restart,
                log_max_bytes=self._policy.limits.managed_log_bytes,
                log_files=self._policy.limits.managed_log_files,
                stop_signal=spec.stop_signal,
                init=spec.init,
            )
            await self._record(spec, scope, digest, "starting")
            container_id = ""
            try:
                if network != "host":
                    await ready_network(self._runtime, self._policy, self._node_id, spec.network)
                image_id = await self._images.ensure(spec.image)
                await self._volumes.use(spec.name, [mount.source for mount in mounts])
                container_id = await self._runtime.create(dataclasses.replace(container, image_id=image_id))
                await self._runtime.start(container_id)
                await wait_ready(self._runtime, container_id, spec, ports)
            except OutriderError:
                await self._clean_up(spec.name, container_id)
                raise
            await self._set_state(spec.name, "ready")
            return self._started(spec, container_id, ports)

    async def start_existing(self, name: str, scope: ContainerScope | None = None) -> ContainerInfo:
        """Start one that was stopped. Starting a running one does nothing."""
        async with self._alone(name):
            info = await self._controlled(name, scope)
            await self._runtime.start(info.id)
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

    async def remove(self, name: str, *, force: bool = False, scope: ContainerScope | None = None) -> None:
        """Remove it and give its ports back. Conflict if it runs and not ``force``. One that is gone is no error
        for a scope that could have had it."""
        async with self._alone(name):
            info = await self._find(name)
            if info is None:
                if self._known(name) is None:
                    raise NotFound(f"there is no container named {name} on this node")
                await self._clean_up(name, "")  # gone behind our back: only what we hold for it is left
                return
            self._check_control(info, scope)
            if info.state in ("running", "paused", "restarting") and not force:
                raise Conflict(
                    f"the container {info.name} is {info.state}",
                    code="container_running",
                    hint="stop it first, or use force",
                )
            if self.owner(info) == "managed":
                await self._drop(info.name, info.id)
            else:
                await self._runtime.remove(info.id, force=force)

    async def end_attempt(self, scope: ContainerScope) -> None:
        """The attempt is over for good: remove what it began to start and what never got ready."""
        rows = await self._journal.query(
            "SELECT name FROM managed WHERE state = 'starting' AND run_id = ? AND step = ? AND attempt = ?",
            (scope.run_id, scope.step, scope.attempt),
        )
        for row in rows:
            name = str(row["name"])
            async with self._alone(name):
                info = await self._find(name)
                ours = info is not None and self.owner(info) == "managed" and info.labels.get(LABEL_RUN) == scope.run_id
                await self._clean_up(name, info.id if info is not None and ours else "")

    async def forget_missing(
        self, found: Sequence[ContainerInfo], *, older_than_s: float, active: Collection[str]
    ) -> None:
        """Give back ports and volumes of containers that somebody removed long ago, but for those of ``active`` runs.

        ``found`` is what the engine has now. How long one has been missing counts from when that was first seen.
        """
        there, now = {info.name for info in found}, time.monotonic()
        rows = await self._journal.query("SELECT name, run_id, state FROM managed")
        missing = {str(row["name"]) for row in rows if row["name"] not in there}
        beginning = {str(row["name"]) for row in rows if row["state"] == "starting" and row["run_id"] in active}
        self._missing_since = {name: self._missing_since.get(name, now) for name in missing - beginning}
        for name, since in list(self._missing_since.items()):
            if now - since < older_than_s:
                continue
            async with self._alone(name):
                if await self._find(name) is None:
                    log.info("the container %s is gone for good: what was held for it is given back", name)
                    await self._clean_up(name, "")
                    self._missing_since.pop(name, None)

    # -- inside

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield

    async def _adopt(self, info: ContainerInfo, spec: ManagedSpec, scope: ContainerScope, digest: str) -> Started:
        known = self._known(spec.name)
        proven = known is not None and known["state"] == "ready" and known["digest"] == digest
        ports = await self._ports.lease(spec.name, spec.wishes()) if info.state != "running" else {}
        ports = ports or self._ports.held(spec.name)
        if not proven:
            await self._record(spec, scope, digest, "starting")
        if info.state != "running":
            await self._runtime.start(info.id)
        if info.state != "running" or not proven:
            try:
                await wait_ready(self._runtime, info.id, spec, ports)
            except OutriderError:
                # One that was ready once is somebody's game: it is stopped only by those who mean it.
                if not proven:
                    await self._clean_up(spec.name, info.id)
                raise
            await self._set_state(spec.name, "ready")
        return self._started(spec, info.id, ports, adopted=True)

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

    async def _drop(self, name: str, container_id: str) -> None:
        await self._runtime.remove(container_id, force=True)
        await self._ports.release(name)
        await self._volumes.unuse(name)
        await self._journal.execute(Transition.MANAGED_REMOVED, "DELETE FROM managed WHERE name = ?", (name,))

    async def _clean_up(self, name: str, container_id: str) -> None:
        """After a start that failed. What can't be removed now is found by `end_attempt` or by its name later."""
        try:
            if container_id:
                await self._runtime.remove(container_id, force=True)
            await self._ports.release(name)
            await self._volumes.unuse(name)
            await self._journal.execute(Transition.MANAGED_REMOVED, "DELETE FROM managed WHERE name = ?", (name,))
        except OutriderError as error:
            log.warning("the container %s could not be cleaned up: %s", name, error)

    def _labels(self, spec: ManagedSpec, scope: ContainerScope, digest: str, ports: dict[str, int]) -> dict[str, str]:
        labels = {
            LABEL_NODE: self._node_id,
            LABEL_KIND: "managed",
            LABEL_NAME: spec.name,
            LABEL_SPEC: digest,
            LABEL_RUN: scope.run_id,
            LABEL_STEP: scope.step,
            LABEL_ATTEMPT: str(scope.attempt),
        }
        if ports:
            # Names are the journal's alone otherwise, and a journal can be lost.
            labels[LABEL_PORTS] = ",".join(f"{wish.name}={ports[wish.name]}/{wish.protocol}" for wish in spec.wishes())
        # Always there: what is left out comes from the image, which could name anybody's object.
        labels[LABEL_OBJECT] = scope.object_ref or ""
        values = {name: value.replace("$$(", "$(") for name, value in spec.env.items()}  # as the container gets them
        secret = [name for name, value in values.items() if contains_secret(value.encode(), scope.secrets)]
        if secret:
            # Its log outlives the run, which alone knows what is secret: the names rest with the container.
            labels[LABEL_SECRETS] = ",".join(sorted(secret))
        return labels

    def _bindings(self, spec: ManagedSpec, ports: dict[str, int]) -> tuple[PortBinding, ...]:
        return tuple(
            PortBinding(
                container=port.container or ports[port.name],
                host=ports[port.name],
                protocol=port.protocol,
                host_ip=self._policy.ports.interface,
                name=port.name,
            )
            for port in spec.ports
        )

    def _started(self, spec: ManagedSpec, container_id: str, ports: dict[str, int], adopted: bool = False) -> Started:
        names = [port.name for port in spec.ports]
        return Started(
            id=container_id,
            name=spec.name,
            image=spec.image,
            ports={name: ports[name] for name in names if name in ports},
            address=advertised_address(self._policy),
            adopted=adopted,
        )

    def _with_port_names(self, info: ContainerInfo) -> ContainerInfo:
        if self.owner(info) != "managed" or not info.ports:
            return info
        names = {port: name for name, port in self._ports.held(info.name).items()}
        return replace(info, ports=tuple(replace(port, name=names.get(port.host, "")) for port in info.ports))

    def _known(self, name: str) -> sqlite3.Row | None:
        rows = self._journal.query_now("SELECT * FROM managed WHERE name = ?", (name,))
        return rows[0] if rows else None

    def _grace(self, name: str) -> float:
        known = self._known(name)
        return float(known["grace_s"]) if known else DEFAULT_GRACE_S

    async def _record(self, spec: ManagedSpec, scope: ContainerScope, digest: str, state: str) -> None:
        await self._journal.execute(
            Transition.MANAGED_STARTING,
            "INSERT INTO managed (name, digest, state, run_id, step, attempt, object_ref, grace_s) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, "
            "state = excluded.state, run_id = excluded.run_id, step = excluded.step, attempt = excluded.attempt, "
            "object_ref = excluded.object_ref, grace_s = excluded.grace_s",
            (spec.name, digest, state, scope.run_id, scope.step, scope.attempt, scope.object_ref, spec.stop_grace_s),
        )

    async def _set_state(self, name: str, state: str) -> None:
        sql = "UPDATE managed SET state = ? WHERE name = ?"
        await self._journal.execute(Transition.MANAGED_READY, sql, (state, name))


def advertised_address(policy: NodePolicy) -> str:
    """Where players find the published ports: what the policy says, else the address of the default route."""
    if policy.ports.advertise:
        return policy.ports.advertise
    if policy.ports.interface not in ("0.0.0.0", "::"):
        return policy.ports.interface
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: a documentation address; UDP's connect sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _reaches(scope: ContainerScope, info: ContainerInfo) -> bool:
    if scope.object_ref and info.labels.get(LABEL_OBJECT) == scope.object_ref:
        return True
    return info.labels.get(LABEL_RUN) == scope.run_id


def _belongs(info: ContainerInfo) -> str:
    object_ref = info.labels.get(LABEL_OBJECT)
    return f"the object {object_ref}" if object_ref else f"the run {info.labels.get(LABEL_RUN, '?')}"

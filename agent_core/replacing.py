"""One managed container takes another's place under the same name: both ways, and what a kill in between leaves.

``stop-first``: the former is stopped and set aside as ``NAME.prev``; if its successor does not get ready, the former is
brought back and started again, with its ports. ``start-first``: the successor is made beside it as ``NAME.next``, with
host ports of its own; once it is ready the two change names, and the former is stopped and removed. Every stage stands
in the journal before it is begun, and is gone on with from what the engine says: `Replacing.settle`.
"""

from __future__ import annotations

import asyncio
import logging

from agent_core.container_spec import NEXT, PREVIOUS
from agent_core.managed_files import ManagedFiles
from agent_core.managed_rows import Intent, ManagedRow, ManagedRows
from agent_core.ports import Ports
from agent_core.private_networks import PrivateNetworks
from agent_core.runtimes.base import LABEL_NETWORK, LABEL_PORTS, LABEL_SPEC, ContainerInfo, Runtime
from agent_core.volumes import Volumes
from outrider.errors import NotFound, OutriderError

log = logging.getLogger(__name__)


class Replacing:
    """What holds for one name at a time; the callers see to that."""

    def __init__(
        self,
        runtime: Runtime,
        rows: ManagedRows,
        ports: Ports,
        volumes: Volumes,
        files: ManagedFiles,
        networks: PrivateNetworks,
    ) -> None:
        self._runtime = runtime
        self._rows = rows
        self._ports = ports
        self._volumes = volumes
        self._files = files
        self._networks = networks

    async def find(self, name: str) -> ContainerInfo | None:
        """The container of that name, if the engine has one."""
        try:
            return await self._runtime.inspect(name)
        except NotFound:
            return None

    async def set_aside(self, base: str, former: ContainerInfo, intent: Intent) -> None:
        """Stop the one that is there and call it ``NAME.prev``; its ports wait for its successor."""
        runs = former.state in ("running", "restarting", "paused")
        known = self._rows.get(base)
        await self._rows.replacing(base, intent, runs=runs)
        await self._put_aside(base, former, known.grace_s if known else None)

    async def bring_back(self, base: str) -> None:
        """What was to replace it is given up: the one set aside has its name again, and runs if it ran before."""
        successor, previous = self._rows.get(base), self._rows.get(base + PREVIOUS)
        there = await self.find(base)
        aside = await self.find(base + PREVIOUS)
        if there is not None and successor is not None and there.labels.get(LABEL_SPEC) == successor.digest:
            await self._runtime.remove(there.id, force=True)
            there = None
        if aside is not None and there is None:
            await self._runtime.rename(aside.id, base)
        former = there or aside
        if former is None:  # somebody removed it meanwhile
            await self.drop(base, "")
            await self.drop(base + PREVIOUS, "")
            return
        if previous is not None and previous.state == "aside":
            await self._runtime.start(former.id)  # before it is said that nothing is left to do
        await self._rows.brought_back(base, ports_of(former))
        await self._tidy(base)

    async def switch(self, base: str) -> None:
        """The one beside it is ready: it gets the name, the former is stopped and removed."""
        successor = await self.find(base + NEXT)
        if successor is not None:
            former = await self.find(base)
            if former is not None:
                await self._remove(base + PREVIOUS)
                await self._runtime.rename(former.id, base + PREVIOUS)
            await self._runtime.rename(successor.id, base)
        await self._rows.switched(base)
        await self.leave(base)

    async def leave(self, base: str) -> None:
        """Its place is taken: the former one is stopped, removed, and what was held for it given back."""
        name = base + PREVIOUS
        row, former = self._rows.get(name), await self.find(name)
        if former is not None and former.state not in ("created", "exited", "dead"):
            await self._runtime.stop(former.id, grace_s=row.grace_s if row else 10.0)
        await self.drop(name, former.id if former else "")

    async def drop(self, name: str, container_id: str) -> None:
        """Remove a container, if there is one, and give back all that was held for it."""
        network = ""
        if container_id:
            info = await self.find(container_id)
            network = info.labels.get(LABEL_NETWORK, "") if info is not None else ""
            await self._runtime.remove(container_id, force=True)
        await self._ports.release(name)
        await self._volumes.unuse(name)
        await self._rows.drop(name)
        if network:
            await self._networks.collect()
        await self._tidy(base_of(name))

    async def settle(self, base: str, digest: str = "") -> None:
        """Go on with what a former agent or attempt began and did not finish.

        ``digest``: of the specification that is about to be started: what was begun for that one is left to it.
        """
        rows = {row.name: row for row in self._rows.family(base)}
        successor, own, previous = (rows.get(name) for name in (base + NEXT, base, base + PREVIOUS))
        if successor is not None and successor.state == "switching":
            await self.switch(base)
            return
        if successor is not None and successor.digest != digest:
            await self.abandon(successor)
        if previous is None:
            return
        if previous.state == "leaving" or (own is not None and own.state == "ready"):
            await self.leave(base)
        elif own is None or own.digest != digest:
            await self.bring_back(base)
        else:
            former = await self.find(base)
            if former is not None and former.labels.get(LABEL_SPEC) != digest:
                await self._put_aside(base, former, previous.grace_s)

    async def abandon(self, row: ManagedRow) -> str:
        """What was begun and never got ready is undone; says what became of the one whose place it was to take.

        What can't be done now is found again by `settle` later.
        """
        base = base_of(row.name)
        try:
            if row.name == base and (previous := self._rows.get(base + PREVIOUS)) is not None:
                await self.bring_back(base)
                return "the former container runs again" if previous.state == "aside" else "the former one is back"
            info = await self.find(row.name)
            ours = info is not None and info.labels.get(LABEL_SPEC) == row.digest
            await self.drop(row.name, info.id if info is not None and ours else "")
        except OutriderError as error:
            log.warning("the container %s could not be cleaned up: %s", row.name, error)
            return f"what it left could not be cleaned up yet: {error}"
        return "the former container goes on" if row.name != base else ""

    async def _put_aside(self, base: str, former: ContainerInfo, grace_s: float | None) -> None:
        if former.state not in ("created", "exited", "dead"):
            await self._runtime.stop(former.id, grace_s=10.0 if grace_s is None else grace_s)
        await self._remove(base + PREVIOUS)
        await self._runtime.rename(former.id, base + PREVIOUS)

    async def _remove(self, name: str) -> None:
        leftover = await self.find(name)
        if leftover is not None:
            await self._runtime.remove(leftover.id, force=True)

    async def _tidy(self, base: str) -> None:
        digests = {row.digest for row in self._rows.family(base)}
        await asyncio.to_thread(self._files.keep, base, digests)


def base_of(name: str) -> str:
    """A container's name as the pipeline gave it."""
    return name.removesuffix(NEXT).removesuffix(PREVIOUS)


def ports_of(info: ContainerInfo) -> list[tuple[str, int, str]]:
    """Name, host port and protocol of each port: as its label says, else as the engine has them."""
    found = []
    for item in filter(None, info.labels.get(LABEL_PORTS, "").split(",")):
        name, _, rest = item.partition("=")
        port, _, protocol = rest.partition("/")
        if port.isdecimal():
            found.append((name, int(port), protocol))
    if found:
        return found
    return [(each.name or f"port-{each.host}-{each.protocol}", each.host, each.protocol) for each in info.ports]

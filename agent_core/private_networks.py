"""The networks that containers of one object (or run) share, and nobody else is on.

One for each object that has a container asking for it: made with the first, removed after the last. Its name comes
from the node and the object, so that it needs no note of its own: it is found again by its name, and who is on it by a
label. It leads nowhere else; its addresses are cut from a network of the node's policy, because an engine has only
some thirty to give by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent_core.container_spec import ContainerScope
from agent_core.policy import PRIVATE_PREFIX, NodePolicy
from agent_core.runtimes.base import LABEL_KIND, LABEL_NETWORK, LABEL_NODE, LABEL_OBJECT, LABEL_RUN, Runtime
from outrider.errors import OutriderError

PREFIX = "outr-"
"""How the names of these networks, and of their bridges on the host, begin."""
KIND = "private"
_TRIES = 256

log = logging.getLogger(__name__)


class PrivateNetworks:
    """Those of one node."""

    def __init__(self, runtime: Runtime, policy: NodePolicy, node_id: str) -> None:
        self._runtime = runtime
        self._policy = policy
        self._node_id = node_id
        self._lock = asyncio.Lock()  # between the look at who is on one and its removal

    def name_of(self, scope: ContainerScope) -> str:
        """The network of the scope's object, or of its run."""
        owner = f"object:{scope.object_ref}" if scope.object_ref else f"run:{scope.run_id}"
        # 15 characters, which is all that the name of a network interface may have.
        return PREFIX + hashlib.sha256(f"{self._node_id}\0{owner}".encode()).hexdigest()[:10]

    @asynccontextmanager
    async def ensured(self, scope: ContainerScope) -> AsyncIterator[str]:
        """The network, which stays at least until a container with its label has been made within this context."""
        name = self.name_of(scope)
        labels = {
            LABEL_NODE: self._node_id,
            LABEL_KIND: KIND,
            LABEL_OBJECT: scope.object_ref or "",
            LABEL_RUN: "" if scope.object_ref else scope.run_id,
        }
        async with self._lock:
            await self._runtime.ensure_private_network(name, labels=labels, subnets=self._subnets(name))
            yield name

    async def collect(self) -> None:
        """Remove those that no container is on."""
        async with self._lock:
            names = await self._runtime.list_networks(labels={LABEL_NODE: self._node_id, LABEL_KIND: KIND})
            if not names:
                return
            used = {info.labels[LABEL_NETWORK] for info in await self._runtime.list(labels={LABEL_NETWORK: ""})}
            for name in names:
                if name in used:
                    continue
                try:
                    await self._runtime.remove_network(name)
                except OutriderError as error:
                    log.info("the network %s stays for now: %s", name, error)

    def _subnets(self, name: str) -> list[str]:
        """Where to look for room, begun at a place of the network's own so that most find it at once."""
        network = ipaddress.IPv4Network(self._policy.managed.private_subnets)
        count = 1 << (PRIVATE_PREFIX - network.prefixlen)
        first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % count
        step = 1 << (32 - PRIVATE_PREFIX)
        base = int(network.network_address)
        numbers = itertools.islice(itertools.chain(range(first, count), range(first)), _TRIES)
        return [f"{ipaddress.IPv4Address(base + number * step)}/{PRIVATE_PREFIX}" for number in numbers]

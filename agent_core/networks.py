"""Network classes: the engine's networks that they mean, made and guarded before a container joins one."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from agent_core.policy import NetworkClass, NodePolicy
from agent_core.runtimes.base import LABEL_NODE, NetworkGuard, Runtime
from outrider.errors import EngineUnavailable, NotFound, OutriderError

_LOOK_AGAIN_S = 60.0

log = logging.getLogger(__name__)


async def ready_network(runtime: Runtime, policy: NodePolicy, node_id: str, network_class: str) -> str:
    """The engine's network of a class, made if it is missing, and guarded; "none" for "none".

    Raises PolicyViolation if the node has no such class, or can't guard it.
    """
    network = policy.network_of(network_class)
    if network == "none":
        return network
    await runtime.ensure_network(network, labels={LABEL_NODE: node_id})
    await _guard(runtime, policy.networks[network_class])
    return network


async def _guard(runtime: Runtime, found: NetworkClass) -> None:
    if found.guard:
        await runtime.guard_network(found.network, NetworkGuard(allow=found.allowed_ranges, resolvers=found.dns))


def told_to_step(policy: NodePolicy, network_class: str) -> dict[str, str]:
    """What a step's program is told of its network, as environment variables: it can refuse before the kernel does."""
    found = policy.networks.get(network_class)
    return {
        "OUTRIDER_NETWORK": network_class,
        "OUTRIDER_NETWORK_ALLOW": ",".join(found.allowed_ranges) if found else "",
    }


async def keep_guarded(runtime: Runtime, policy: NodePolicy) -> None:
    """For ever: put back what somebody has flushed, and follow the machine's name servers.

    Managed containers live for months on a network that nobody else looks after.
    """
    told: dict[str, str] = {}
    while True:
        for network_class, found in policy.networks.items():
            try:
                with contextlib.suppress(NotFound):  # made when a container wants it
                    await _guard(runtime, found)
                told.pop(network_class, None)
            except EngineUnavailable:
                continue  # said by who watches the engine
            except (OutriderError, OSError) as error:
                if told.get(network_class) != str(error):
                    log.warning("the network class %s is not usable: %s", network_class, error)
                told[network_class] = str(error)
        await asyncio.sleep(_LOOK_AGAIN_S)

"""What containers of a network class reach, judged by the packet filter: real containers, nft, a bit of internet."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope, ManagedSpec
from agent_core.containers import Containers
from agent_core.networks import ready_network
from agent_core.policy import NodePolicy
from agent_core.runtimes._netfilter import table_of
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerSpec, PortBinding

if TYPE_CHECKING:
    from conftest import Node

pytestmark = pytest.mark.skipif(shutil.which("ip") is None, reason="ip (Debian: iproute2) is not installed here")

BASE = "outrider/base:1"
PORT = 8099

PROBE = """
import json, socket, sys
def reach(address):
    try:
        with socket.create_connection((address, PORT), timeout=5) as s:
            return s.recv(5).decode()
    except OSError as error:
        return type(error).__name__
print(json.dumps({address: reach(address) for address in sys.argv[1:]}))
"""
ANSWER = f"""
import socket, sys
with socket.create_server(("", {PORT})) as server:
    print("ready", flush=True)
    while True:
        with server.accept()[0] as s:
            s.sendall(b"hello")
"""


@dataclass(frozen=True)
class World:
    """Machines beyond this one, which answer "hello" at PORT, and this machine's own address among them."""

    public: str
    private: str
    link_local: str
    own_public: str
    own_private: str
    namespace: str

    @property
    def all(self) -> tuple[str, ...]:
        return self.public, self.private, self.link_local, self.own_public, self.own_private


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A network namespace at the end of a cable: 203.0.113.0/24 (RFC 5737) stands for the internet."""
    name = f"or{secrets.token_hex(4)}"
    third = secrets.randbelow(250)
    nets = {"public": "203.0.113", "private": f"10.213.{third}", "link_local": f"169.254.{third + 1}"}
    servers: list[subprocess.Popen[str]] = []
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}n", "netns", name)
        for net in nets.values():
            ip("address", "add", f"{net}.1/24", "dev", f"{name}h")
            ip("-n", name, "address", "add", f"{net}.2/24", "dev", f"{name}n")
        ip("link", "set", f"{name}h", "up")
        ip("-n", name, "link", "set", f"{name}n", "up")
        ip("-n", name, "route", "add", "default", "via", f"{nets['public']}.1")
        for prefix in (["ip", "netns", "exec", name], []):
            server = subprocess.Popen([*prefix, sys.executable, "-c", ANSWER], stdout=subprocess.PIPE, text=True)
            servers.append(server)
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
        yield World(*(f"{net}.2" for net in nets.values()), f"{nets['public']}.1", f"{nets['private']}.1", name)
    finally:
        for server in servers:
            server.kill()
            server.communicate()
        subprocess.run(["ip", "link", "del", f"{name}h"], capture_output=True, check=False)
        ip("netns", "del", name)


@pytest.fixture
def network() -> Iterator[str]:
    """The name of a network of the test's own; what became of it is removed. Named before ``node``, it outlives it."""
    name = f"outrider-test-{secrets.token_hex(4)}"
    yield name
    found = subprocess.run(["docker", "network", "inspect", name, "-f", "{{.Id}}"], capture_output=True, text=True)
    if found.returncode == 0:
        subprocess.run(["docker", "network", "rm", name], check=True, capture_output=True)
        subprocess.run(["nft", "delete", "table", "inet", table_of(found.stdout.strip())], capture_output=True)


def policy_of(network: str, **more: Any) -> NodePolicy:
    egress = {"network": network, "warm": 0, **more}
    return NodePolicy.model_validate(
        {"warm_none": 0, "networks": {"egress": egress}, "ports": {"range": "28600-28699"}}
    )


async def reached(node: Node, policy: NodePolicy, *addresses: str) -> dict[str, str]:
    """What a container of the class gets from each address."""
    network = await ready_network(node.runtime, policy, node.id, "egress")
    spec = ContainerSpec(
        name=f"{node.id}-probe-{secrets.token_hex(3)}",
        image=BASE,
        args=("python3", "-c", PROBE.replace("PORT", str(PORT)), *addresses),
        labels={LABEL_NODE: node.id, LABEL_KIND: "step"},
        network=network,
    )
    container = await node.runtime.create(spec)
    output = b""
    async with node.runtime.attach(container) as pieces:
        await node.runtime.start(container)
        async for _, data in pieces:
            output += data
    assert (await node.runtime.exited(container)).exit_code == 0, output.decode()
    await node.runtime.remove(container)
    answer: dict[str, str] = json.loads(output)
    return answer


async def test_foreign_image_reaches_the_internet_and_nothing_nearer(network: str, node: Node, world: World) -> None:
    found = await reached(node, policy_of(network), *world.all)
    assert found.pop(world.public) == "hello"
    assert "hello" not in found.values(), found
    found = await reached(node, policy_of(network, allow=["private"]), *world.all)
    assert found[world.private] == found[world.own_private] == "hello"
    assert found[world.link_local] != "hello"
    assert found[world.own_public] != "hello", "the machine's own services, by its public address"


async def test_only_the_ranges_that_the_class_allows_are_opened(network: str, node: Node, world: World) -> None:
    found = await reached(node, policy_of(network, allow=[f"{world.private}/32", "169.254.0.0/16"]), *world.all)
    got = {address for address, answer in found.items() if answer == "hello"}
    assert got == {world.public, world.private, world.link_local}


async def test_without_the_guard_everything_is_reached(network: str, node: Node, world: World) -> None:
    """What the other tests prove they prove because of the filter: the same world without it."""
    found = await reached(node, policy_of(network, guard=False), *world.all)
    assert set(found.values()) == {"hello"}, found


async def test_flushed_rules_are_put_back(network: str, node: Node, world: World) -> None:
    policy = policy_of(network)
    await ready_network(node.runtime, policy, node.id, "egress")
    inspected = subprocess.run(
        ["docker", "network", "inspect", network, "-f", "{{.Id}}"], capture_output=True, text=True, check=True
    )
    subprocess.run(["nft", "delete", "table", "inet", table_of(inspected.stdout.strip())], check=True)
    found = await reached(node, policy, world.private, world.public)
    assert (found[world.public], found[world.private] == "hello") == ("hello", False)


async def test_published_port_is_answered_through_the_guard(network: str, node: Node, world: World) -> None:
    joined = await ready_network(node.runtime, policy_of(network), node.id, "egress")
    port = 28699
    spec = ContainerSpec(
        name=f"{node.id}-server",
        image=BASE,
        args=("python3", "-c", ANSWER),
        labels={LABEL_NODE: node.id, LABEL_KIND: "step"},
        network=joined,
        ports=(PortBinding(PORT, port),),
    )
    container = await node.runtime.create(spec)
    await node.runtime.start(container)
    async for _, data in node.runtime.logs(container, follow=True):
        assert data == b"ready\n"
        break
    ask = PROBE.replace("PORT", str(port))
    # From this machine, and from beyond it: both by way of the engine's published port.
    for prefix in ([], ["ip", "netns", "exec", world.namespace]):
        command = [*prefix, sys.executable, "-c", ask, world.own_private]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {world.own_private: "hello"}


async def test_a_managed_container_is_guarded_before_it_starts(network: str, node: Node) -> None:
    policy = policy_of(network)
    containers = Containers(node.runtime, node.journal, node.ports, node.volumes, policy, node.id)
    uid, gid = await node.identities.allot("object:game/a")
    spec = ManagedSpec.model_validate({"name": f"{node.id}-game", "image": BASE, "args": ["sleep", "60"]})
    await containers.start(spec, ContainerScope("r1", "start", 1, object_ref="game/a", uid=uid, gid=gid))
    inspected = subprocess.run(
        ["docker", "network", "inspect", network, "-f", "{{.Id}}"], capture_output=True, text=True, check=True
    )
    listed = subprocess.run(
        ["nft", "list", "table", "inet", table_of(inspected.stdout.strip())], capture_output=True, text=True, check=True
    )
    assert "169.254.0.0/16" in listed.stdout

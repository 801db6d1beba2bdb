"""Integration tests run on the real engine; everything that they make is labelled and removed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_core import state
from agent_core.containers import Containers
from agent_core.identities import Identities
from agent_core.journal import Journal
from agent_core.netpool import NetPool
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.runtimes.base import LABEL_NODE
from agent_core.runtimes.docker import DockerRuntime
from agent_core.volumes import Volumes
from outrider.v1.control_service_pb2_grpc import ControlServiceStub
from tests.integration.server_rig import FakeAgent, Rig, add_node, served


@dataclass
class Node:
    """The parts of a node, put together as the agent does, on the real engine."""

    id: str
    root: Path
    runtime: DockerRuntime
    journal: Journal
    policy: NodePolicy
    identities: Identities
    ports: Ports
    volumes: Volumes
    pool: NetPool
    containers: Containers


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """Not pytest's tmp_path: that one is closed to others, and volumes are written by other users."""
    path = Path("/var/tmp") / f"outrider-test-{secrets.token_hex(6)}"
    path.mkdir(mode=0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def policy() -> NodePolicy:
    return NodePolicy.model_validate({"ports": {"range": "28600-28699"}, "warm_none": 1})


@pytest.fixture
async def runtime() -> AsyncIterator[DockerRuntime]:
    driver = DockerRuntime(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    yield driver
    await driver.aclose()


@pytest.fixture
async def node(runtime: DockerRuntime, policy: NodePolicy, state_dir: Path) -> AsyncIterator[Node]:
    node_id = f"test-{secrets.token_hex(6)}"
    journal = Journal(
        state_dir / "journal.db",
        state.migrations(),
    )
    users = Identities(journal)
    leases = Ports(journal, policy.ports.range)
    store = Volumes(journal, state_dir / "volumes", users, reserve_bytes=0)
    pool = NetPool(runtime, policy, node_id, journal)
    managed = Containers(runtime, journal, leases, store, policy, node_id)
    yield Node(node_id, state_dir, runtime, journal, policy, users, leases, store, pool, managed)
    await pool.aclose()
    for info in await runtime.list(labels={LABEL_NODE: node_id}):
        await runtime.remove(info.id, force=True)
    journal.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A server without particular settings; who needs some has a fixture of this name."""
    async with served(tmp_path / "server") as rig:
        yield rig


@pytest.fixture
async def agent(rig: Rig) -> AsyncIterator[FakeAgent]:
    """The agent of node n1, connected to ``rig``."""
    agent = await (await add_node(rig)).start()
    yield agent
    await agent.stop()


@pytest.fixture
async def control(rig: Rig) -> AsyncIterator[ControlServiceStub]:
    """An operator's calls to ``rig``."""
    async with rig.operator() as control:
        yield control

"""The parts of a node on the fake runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_core import state
from agent_core.container_spec import ContainerScope, GrantedVolume
from agent_core.containers import Containers
from agent_core.identities import Identities
from agent_core.journal import Journal
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.volumes import Volumes


async def game(process: FakeProcess) -> int:
    process.write(b"the server is up\n")
    await process.signalled.wait()
    return 0


async def crash(process: FakeProcess) -> int:
    process.write(b"no such map\n", "stderr")
    return 7


@dataclass
class Parts:
    root: Path
    journal: Journal
    runtime: FakeRuntime
    policy: NodePolicy
    identities: Identities
    ports: Ports
    volumes: Volumes
    containers: Containers
    scope: ContainerScope


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db", state.migrations())
    yield journal
    journal.close()


@pytest.fixture
async def parts(tmp_path: Path, journal: Journal) -> AsyncIterator[Parts]:
    runtime = FakeRuntime(programs={"game:1": game, "crash:1": crash}, images={"outrider/pause:1"})
    policy = NodePolicy()
    users = Identities(journal)
    leases = Ports(journal, (28700, 28799))
    store = Volumes(journal, tmp_path / "volumes", users, reserve_bytes=0)
    managed = Containers(runtime, journal, leases, store, policy, "n1")
    saves = await store.allot("r1", "game/a", "saves", "run", False, None)
    scope = ContainerScope("r1", "start", 1, "game/a", {"saves": GrantedVolume(saves.host_path, False)}, 200001, 200001)
    yield Parts(tmp_path, journal, runtime, policy, users, leases, store, managed, scope)
    await runtime.aclose()

"""A container command that a killed agent had begun is not done a second time by the next one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agent_core.container_spec import ManagedSpec
from agent_core.remote import RemoteContainers
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types

if TYPE_CHECKING:
    from conftest import Parts

GAME = ManagedSpec.parse({"name": "arena", "image": "game:1", "ready": {"log": "is up"}})


def order(action: types.ContainerAction) -> pb.Command:
    return pb.Command(command_id="c1", container=pb.ContainerCommand(action=action, name="arena", force=True))


async def test_container_that_a_killed_agent_had_removed_is_removed(parts: Parts) -> None:
    await parts.containers.start(GAME, parts.scope)
    remote, remove = RemoteContainers(parts.containers), order(types.CONTAINER_ACTION_REMOVE)
    assert not (await remote.carry_out(remove)).HasField("failure")
    assert not (await remote.carry_out(remove, again=True)).HasField("failure")
    first = await remote.carry_out(remove)
    assert first.failure.code == "not_found"  # nobody had begun this one: the name is wrong


@pytest.mark.parametrize("clock_is_set_by_s", [0.0, -8 * 86400.0, 8 * 86400.0])
async def test_container_that_a_killed_agent_had_restarted_is_restarted_once(
    parts: Parts, clock_is_set_by_s: float
) -> None:
    started = await parts.containers.start(GAME, parts.scope)
    remote, restart = RemoteContainers(parts.containers), order(types.CONTAINER_ACTION_RESTART)
    noted: list[str] = []

    async def restarting(former: str) -> None:
        noted.append(former)

    await remote.carry_out(restart, restarting=restarting)
    held = parts.runtime._containers[started.id]
    assert held.info.started_at is not None
    held.info = replace(held.info, started_at=held.info.started_at + timedelta(seconds=clock_is_set_by_s))
    (again,) = (await remote.carry_out(restart, again=True, former=noted[0], restarting=restarting)).containers
    assert again.started_at.ToMicroseconds() == round(held.info.started_at.timestamp() * 1e6)
    assert len(noted) == 1


@pytest.mark.parametrize("was_noted", [True, False])
async def test_container_that_a_killed_agent_did_not_come_to_restart_is_restarted(
    parts: Parts, was_noted: bool
) -> None:
    started = await parts.containers.start(GAME, parts.scope)
    before = (await parts.containers.inspect("arena")).started_at
    assert before is not None
    remote, restart = RemoteContainers(parts.containers), order(types.CONTAINER_ACTION_RESTART)
    await remote.carry_out(restart, again=True, former=before.isoformat() if was_noted else None)
    after = parts.runtime._containers[started.id].info.started_at
    assert after is not None
    assert after > before

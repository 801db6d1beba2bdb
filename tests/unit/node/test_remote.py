"""A container command that a killed agent had begun is not done a second time by the next one."""

from __future__ import annotations

from datetime import UTC, datetime
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
    begun_at = datetime.now(UTC)
    assert not (await remote.carry_out(remove)).HasField("failure")
    assert not (await remote.carry_out(remove, begun_at=begun_at)).HasField("failure")
    first = await remote.carry_out(remove)
    assert first.failure.code == "not_found"  # nobody had begun this one: the name is wrong


@pytest.mark.parametrize("begun_before_the_restart", [True, False])
async def test_container_that_a_killed_agent_had_restarted_is_restarted_once(
    parts: Parts, begun_before_the_restart: bool
) -> None:
    await parts.containers.start(GAME, parts.scope)
    remote, restart = RemoteContainers(parts.containers), order(types.CONTAINER_ACTION_RESTART)
    before = datetime.now(UTC)
    (first,) = (await remote.carry_out(restart)).containers
    begun_at = before if begun_before_the_restart else datetime.now(UTC)
    (again,) = (await remote.carry_out(restart, begun_at=begun_at)).containers
    assert (again.started_at == first.started_at) == begun_before_the_restart

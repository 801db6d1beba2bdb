"""One container takes another's place, and an agent is cut off in the middle of it at every request to the engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from agent_core.container_spec import ContainerScope, ManagedSpec, Replace
from agent_core.containers import Containers
from agent_core.runtimes.base import ContainerInfo
from agent_core.runtimes.fake import FakeProcess
from outrider.errors import Conflict, NotFound, PermanentError

if TYPE_CHECKING:
    from conftest import Parts


class Killed(BaseException):
    """The agent is gone: nothing of it runs any more, no clean-up either."""


class Deadly:
    """The engine as an agent sees it that dies before, or just after, its ``at``-th changing request."""

    CHANGES = ("create", "start", "stop", "remove", "rename", "connect")

    def __init__(self, parts: Parts, at: int, *, after: bool) -> None:
        self._runtime = parts.runtime
        self.left = at
        self._after = after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runtime, name)
        if name not in self.CHANGES:
            return found

        async def call(*args: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self._after:
                raise Killed
            answer = await found(*args, **more)
            if self.left == 0:
                raise Killed
            return answer

        return call


def agent(parts: Parts, runtime: Any = None) -> Containers:
    return Containers(runtime or parts.runtime, parts.journal, parts.ports, parts.volumes, parts.policy, "n1")


def version(number: int, **more: Any) -> ManagedSpec:
    return ManagedSpec.parse(
        {
            "name": "arena",
            "image": "game:1",
            "ready": {"log": "is up"},
            "env": {"VERSION": str(number)},
            "ports": [{"name": "game", "protocol": "udp"}],
            "volumes": {"saves": "/data"},
        }
        | more
    )


def of(info: ContainerInfo, parts: Parts) -> str:
    return parts.runtime.spec_of(info.id).env["VERSION"]


async def nothing_else(parts: Parts, number: int) -> None:
    """There is that one container under its name, running, with its port; and nothing of any other."""
    [info] = await parts.runtime.list()
    assert (info.name, info.state, of(info, parts)) == ("arena", "running", str(number))
    rows = await parts.journal.query("SELECT name, state FROM managed")
    assert [tuple(row) for row in rows] == [("arena", "ready")]
    assert {row["owner"] for row in await parts.journal.query("SELECT owner FROM port_leases")} == {"arena"}
    held = parts.ports.held("arena")
    assert [port.host for port in parts.runtime.spec_of(info.id).ports] == list(held.values())
    uses = await parts.journal.query("SELECT container FROM volume_uses")
    assert [row["container"] for row in uses] == ["arena"]


async def test_started_first_it_has_a_port_of_its_own_and_then_the_name(parts: Parts) -> None:
    first = await parts.containers.start(version(1), parts.scope)
    second = await parts.containers.start(version(2), parts.scope, replace="start-first")
    assert second.ports != first.ports
    assert (second.name, second.replaced, second.adopted) == ("arena", True, False)
    await nothing_else(parts, 2)


async def test_stopped_first_it_has_the_formers_port(parts: Parts) -> None:
    first = await parts.containers.start(version(1), parts.scope)
    second = await parts.containers.start(version(2), parts.scope, replace="stop-first")
    assert (second.ports, second.replaced) == (first.ports, True)
    await nothing_else(parts, 2)


@pytest.mark.parametrize(("replace", "told"), [("stop-first", "runs again"), ("start-first", "goes on")])
async def test_a_successor_that_does_not_get_ready_leaves_the_former_as_it_was(
    parts: Parts, replace: Replace, told: str
) -> None:
    first = await parts.containers.start(version(1), parts.scope)
    with pytest.raises(PermanentError, match=rf"exit code 7 before it was ready(.|\n)*the former container {told}"):
        await parts.containers.start(version(2, image="crash:1"), parts.scope, replace=replace)
    await nothing_else(parts, 1)
    assert (await parts.containers.inspect("arena")).id == first.id
    assert parts.ports.held("arena") == first.ports


async def test_one_that_was_stopped_is_brought_back_stopped(parts: Parts) -> None:
    await parts.containers.start(version(1), parts.scope)
    await parts.containers.stop("arena")
    with pytest.raises(PermanentError):
        await parts.containers.start(version(2, image="crash:1"), parts.scope, replace="stop-first")
    assert (await parts.containers.inspect("arena")).state == "exited"


async def test_a_port_by_number_can_only_be_handed_over_by_stopping_first(parts: Parts) -> None:
    fixed = [{"name": "game", "protocol": "udp", "host": 28750}]
    await parts.containers.start(version(1, ports=fixed), parts.scope)
    with pytest.raises(Conflict, match="use `replace: stop-first`"):
        await parts.containers.start(version(2, ports=fixed), parts.scope, replace="start-first")
    await nothing_else(parts, 1)
    await parts.containers.start(version(2, ports=fixed), parts.scope, replace="stop-first")
    await nothing_else(parts, 2)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [True, False], ids=["asked-again", "recovered"])
@pytest.mark.parametrize("replace", ["start-first", "stop-first"])
@pytest.mark.parametrize("image", ["game:1", "crash:1"])
async def test_an_agent_that_dies_at_any_request_leaves_one_container_in_the_end(
    parts: Parts, after: bool, again: bool, replace: Replace, image: str
) -> None:
    """Asked again by the step, or, where the attempt is over, settled by the next agent's look around."""
    deaths = 0
    for at in range(1, 40):
        for info in await parts.runtime.list():
            await parts.containers.remove(info.name, force=True)
        await parts.containers.start(version(1), parts.scope)
        deadly = Deadly(parts, at, after=after)
        dying = agent(parts, deadly)
        try:
            await dying.start(version(2, image=image), parts.scope, replace=replace)
        except Killed:
            deaths += 1
        except PermanentError:
            assert image == "crash:1"
        next_agent = agent(parts)
        await next_agent.recover()  # its attempt is not known to the journal here, so it counts as over
        rows = await parts.journal.query("SELECT state FROM managed")
        assert [row["state"] for row in rows] == ["ready"], (at, replace)
        if again and image == "game:1":
            await next_agent.start(version(2, image=image), parts.scope, replace=replace)
            await nothing_else(parts, 2)
        else:
            [info] = await parts.runtime.list()
            assert of(info, parts) in (("1",) if image == "crash:1" else ("1", "2"))
            await nothing_else(parts, int(of(info, parts)))
        if deadly.left > 0:
            assert deaths >= 3
            return
    raise AssertionError("there is no end to its requests")


@pytest.mark.parametrize("replace", ["start-first", "stop-first"])
async def test_the_same_attempt_goes_on_where_it_was(parts: Parts, replace: Replace) -> None:
    """Its program asks again as soon as there is an agent: before anybody else looks around."""
    for at in range(1, 9):
        for info in await parts.runtime.list():
            await parts.containers.remove(info.name, force=True)
        await parts.containers.start(version(1), parts.scope)
        deadly = Deadly(parts, at, after=True)
        try:
            await agent(parts, deadly).start(version(2), parts.scope, replace=replace)
        except Killed:
            await agent(parts).start(version(2), parts.scope, replace=replace)
        await nothing_else(parts, 2)


async def test_a_cancelled_replacement_is_undone_with_its_attempt(parts: Parts) -> None:
    await parts.containers.start(version(1), parts.scope)

    async def silent(process: FakeProcess) -> int:
        await process.signalled.wait()
        return 0

    parts.runtime.programs["silent:1"] = silent
    for replace in ("start-first", "stop-first"):
        spec = version(2, image="silent:1")
        start = asyncio.create_task(parts.containers.start(spec, parts.scope, replace=replace))  # type: ignore[arg-type]
        while len(await parts.runtime.list()) < 2:
            await asyncio.sleep(0.01)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await parts.containers.end_attempt(parts.scope)
        await nothing_else(parts, 1)


async def test_names_of_a_replacement_are_the_agents_own(parts: Parts) -> None:
    for name in ("arena.next", "arena.prev"):
        with pytest.raises(Exception, match="are the agent's own"):
            ManagedSpec.parse({"name": name, "image": "game:1"})


async def test_somebody_elses_container_is_not_replaced(parts: Parts) -> None:
    await parts.containers.start(version(1), parts.scope)
    other = ContainerScope("r9", "start", 1, "game/b", parts.scope.volumes, 200002, 200002)
    with pytest.raises(Conflict, match="belongs to the object game/a"):
        await parts.containers.start(version(2), other, replace="stop-first")
    with pytest.raises(NotFound, match="no container named"):
        await parts.containers.remove("nobody", scope=other)

"""The next step's container is made while the one before still runs, and never started before its turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent_core.policy import NetworkClass, NodePolicy
from agent_core.runtimes.base import ContainerSpec
from agent_core.runtimes.fake import FakeRuntime
from agent_core.stepfiles import AHEAD
from outrider.errors import OperationTimeout
from tests.agent_rig import BASE_IMAGE, HookedPlugin, Rig, ShellPlugin, rig
from tests.unit.test_agent_runs import hold, pipeline, program, running

POLICY = NodePolicy(warm_none=0, networks={"egress": NetworkClass(network="n", warm=0, guard=False)})


class Watched(FakeRuntime):
    """``beside``: for each container of a step, what ran when it was made. ``begun``: those that were started."""

    def __init__(self) -> None:
        super().__init__({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())
        self.beside: dict[str, list[set[str]]] = {}
        self.begun: list[str] = []

    async def create(self, spec: ContainerSpec) -> str:
        container = await super().create(spec)
        there = {info.name for info in await self.list() if info.state == "running"}
        self.beside.setdefault(spec.name, []).append(there)
        return container

    async def start(self, container: str) -> None:
        self.begun.append(self._find(container).info.name)
        await super().start(container)


@pytest.fixture
def runtime() -> Watched:
    return Watched()


@pytest.fixture
async def agent(tmp_path: Path, runtime: Watched) -> AsyncIterator[Rig]:
    async with rig(tmp_path / "state", runtime, node_id="n1", policy=POLICY) as started:
        yield started


def name_of(run_id: str, step: str) -> str:
    return f"outrider-{run_id}-{step}-1"


def waits(name: str = "a") -> dict[str, Any]:
    """A step that fails (143) as soon as it is signalled."""
    return {"name": name, "do": {"hang": True}}


def made(runtime: Watched, run_id: str, step: str) -> Callable[[], bool]:
    return lambda: name_of(run_id, step) in runtime.beside


async def gone(runtime: FakeRuntime, run_id: str, step: str) -> bool:
    return name_of(run_id, step) not in {info.name for info in await runtime.list()}


async def test_steps_in_a_row_are_made_one_ahead_and_started_in_their_turn(agent: Rig, runtime: Watched) -> None:
    run_id = await agent.start(pipeline(*({"name": name, "do": {"sleep": 0.3}} for name in "abc")))
    await agent.until(made(runtime, run_id, "b"))
    assert (await runtime.inspect(name_of(run_id, "b"))).state == "created"
    assert agent.told(run_id).states["b"] == "pending"
    run = await agent.end(run_id)
    assert run.states == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}
    a, b, c = (name_of(run_id, step) for step in "abc")
    assert [name for name in runtime.begun if run_id in name] == [a, b, c]
    assert (len(runtime.beside[b]), len(runtime.beside[c])) == (1, 1)
    assert (a in runtime.beside[b][0], b in runtime.beside[c][0]) == (True, True)
    assert sum(name.startswith("outrider-pause-") for name in runtime.beside) == 1, "they share a network namespace"


async def test_what_was_made_for_a_step_that_is_skipped_is_removed(agent: Rig, runtime: Watched) -> None:
    run_id = await agent.start(pipeline(waits(), {"name": "b"}, {"name": "c", "if": "failure()"}))
    await agent.until(made(runtime, run_id, "b"))
    await runtime.kill(name_of(run_id, "a"), signal="SIGTERM")
    run = await agent.end(run_id)
    assert run.states == {"a": "failed", "b": "skipped", "c": "succeeded"}
    await agent.until(lambda: gone(runtime, run_id, "b"))
    assert name_of(run_id, "b") not in runtime.begun


async def test_a_cancelled_run_leaves_nothing_that_was_made_ahead(agent: Rig, runtime: Watched) -> None:
    run_id = await agent.start(pipeline(waits(), {"name": "b"}))
    await agent.until(made(runtime, run_id, "b"))
    await agent.cancel(run_id)
    run = await agent.end(run_id)
    assert run.states == {"a": "cancelled", "b": "cancelled"}
    await agent.until(lambda: gone(runtime, run_id, "b"))
    assert name_of(run_id, "b") not in runtime.begun


AFTER: dict[str, list[dict[str, Any]]] = {
    "a condition": [{"name": "b", "if": "success()"}],
    "control of containers": [{"name": "b", "uses": "test.control"}],
    "outputs of the one before": [{"name": "b", "with": {"script": '{"print": ["${{ steps.a.outcome }}"]}'}}],
    "another network": [{"name": "b", "with": {"script": "{}", "network": "egress"}}],
    "two side by side": [{"name": "b", "needs": ["a"]}, {"name": "c", "needs": ["a"]}],
    "needs that are open yet": [{"name": "b", "needs": ["a", "x"]}, {"name": "x", "needs": [], "do": {"sleep": 0.6}}],
}


@pytest.mark.parametrize("what", AFTER)
async def test_what_may_turn_out_otherwise_is_not_made_ahead(agent: Rig, runtime: Watched, what: str) -> None:
    steps = [{"name": "a", "do": {"sleep": 0.3}}, *(dict(step) for step in AFTER[what])]
    run_id = await agent.start(pipeline(*steps))
    run = await agent.end(run_id)
    assert run.state == "succeeded", run.failure
    assert name_of(run_id, "a") not in runtime.beside[name_of(run_id, "b")][0]


@pytest.mark.parametrize(("plugin", "ahead"), [(ShellPlugin(), True), (HookedPlugin(), False)], ids=["none", "before"])
async def test_hooks_are_called_before_there_is_a_container(
    tmp_path: Path, runtime: Watched, plugin: ShellPlugin, ahead: bool
) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1", plugin=plugin) as agent:
        run = await agent.run(pipeline({"name": "a", "do": {"sleep": 0.3}}, {"name": "b"}))
        assert (name_of(run.run_id, "a") in runtime.beside[name_of(run.run_id, "b")][0]) == ahead


async def test_the_next_agent_makes_anew_what_a_former_one_made_ahead(tmp_path: Path, runtime: Watched) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        run_id = await first.start(pipeline({"name": "a", "do": {"sleep": 0.5, "print": ["x"]}}, {"name": "b"}))
        await first.until(made(runtime, run_id, "b"))
        former = (await runtime.inspect(name_of(run_id, "b"))).id
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        run = await second.end(run_id)
        assert run.states["b"] == "succeeded"
        assert ("remove", former) in runtime.calls
        assert runtime.begun.count(name_of(run_id, "b")) == 1
        assert run.steps["b"].attempt == 1


async def test_what_a_restarted_engine_would_not_start_is_made_anew(agent: Rig, runtime: Watched) -> None:
    again = {"name": "a", "uses": "test.again", "do": {"sleep": 0.5}}
    run_id = await agent.start(pipeline(again, {"name": "b"}))
    await agent.until(made(runtime, run_id, "b"))
    runtime.stop_engine()
    runtime.start_engine()
    run = await agent.end(run_id)
    assert run.state == "succeeded", run.failure
    assert runtime.begun.count(name_of(run_id, "b")) == 1


async def test_an_engine_that_refuses_it_ahead_is_asked_again_in_its_turn(
    agent: Rig, runtime: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, refused = runtime.create, list[str]()

    async def refusing(spec: ContainerSpec) -> str:
        if "-b-" in spec.name and not refused:
            refused.append(spec.name)
            raise OperationTimeout("the engine is busy")
        return await create(spec)

    monkeypatch.setattr(runtime, "create", refusing)
    run = await agent.run(pipeline({"name": "a", "do": {"sleep": 0.3}}, {"name": "b"}))
    assert (run.state, refused) == ("succeeded", [name_of(run.run_id, "b")])


async def test_the_mark_of_a_step_that_was_made_ahead_goes_with_its_beginning(agent: Rig, runtime: Watched) -> None:
    run_id = await agent.start(pipeline({"name": "a", "do": {"sleep": 0.3}}, waits("b")))
    mark = agent.services.attempts_dir / run_id / "b" / AHEAD
    await agent.until(made(runtime, run_id, "b"))
    assert mark.exists()
    await agent.until(running(runtime, name_of(run_id, "b")))
    assert not mark.exists()
    await agent.cancel(run_id)
    await agent.end(run_id)

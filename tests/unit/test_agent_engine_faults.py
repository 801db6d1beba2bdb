"""What becomes of a step whose container somebody kills or removes, or that the engine hangs on: on the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from agent_core.runtimes.base import Exit
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.services import Removals
from outrider.errors import EngineUnavailable
from outrider.v1 import types_pb2 as types
from tests.agent_rig import BASE_IMAGE, Rig, rig

ONE_STEP = '{"name": "p", "steps": [{"name": "a", "uses": "test.shell", "with": {"script": "%s"}}]}'


class Program:
    """Counts its runs; "hold" goes on until it is stopped or let go, anything else ends at once."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self, process: FakeProcess) -> int:
        self.runs += 1
        process.write(b"up\n")
        if process.spec.args[0] == "hold":
            stopped = asyncio.create_task(process.signalled.wait())
            gone = asyncio.create_task(self.go.wait())
            await asyncio.wait({stopped, gone}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel(), gone.cancel()
            if process.signalled.is_set():
                return 143
        process.write(b"done\n")
        return 0


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def runtime(program: Program) -> FakeRuntime:
    return FakeRuntime({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())


@pytest.fixture
async def agent(tmp_path: Path, runtime: FakeRuntime) -> AsyncIterator[Rig]:
    async with rig(tmp_path / "state", runtime, node_id="n1") as started:
        yield started


def events(agent: Rig) -> list[tuple[str, str]]:
    found = [types.Event.FromString(item.body) for item in agent.services.outbox.read(("event",))]
    return [(event.type, event.subject) for event in found]


async def up(agent: Rig, run_id: str) -> None:
    await agent.until(lambda: agent.log(run_id, "a") == b"up\n")


async def test_a_step_killed_from_outside_says_so(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(ONE_STEP % "hold")
    await up(agent, run_id)
    await runtime.kill(f"outrider-{run_id}-a-1")
    run = await agent.end(run_id)
    assert (run.states["a"], run.steps["a"].failure.code, run.steps["a"].exit_code) == ("failed", "killed", 137)
    assert "SIGKILL" in run.failure.message


async def test_a_step_whose_container_is_removed_under_it_says_so(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(ONE_STEP % "hold")
    await up(agent, run_id)
    await runtime.remove(f"outrider-{run_id}-a-1", force=True)
    run = await agent.end(run_id)
    assert (run.states["a"], run.steps["a"].failure.code) == ("failed", "container_removed")
    assert agent.log(run_id, "a") == b"up\n"


async def test_an_end_with_its_engine_says_so(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(ONE_STEP % "hold")
    await up(agent, run_id)
    runtime.stop_engine()
    runtime.start_engine()
    run = await agent.end(run_id)
    assert (run.states["a"], run.steps["a"].failure.code) == ("unknown", "engine_stopped")


class Ends255(FakeRuntime):
    """Every container ends with exit code 255."""

    unseen = False

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        return replace(await super().exited(container, boot=boot), exit_code=255, unseen=self.unseen)


@pytest.mark.parametrize(
    ("unseen", "state", "said"), [(True, "unknown", "engine_stopped"), (False, "failed", "step_failed")]
)
async def test_what_an_engine_calls_an_end_that_it_did_not_see_is_not_taken_for_the_programs(
    tmp_path: Path, program: Program, unseen: bool, state: str, said: str
) -> None:
    runtime = Ends255({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())
    runtime.unseen = unseen
    async with rig(tmp_path / "state", runtime, node_id="n1") as agent:
        run = await agent.run(ONE_STEP % "quick")
    assert (run.states["a"], run.steps["a"].failure.code) == (state, said)


class DiesInAStart(FakeRuntime):
    """Its first start of a step begins it and is the last thing that this engine does, and forgets; its successors
    live."""

    dies = True

    async def start(self, container: str) -> None:
        await super().start(container)
        if self.dies and self.spec_of(container).image == BASE_IMAGE:
            self.dies = False
            await asyncio.sleep(0.05)
            self.stop_engine_in_start(container)
            raise EngineUnavailable("it is gone")


@pytest.mark.parametrize("agent_stays", [True, False])
@pytest.mark.parametrize(("uses", "state", "runs"), [("test.shell", "unknown", 1), ("test.again", "succeeded", 2)])
async def test_what_an_engine_began_and_forgot_is_ended_and_done_again_only_if_it_may_be(
    tmp_path: Path, program: Program, uses: str, state: str, runs: int, agent_stays: bool
) -> None:
    runtime = DiesInAStart({BASE_IMAGE: program, "outrider/pause:1": hold}, images=set())
    text = (ONE_STEP % "hold").replace("test.shell", uses)
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(rig(tmp_path / "state", runtime, node_id="n1"))
        await agent.start(text, run_id="r1")
        await agent.until(lambda: program.runs == 1 and not agent.services.engine.ok)
        if not agent_stays:
            await stack.aclose()
        program.go.set()
        runtime.start_engine()
        if not agent_stays:
            agent = await stack.enter_async_context(rig(tmp_path / "state", runtime, node_id="n1"))
        run = await agent.end("r1")
    assert (run.states["a"], program.runs) == (state, runs)
    assert "end_forgotten" in {name for name, _ in runtime.calls}
    if state == "unknown":
        assert run.steps["a"].failure.code == "engine_stopped"


async def test_an_engine_that_hangs_on_one_container_is_waited_for_and_holds_up_no_other(
    agent: Rig, runtime: FakeRuntime, program: Program
) -> None:
    runtime.hangs_on.add("outrider-r1-a-1")
    await agent.start(ONE_STEP % "quick", run_id="r1")
    await agent.until(lambda: "hangs" in agent.told("r1").steps["a"].reason)
    assert list(agent.services.engine.stuck) == ["outrider-r1-a-1"]
    assert ("engine.hangs", "outrider-r1-a-1") in events(agent)
    other = await agent.run(ONE_STEP % "quick", run_id="r2")
    assert other.state == "succeeded"
    assert agent.services.engine.ok
    runtime.hangs_on.clear()
    run = await agent.end("r1")
    assert run.state == "succeeded", run.failure
    assert (program.runs, run.steps["a"].attempt) == (2, 1)
    assert not agent.services.engine.stuck
    assert ("engine.answers", "outrider-r1-a-1") in events(agent)


@pytest.mark.parametrize("carried_out", [True, False])
@pytest.mark.parametrize("method", ["create", "start"])
async def test_a_call_that_was_not_answered_is_looked_up_and_the_step_runs_once(
    agent: Rig, runtime: FakeRuntime, program: Program, method: str, carried_out: bool
) -> None:
    runtime.unanswered[method, "outrider-r1-a-1"] = carried_out
    run = await agent.run(ONE_STEP % "quick", run_id="r1")
    assert run.state == "succeeded", run.failure
    assert (program.runs, run.steps["a"].attempt) == (1, 1)
    assert agent.log("r1", "a") == b"up\ndone\n"
    assert not runtime.unanswered


async def test_a_step_that_cannot_be_stopped_is_not_over_before_it_is(agent: Rig, runtime: FakeRuntime) -> None:
    run_id = await agent.start(ONE_STEP % "hold")
    await up(agent, run_id)
    runtime.hangs_on.add(f"outrider-{run_id}-a-1")
    await agent.cancel(run_id, grace_s=0.1)
    await agent.until(lambda: f"outrider-{run_id}-a-1" in agent.services.engine.stuck)
    await asyncio.sleep(0.5)
    assert run_id in agent.runs.active
    runtime.hangs_on.clear()
    assert (await agent.end(run_id)).state == "cancelled"


async def test_an_agent_starts_and_adopts_although_the_engine_hangs_on_a_container(
    tmp_path: Path, runtime: FakeRuntime, program: Program
) -> None:
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        await first.start(ONE_STEP % "hold", run_id="r1")
        await first.start(ONE_STEP % "hold", run_id="r2")
        await first.until(lambda: program.runs == 2)
        await first.until(lambda: first.log("r2", "a") == b"up\n")
    runtime.hangs_on.add("outrider-r1-a-1")
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        await second.until(lambda: "outrider-r1-a-1" in second.services.engine.stuck)
        program.go.set()
        assert (await second.end("r2")).state == "succeeded"
        assert "r1" in second.runs.active
        runtime.hangs_on.clear()
        run = await second.end("r1")
        assert (run.state, run.steps["a"].attempt) == ("succeeded", 1)
        assert second.log("r1", "a") == b"up\ndone\n"
    assert program.runs == 2


async def test_the_timeout_of_an_adopted_step_ends_it_by_stopping_its_container(
    tmp_path: Path, runtime: FakeRuntime, program: Program
) -> None:
    text = (ONE_STEP % "hold").replace('"uses"', '"timeout": "1s", "uses"')
    async with rig(tmp_path / "state", runtime, node_id="n1") as first:
        await first.start(text, run_id="r1")
        await first.until(lambda: first.log("r1", "a") == b"up\n")
    runtime.hangs_on.add("outrider-r1-a-1")
    async with rig(tmp_path / "state", runtime, node_id="n1") as second:
        await second.until(lambda: "outrider-r1-a-1" in second.services.engine.stuck)
        await asyncio.sleep(1.5)  # the time is over, and whether the container runs is not known
        assert "r1" in second.runs.active
        runtime.hangs_on.clear()
        run = await second.end("r1")
    assert run.steps["a"].failure.code == "step_timeout"
    assert "stop" in {name for name, _ in runtime.calls}


async def test_one_removal_that_hangs_holds_up_no_other() -> None:
    removals, gone = Removals(), asyncio.Event()
    removals.DELAY_S, removals.PATIENCE_S = 0.0, 0.05  # type: ignore[misc]

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def removed() -> None:
        gone.set()

    for _ in range(3):
        removals.add(hangs())
    removals.add(removed())
    worker = asyncio.create_task(removals.run())
    await asyncio.wait_for(gone.wait(), 5)
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_an_intent_names_its_engine_also_where_it_has_not_been_asked_yet(
    agent: Rig, runtime: FakeRuntime
) -> None:
    assert agent.services.engine.info is None
    run = await agent.run(ONE_STEP % "quick")
    assert run.state == "succeeded"
    rows = agent.services.state.journal.query_now("SELECT engine_boot FROM attempts")
    assert [row["engine_boot"] for row in rows] == ["boot-1"]

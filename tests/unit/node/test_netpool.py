from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_core.journal import Journal
from agent_core.netpool import MIGRATION, NetPool
from agent_core.policy import NodePolicy
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import PolicyViolation


async def pause(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


POLICY = NodePolicy.model_validate({"warm_none": 2})


@pytest.fixture
async def runtime() -> AsyncIterator[FakeRuntime]:
    runtime = FakeRuntime(programs={"outrider/pause:1": pause})
    yield runtime
    await runtime.aclose()


@pytest.fixture
async def pool(runtime: FakeRuntime, journal: Journal) -> AsyncIterator[NetPool]:
    pool = NetPool(runtime, POLICY, "n1", journal)
    await pool.start()
    await pool.settle()
    yield pool
    await pool.aclose()


async def running(runtime: FakeRuntime) -> set[str]:
    return {info.id for info in await runtime.list() if info.state == "running"}


async def test_steps_in_a_row_share_and_steps_side_by_side_do_not(pool: NetPool) -> None:
    first = await pool.lease("r1", "none")
    beside = await pool.lease("r1", "none")
    pool.give_back("r1", first)
    assert await pool.lease("r1", "none") == first
    assert beside != first
    assert await pool.lease("r1", "egress") not in (first, beside)


async def test_runs_never_share_not_even_one_after_the_other(pool: NetPool, runtime: FakeRuntime) -> None:
    first = await pool.lease("r1", "none")
    pool.give_back("r1", first)
    pool.release("r1")
    await pool.settle()
    assert first not in await running(runtime)
    assert await pool.lease("r2", "none") != first


async def test_lease_from_the_pool_asks_nothing_of_the_engine(pool: NetPool, runtime: FakeRuntime) -> None:
    runtime.calls.clear()
    await pool.lease("r1", "none")
    assert runtime.calls == []


async def test_empty_pool_makes_one_and_a_release_fills_it_up(pool: NetPool, runtime: FakeRuntime) -> None:
    leased = {await pool.lease("r1", "none") for _ in range(4)}
    assert len(leased) == 4
    pool.release("r1")
    await pool.settle()
    assert len(await running(runtime)) == 3  # two for "none", one for "egress"


async def test_next_agent_keeps_what_runs_hold_and_removes_the_rest(
    pool: NetPool, runtime: FakeRuntime, journal: Journal
) -> None:
    held = await pool.lease("r1", "none")
    await pool.aclose(remove=False)  # the agent was killed
    successor = NetPool(runtime, POLICY, "n1", journal)
    left = await running(runtime)
    await successor.start()
    await successor.settle()
    assert (await running(runtime)) & left == {held}
    assert await successor.lease("r1", "none") != held  # a step may still be in it
    successor.release("r1")
    await successor.settle()
    assert held not in await running(runtime)
    await successor.aclose()


async def test_agent_of_another_server_leaves_the_pool_alone(
    pool: NetPool, runtime: FakeRuntime, tmp_path: Path
) -> None:
    before = await running(runtime)
    journal = Journal(tmp_path / "other" / "journal.db", [MIGRATION])
    other = NetPool(runtime, POLICY, "n1", journal)  # its node has the same name, as with two `outrider dev`
    await other.start()
    await other.settle()
    assert before < await running(runtime)
    await other.aclose()
    assert await running(runtime) == before
    journal.close()


async def test_engine_that_restarted_costs_new_ones_only(pool: NetPool, runtime: FakeRuntime) -> None:
    before = await running(runtime)
    runtime.stop_engine()
    runtime.start_engine()
    await runtime.aclose()
    await pool.start()
    await pool.settle()
    after = await running(runtime)
    assert len(after) == 3
    assert not after & before
    assert await pool.lease("r1", "none") in after


async def test_unknown_class_is_refused(pool: NetPool) -> None:
    with pytest.raises(PolicyViolation):
        await pool.lease("r1", "lan")

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_core.journal import Journal
from agent_core.netpool import MIGRATION, NetPool
from agent_core.policy import NodePolicy
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import PermanentError, PolicyViolation


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


@pytest.mark.parametrize("moment", ["create", "start", "leased"])
async def test_what_a_run_gets_while_the_pool_looks_around_is_kept(
    runtime: FakeRuntime, journal: Journal, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At the start of an agent runs go on while the pool asks what a former agent left."""
    pool = NetPool(runtime, NodePolicy(warm_none=0, networks={}), "n1", journal)
    listed, go_on = asyncio.Event(), asyncio.Event()
    real = {name: getattr(runtime, name) for name in ("list", "create", "start")}

    async def list_late(**given: Any) -> Any:
        found = await real["list"](**given)
        listed.set()
        await go_on.wait()
        return found

    async def create(spec: Any) -> str:
        container: str = await real["create"](spec)
        if moment == "create":
            await go_on.wait()
        return container

    async def start(container: str) -> None:
        if moment == "start":
            looking.append(asyncio.create_task(pool.start()))
            await listed.wait()
        await real["start"](container)

    looking: list[asyncio.Task[None]] = []
    monkeypatch.setattr(runtime, "list", list_late)
    monkeypatch.setattr(runtime, "create", create)
    monkeypatch.setattr(runtime, "start", start)
    if moment == "leased":
        looking.append(asyncio.create_task(pool.start()))
        await listed.wait()
    leasing = asyncio.create_task(pool.lease("r1", "none"))
    if moment == "create":
        while not await real["list"]():
            await asyncio.sleep(0)
        looking.append(asyncio.create_task(pool.start()))
        await listed.wait()
    else:
        await leasing
    go_on.set()
    leased = await leasing
    await looking[0]
    await pool.settle()
    assert leased in {info.id for info in await real["list"]() if info.state == "running"}
    pool.give_back("r1", leased)
    assert await pool.lease("r1", "none") == leased, "the pool still knows it as this run's"
    await pool.aclose()


async def test_steps_run_with_crun_where_the_engine_offers_it(runtime: FakeRuntime, journal: Journal) -> None:
    runtime.oci_runtimes = ("runc", "crun")
    pool = NetPool(runtime, NodePolicy(warm_none=1, networks={}), "n1", journal)
    await pool.start()
    assert runtime.spec_of(await pool.lease("r1", "none")).oci_runtime == pool.oci_runtime == "crun"
    runtime.oci_runtimes = ("runc",)
    await pool.start()  # as after a restart of the engine
    assert pool.oci_runtime == ""
    await pool.aclose()


async def test_a_crun_that_starts_nothing_here_is_left_for_the_engines_default(
    runtime: FakeRuntime, journal: Journal
) -> None:
    runtime.oci_runtimes, runtime.failing_oci_runtimes = ("runc", "crun"), {"crun"}
    pool = NetPool(runtime, NodePolicy(warm_none=2, networks={}), "n1", journal)
    await pool.start()
    leased = await pool.lease("r1", "none")
    assert runtime.spec_of(leased).oci_runtime == pool.oci_runtime == ""
    await pool.start()  # as after a restart of the engine: the namespaces that wait prove nothing about crun
    assert pool.oci_runtime == ""
    await pool.settle()
    assert {info.state for info in await runtime.list()} == {"running"}, "what could not be started is removed"
    await pool.aclose()


async def test_a_runtime_that_the_policy_names_is_never_exchanged(runtime: FakeRuntime, journal: Journal) -> None:
    runtime.oci_runtimes, runtime.failing_oci_runtimes = ("runc", "runsc"), {"runsc"}
    pool = NetPool(runtime, NodePolicy(warm_none=0, networks={}, oci_runtime="runsc"), "n1", journal)
    await pool.start()
    with pytest.raises(PermanentError):
        await pool.lease("r1", "none")
    assert pool.oci_runtime == "runsc"
    await pool.aclose()


async def test_namespaces_are_made_with_the_runtime_of_the_steps(runtime: FakeRuntime, journal: Journal) -> None:
    pool = NetPool(runtime, NodePolicy(warm_none=0, networks={}, oci_runtime="crun"), "n1", journal)
    assert runtime.spec_of(await pool.lease("r1", "none")).oci_runtime == "crun"
    await pool.aclose()

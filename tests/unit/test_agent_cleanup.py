"""What nobody needs any more is collected by age, and sooner where the disk gets full; nothing else is ever touched."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent_core.cleanup import UNDER_PRESSURE, Ages, Cleanup
from agent_core.container_spec import ContainerScope, GrantedVolume, ManagedSpec
from agent_core.journal import Journal
from agent_core.policy import NetworkClass, NodePolicy
from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_NODE,
    LABEL_RUN,
    LABEL_STEP,
    ContainerSpec,
    Mount,
)
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from agent_core.services import Removals
from agent_core.state import migrations
from agent_core.steady import SteadyClock
from agent_core.transitions import Transition
from tests.agent_rig import BASE_IMAGE, Rig, rig

DAY_S = 24 * 3600.0
GAMES = {"egress": NetworkClass(network="outrider", warm=0)}


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


async def quick(process: FakeProcess) -> int:
    return 0


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime({BASE_IMAGE: quick, "outrider/pause:1": hold, "game:1": hold}, images=set())


@pytest.fixture
async def agent(tmp_path: Path, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(Removals, "DELAY_S", 0.0)
    policy = NodePolicy(warm_none=0, networks=GAMES, ports={"range": "28800-28899"})  # type: ignore[arg-type]
    async with rig(tmp_path / "state", runtime, node_id="n1", policy=policy) as started:
        yield started


def cleanup(agent: Rig) -> Cleanup:
    known = asyncio.Event()
    known.set()
    return Cleanup(agent.services, agent.runs, known)


def labels(run_id: str, node_id: str = "n1") -> dict[str, str]:
    return {LABEL_NODE: node_id, LABEL_KIND: "step", LABEL_RUN: run_id, LABEL_STEP: "a", LABEL_ATTEMPT: "1"}


async def container(runtime: FakeRuntime, name: str, *, age_s: float, labels: dict[str, str], run: bool = True) -> str:
    """One that ended, or never ran, so long ago."""
    made = await runtime.create(ContainerSpec(name=name, image=BASE_IMAGE, labels=labels))
    if run:
        await runtime.start(made)
        await runtime.exited(made)
    held = runtime._containers[made]
    held.info = replace(held.info, created_at=datetime.now(UTC) - timedelta(seconds=age_s))
    return made


async def names(runtime: FakeRuntime) -> set[str]:
    return {info.name for info in await runtime.list()}


async def test_ended_containers_that_nobody_knows_go_by_age_and_sooner_under_pressure(
    agent: Rig, runtime: FakeRuntime
) -> None:
    await container(runtime, "old", age_s=2 * DAY_S, labels=labels("gone"))
    await container(runtime, "hours", age_s=7200, labels=labels("gone"))
    await container(runtime, "fresh", age_s=1, labels=labels("gone"))
    await container(runtime, "foreign", age_s=9 * DAY_S, labels={})
    await container(runtime, "another-node", age_s=9 * DAY_S, labels=labels("gone", "n2"))
    await container(runtime, "game", age_s=9 * DAY_S, labels={LABEL_NODE: "n1", LABEL_KIND: "managed"})
    await cleanup(agent).once()
    kept = {"fresh", "foreign", "another-node", "game"}
    await agent.until(lambda: _equals(runtime, kept | {"hours"}))
    await cleanup(agent).relieve()
    await agent.until(lambda: _equals(runtime, kept))


async def _equals(runtime: FakeRuntime, expected: set[str]) -> bool:
    return await names(runtime) == expected


async def test_a_running_container_of_a_lost_journal_is_left_alone_at_any_age(agent: Rig, runtime: FakeRuntime) -> None:
    spec = ContainerSpec(name="work", image="game:1", labels=labels("gone"))
    made = await runtime.create(spec)
    await runtime.start(made)
    runtime._containers[made].info = replace(
        runtime._containers[made].info, created_at=datetime.now(UTC) - timedelta(days=90)
    )
    await cleanup(agent).relieve()
    await asyncio.sleep(0.1)
    assert await names(runtime) == {"work"}


def volume(agent: Rig, run_id: str, *, age_s: float) -> Path:
    """As an agent leaves it whose journal is lost."""
    path = agent.services.config.state_dir / "volumes" / "run" / run_id / "build"
    path.mkdir(parents=True)
    (path / "file").write_text("x")
    when = time.time() - age_s
    for each in (path, path.parent):
        os.utime(each, (when, when))
    return path


async def test_volumes_of_runs_that_nobody_knows_go_by_age_and_never_while_a_container_has_them(
    agent: Rig, runtime: FakeRuntime
) -> None:
    old, hours, fresh, mounted = (
        volume(agent, name, age_s=age)
        for name, age in (("old", 8 * DAY_S), ("hours", 7200), ("fresh", 1), ("mounted", 99 * DAY_S))
    )
    mount = Mount(str(mounted), "/data", writable=True)
    await runtime.create(ContainerSpec(name="game", image="game:1", mounts=(mount,)))
    object_volume = agent.services.config.state_dir / "volumes" / "object" / "game" / "a" / "saves"
    object_volume.mkdir(parents=True)
    os.utime(object_volume, (1, 1))
    await cleanup(agent).once()
    assert [each.exists() for each in (old, hours, fresh, mounted)] == [False, True, True, True]
    await cleanup(agent).relieve()
    assert [each.exists() for each in (hours, fresh, mounted, object_volume)] == [False, True, True, True]
    assert not list((agent.services.config.state_dir / "volumes" / ".trash").iterdir())


@pytest.mark.parametrize("jump_s", [8 * DAY_S, -8 * DAY_S])
async def test_a_wall_clock_that_is_set_makes_nothing_old(
    agent: Rig, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    state, real = agent.services.state, time.time
    before = volume(agent, "before", age_s=1)
    await container(runtime, "stray", age_s=1, labels=labels("gone"))
    await state.commit(Transition.COMMAND_RECEIVED, state.command_received("before", b"d"))
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    after = volume(agent, "after", age_s=1)
    await state.commit(Transition.COMMAND_RECEIVED, state.command_received("after", b"d"))
    await cleanup(agent).once()
    await asyncio.sleep(0.1)  # removals are not waited for
    assert [each.exists() for each in (before, after)] == [True, True]
    assert "stray" in await names(runtime)
    assert [await state.command(each) is not None for each in ("before", "after")] == [True, True]


async def test_ages_go_on_in_the_next_agent_whatever_the_clock_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Boot:
        boot_id: str
        time: float = 1000.0

        def now(self) -> float:
            return self.time

    journal = Journal(tmp_path / "journal.db", migrations())
    boot = Boot("one")
    first = SteadyClock(journal, boot)
    began = first.now()
    await journal.write(Transition.TIME_SPENT, lambda db: first.note()(db) and None)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 8 * DAY_S)
    boot.time += 60
    second = SteadyClock(journal, boot)
    assert second.now() == pytest.approx(began + 60)
    assert second.stamped_before(0) == pytest.approx(began + 60)
    await journal.write(Transition.TIME_SPENT, lambda db: second.note()(db) and None)
    rebooted = SteadyClock(journal, Boot("two", 5.0))
    assert rebooted.now() == pytest.approx(began + 60)
    assert rebooted.stamped_before(0) == pytest.approx(time.time(), abs=10)  # the only clock that knows of it
    journal.close()


async def test_what_is_held_for_a_game_that_somebody_removed_is_given_back_in_time(
    agent: Rig, runtime: FakeRuntime
) -> None:
    services = agent.services
    saves = await services.volumes.allot("r1", None, "saves", "run", False, None)
    scope = ContainerScope("r1", "start", 1, None, {"saves": GrantedVolume(saves.host_path, True)}, 200001, 200001)
    spec = ManagedSpec.parse(
        {"name": "game", "image": "game:1", "volumes": {"saves": "/data:rw"}, "ports": [{"name": "p", "container": 1}]}
    )
    await services.containers.start(spec, scope)
    await services.volumes.release_run("r1")
    sweeper = cleanup(agent)
    await sweeper.once(Ages(missing_s=0))
    assert Path(saves.host_path).exists(), "it is there"
    await runtime.remove("game", force=True)
    await sweeper.once()
    assert Path(saves.host_path).exists(), "somebody may be about to make it anew"
    assert services.containers._ports.held("game")
    await sweeper.once(Ages(missing_s=0))
    assert not services.containers._ports.held("game")
    await sweeper.once()
    assert not Path(saves.host_path).exists()


async def test_an_engine_that_is_away_does_not_keep_the_disk_from_being_cleaned(
    agent: Rig, runtime: FakeRuntime
) -> None:
    stale = agent.services.attempts_dir / "r9" / "a" / "1"
    stale.mkdir(parents=True)
    runtime.stop_engine()
    await cleanup(agent).once()
    assert not stale.exists()
    runtime.start_engine()


def test_pressure_shortens_every_age() -> None:
    for field in ("stray_s", "missing_s", "unknown_volume_s"):
        assert 0 < getattr(UNDER_PRESSURE, field) < getattr(Ages(), field)

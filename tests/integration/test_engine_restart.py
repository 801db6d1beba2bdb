"""What happens when the container engine stops and returns: on an engine of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent_core.runtimes._docker_forgotten import processes
from agent_core.runtimes.base import ContainerSpec, Mount
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import EngineUnavailable
from tests.second_engine import Engine, second_engine

BASE = "outrider/base:1"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with second_engine() as made:
        yield made


@pytest.fixture
async def runtime(engine: Engine) -> AsyncIterator[DockerRuntime]:
    driver = DockerRuntime(engine.socket)
    yield driver
    for info in await driver.list():
        await driver.remove(info.id, force=True)
    await driver.aclose()


async def test_end_by_the_engines_own_restart_is_told_from_a_failure(engine: Engine, runtime: DockerRuntime) -> None:
    sleeper = await runtime.create(ContainerSpec(name="sleeper", image=BASE, args=("sleep", "600")))
    await runtime.start(sleeper)
    before = await runtime.info()
    waiting = asyncio.create_task(runtime.exited(sleeper))
    actions: list[str] = []

    async def listen() -> None:
        async with contextlib.aclosing(runtime.events()) as events:
            async for event in events:
                actions.append(event.action)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.3)
    await asyncio.to_thread(engine.stop)
    with pytest.raises(EngineUnavailable, match="can't be reached"):
        await runtime.inspect(sleeper)
    assert not waiting.done()

    await asyncio.to_thread(engine.start)
    end = await asyncio.wait_for(waiting, 40)
    assert end.engine_stopped
    assert (await runtime.info()).boot != before.boot
    assert "resync" in actions
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)

    # A new attempt works as if nothing had been.
    after = await runtime.create(ContainerSpec(name="after", image=BASE, args=("sh", "-c", "exit 5")))
    await runtime.start(after)
    end = await asyncio.wait_for(runtime.exited(after), 20)
    assert (end.exit_code, end.engine_stopped) == (5, False)
    late = await runtime.exited(sleeper, boot=before.boot)
    assert late.engine_stopped  # also for an agent that only now looks


@pytest.mark.parametrize("then", ["start", "remove"])
async def test_what_an_engine_forgot_that_it_started_is_ended_before_anything_else(
    engine: Engine, runtime: DockerRuntime, tmp_path: Path, then: str
) -> None:
    tmp_path.chmod(0o777)
    await asyncio.to_thread(engine.stop)
    await asyncio.to_thread(engine.start, live_restore=True)
    # Where nothing runs, an engine with live-restore stops as one without: it waits for the start.
    await runtime.start(await runtime.create(ContainerSpec(name=f"other-{then}", image=BASE, args=("sleep", "600"))))
    boot = (await runtime.info()).boot
    spec = ContainerSpec(
        name=f"forgotten-{then}",
        image=BASE,
        args=("sh", "-c", "echo ran >> /v/times; sleep 600"),
        env={"OUTRIDER_STEP": "a"},
        mounts=(Mount(str(tmp_path), "/v", True),),
        oci_runtime="late",
    )
    container = await runtime.create(spec)
    times = tmp_path / "times"
    with engine.starts_come_late():
        starting = asyncio.create_task(runtime.start(container))
        while not times.exists():
            await asyncio.sleep(0.01)
        starting.cancel()  # an engine that is stopped waits for its callers
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.to_thread(engine.stop)
    await asyncio.to_thread(engine.start)
    assert (await runtime.inspect(container)).started_at is None
    assert await runtime.forgotten(container, boot=boot)
    former = processes(container)
    assert former
    if then == "start":
        await runtime.start(container)
        end = asyncio.create_task(runtime.exited(container))
        await asyncio.sleep(0.2)
        assert (await runtime.inspect(container)).state == "running"
        assert times.read_text() == "ran\nran\n"
        await runtime.kill(container)
        assert (await asyncio.wait_for(end, 10)).exit_code == 137
    await runtime.remove(container, force=True)
    assert not processes(container)
    assert not [pid for pid in former if Path(f"/proc/{pid}").exists()]


async def test_a_container_that_never_began_is_not_taken_for_a_forgotten_one(
    engine: Engine, runtime: DockerRuntime
) -> None:
    boot = (await runtime.info()).boot
    container = await runtime.create(ContainerSpec(name="not-begun", image=BASE, args=("true",)))
    await asyncio.to_thread(engine.stop)
    await asyncio.to_thread(engine.start)
    assert not await runtime.forgotten(container, boot=boot)

"""What happens when the container engine stops and returns: on an engine of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest

from agent_core.runtimes.base import ContainerSpec
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

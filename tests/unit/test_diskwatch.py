"""Low disks are told, and relieved; full ones refuse what is new, in a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_core.diskwatch import FLOOR_BYTES, DiskWatch
from agent_core.policy import NodePolicy
from agent_core.room import free_bytes
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import ErrorClass, OutriderError, TemporaryError
from tests.agent_rig import BASE_IMAGE, rig

MORE_THAN_THERE_IS = 2**60


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


class Heard:
    """What the watch says and does."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.relieved = self.kept = 0
        self.free = 10**9

    async def emit(self, type_: str, subject: str, _data: Mapping[str, Any] | None) -> None:
        self.events.append((type_, subject))

    async def relieve(self) -> None:
        self.relieved += 1
        raise TemporaryError("the engine is away")

    def keep_room(self) -> None:
        self.kept += 1


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_disk_that_gets_low_is_told_once_and_relieved_and_told_again_when_it_is_not(tmp_path: Path) -> None:
    heard, watch = Heard(), DiskWatch(tmp_path, reserve_bytes=MORE_THAN_THERE_IS, interval_s=0.01)
    task = asyncio.create_task(watch.run(heard.emit, heard.relieve, heard.keep_room))
    await until(lambda: heard.relieved)
    await asyncio.sleep(0.1)
    assert heard.events == [("disk.low", str(tmp_path))]
    assert (heard.relieved, heard.kept) == (1, 0), "once a minute at most, also where it failed"
    watch.reserve_bytes = 0
    await until(lambda: len(heard.events) == 2)
    assert heard.events[1] == ("disk.ok", str(tmp_path))
    await until(lambda: heard.kept)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_full_disk_refuses_in_a_sentence_that_says_where_and_why(tmp_path: Path) -> None:
    watch = DiskWatch(tmp_path, reserve_bytes=0)
    watch.check("run step a")
    watch.floor_bytes = MORE_THAN_THERE_IS
    with pytest.raises(OutriderError) as caught:
        watch.check("run step a")
    assert caught.value.code == "disk_full"
    assert caught.value.error_class is ErrorClass.TEMPORARY
    assert f"the node's disk at {tmp_path}" in str(caught.value)
    assert "run step a" in str(caught.value)


def test_the_floor_is_part_of_the_reserve(tmp_path: Path) -> None:
    assert DiskWatch(tmp_path, reserve_bytes=10**9).floor_bytes == FLOOR_BYTES
    assert DiskWatch(tmp_path, reserve_bytes=1000).floor_bytes == 1000


def test_each_disk_is_looked_at_once_and_a_strangers_path_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir()
    watch = DiskWatch(tmp_path, tmp_path / "volumes", reserve_bytes=0, more=lambda: Path("/no/such/place"))
    (disk,) = watch.disks()
    assert (disk.path, disk.level) == (tmp_path, "ok")
    assert abs(disk.free_bytes - free_bytes(tmp_path)) < 10**9


async def test_no_step_is_begun_on_a_full_disk_and_the_next_one_is_when_there_is_room(tmp_path: Path) -> None:
    runtime = FakeRuntime({"outrider/pause:1": hold, BASE_IMAGE: succeed}, images=set())
    step = {"name": "a", "uses": "test.shell", "retry": {"max": 1}}
    text = f'{{"name": "p", "steps": [{step}]}}'.replace("'", '"')
    policy = NodePolicy(warm_none=0, networks={}, disk_reserve_bytes=0)
    async with rig(tmp_path / "state", runtime, policy=policy) as agent:
        first = await agent.start(text)  # it was taken on while there was room
        agent.services.disk.floor_bytes = MORE_THAN_THERE_IS
        run = await agent.end(first)
        assert (run.state, run.failure.code) == ("failed", "disk_full")
        assert "create" not in {name for name, _ in runtime.calls if name == "create"}
        with pytest.raises(OutriderError, match="is full: can't take on run"):
            await agent.start(text)
        agent.services.disk.floor_bytes = 0
        assert (await agent.run(text)).state == "succeeded"


async def succeed(process: FakeProcess) -> int:
    return 0

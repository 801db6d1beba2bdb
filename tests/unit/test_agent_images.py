"""The images of a run: pulled ahead and side by side, told how far they are, with the content that the policy says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agent_core.policy import NodePolicy
from agent_core.runtimes.base import ImageInfo
from agent_core.runtimes.fake import FakeProcess, FakeRuntime
from outrider.errors import TemporaryError
from tests.agent_rig import BASE_IMAGE, rig

RIGHT, WRONG = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


async def hold(process: FakeProcess) -> int:
    await process.signalled.wait()
    return 0


async def quick(_process: FakeProcess) -> int:
    return 0


class Engine(FakeRuntime):
    """An engine with a registry that answers when ``open`` is set, and knows what it was created from."""

    def __init__(self) -> None:
        super().__init__({BASE_IMAGE: quick, "outrider/pause:1": hold}, images={"outrider/pause:1"})
        self.registry = {"game/a:1", "game/b:1"}
        self.ids: dict[str, str] = {}
        self.open = asyncio.Event()
        self.pulling: set[str] = set()
        self.most_at_once = 0
        self.refusals = 0

    async def find_image(self, image: str) -> ImageInfo:
        info = await super().find_image(image)
        return ImageInfo(self.ids.get(image, info.id), tags=(image,))

    async def pull_image(self, image: str, *, on_progress: Any = None) -> ImageInfo:
        self.pulling.add(image)
        self.most_at_once = max(self.most_at_once, len(self.pulling))
        if on_progress is not None:
            on_progress(5_000_000, 20_000_000)
        await self.open.wait()
        self.pulling.discard(image)
        if self.refusals:
            self.refusals -= 1
            raise TemporaryError(f"the image {image} can't be pulled now", code="registry_unavailable")
        return await super().pull_image(image, on_progress=on_progress)

    def count(self, method: str) -> int:
        return sum(call[0] == method for call in self.calls)


def pipeline(*images: str) -> str:
    steps = [{"name": f"s{n}", "uses": "test.shell", "with": {"image": image}} for n, image in enumerate(images)]
    return json.dumps({"name": "p", "steps": steps})


def agent(path: Path, engine: Engine, **section: Any) -> Any:
    return rig(
        path / "state",
        engine,
        node_id="n1",
        policy=NodePolicy.model_validate({"images": section, "warm_none": 0, "networks": {}}),
    )


@pytest.fixture
async def engine() -> Engine:
    return Engine()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_the_images_of_a_run_are_pulled_side_by_side_when_it_starts(tmp_path: Path, engine: Engine) -> None:
    async with agent(tmp_path, engine) as node:
        run_id = await node.start(pipeline(BASE_IMAGE, "game/a:1", "game/b:1"))
        await until(lambda: engine.pulling == {"game/a:1", "game/b:1"})
        engine.open.set()
        run = await node.end(run_id)
    assert (run.state, engine.most_at_once) == ("succeeded", 2)
    assert engine.count("pull_image") == 2


async def test_a_step_tells_how_far_the_pull_is_that_it_waits_for(tmp_path: Path, engine: Engine) -> None:
    async with agent(tmp_path, engine) as node:
        run_id = await node.start(pipeline("game/a:1"))

        def told() -> list[tuple[int, int, str, str]]:
            steps = [step for report in node.progress for step in report.steps if step.HasField("progress")]
            return [(s.progress.done, s.progress.total, s.progress.unit, s.progress.message) for s in steps]

        await until(told)
        engine.open.set()
        assert (await node.end(run_id)).state == "succeeded"
    assert told()[0] == (5_000_000, 20_000_000, "bytes", "pulling game/a:1")
    assert told()[-1] == (0, 0, "bytes", "")


async def test_a_registry_that_is_away_for_a_moment_fails_nothing(tmp_path: Path, engine: Engine) -> None:
    engine.open.set()
    engine.refusals = 2
    async with agent(tmp_path, engine) as node:
        assert (await node.run(pipeline("game/a:1"))).state == "succeeded"
        counts = {each.operation: each.retries for each in node.services.operations.all()}
    assert counts["image.pull"] >= 1


async def test_always_asks_once_for_a_run_however_often_its_steps_are_tried(tmp_path: Path, engine: Engine) -> None:
    engine.open.set()
    engine.images = {"outrider/pause:1", "game/a:1"}
    async with agent(tmp_path, engine, pull="always") as node:
        for _ in range(2):
            assert (await node.run(pipeline("game/a:1", "game/a:1", "game/a:1"))).state == "succeeded"
    assert engine.count("pull_image") == 2


async def test_a_step_is_made_from_the_content_that_its_name_stands_for(tmp_path: Path, engine: Engine) -> None:
    engine.images = {"outrider/pause:1", "game/a:1"}
    engine.ids["game/a:1"] = RIGHT
    async with agent(tmp_path, engine, pull="never", digests={"game/a:1": RIGHT}) as node:
        specs: list[tuple[str, str]] = []
        create = engine.create

        async def seen(spec: Any) -> str:
            specs.append((spec.image, spec.image_id))
            return await create(spec)

        engine.create = seen  # type: ignore[method-assign]
        assert (await node.run(pipeline("game/a:1"))).state == "succeeded"
        assert ("game/a:1", RIGHT) in specs
        assert ("outrider/pause:1", "") in specs
        engine.ids["game/a:1"] = WRONG
        run = await node.run(pipeline("game/a:1"))
        assert (run.state, run.failure.code) == ("failed", "image_digest_mismatch")
        run = await node.run(pipeline("game/b:1"))
        assert (run.state, run.failure.code) == ("failed", "image_not_found")
        assert "outrider images load" in run.failure.hint
    assert engine.count("pull_image") == 0


async def test_without_the_pause_image_it_is_pulled_like_any_other(tmp_path: Path, engine: Engine) -> None:
    engine.open.set()
    engine.programs = {"mirror.lan/outrider/pause:1": hold, BASE_IMAGE: quick}
    engine.images = set()
    async with agent(tmp_path, engine, prefix="mirror.lan") as node:
        assert (await node.run(pipeline(BASE_IMAGE))).state == "succeeded"
    assert ("tag_image", "outrider/pause:1") in engine.calls


async def test_the_pause_image_is_held_to_its_digest_too(tmp_path: Path, engine: Engine) -> None:
    engine.images = {"outrider/pause:1", "game/a:1"}
    policy: dict[str, Any] = {"pull": "never", "allow": ["game/*"], "digests": {"outrider/pause:1": RIGHT}}
    engine.ids["outrider/pause:1"] = RIGHT
    async with agent(tmp_path / "right", engine, **policy) as node:
        assert (await node.run(pipeline("game/a:1"))).state == "succeeded"
    engine.ids["outrider/pause:1"] = WRONG
    async with agent(tmp_path / "wrong", engine, **policy) as node:
        run = await node.run(pipeline("game/a:1"))
        assert (run.state, run.failure.code) == ("failed", "image_digest_mismatch")

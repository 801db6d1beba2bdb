"""Pulls by the node's policy, with a real engine and a registry of the test's own."""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agent_core.image_policy import ImagePolicy
from agent_core.images import Images
from agent_core.runtimes.base import ContainerSpec
from agent_core.runtimes.docker import DockerRuntime
from outrider.errors import NotFound, TemporaryError
from outrider.retry import OperationCounts
from tests.integration.registry import Registry, serving


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        yield registry


@pytest.fixture
async def name(registry: Registry, runtime: DockerRuntime) -> AsyncIterator[str]:
    """A repository's name that nobody else uses; the images that got it are removed."""
    name = f"outrider-test/{secrets.token_hex(6)}"
    yield name
    listed = ["docker", "images", "--no-trunc", "--quiet"]
    references = (name, f"{registry.address}/{name}", f"{registry.address}/mirror/{name}")
    found = [subprocess.run([*listed, each], capture_output=True, text=True).stdout.split() for each in references]
    ids = sorted({each for ids in found for each in ids})
    subprocess.run(["docker", "image", "rm", "--force", *ids], capture_output=True)


def images(runtime: DockerRuntime, counts: OperationCounts | None = None, **section: Any) -> Images:
    return Images(runtime, ImagePolicy.model_validate(section), counts)


async def test_a_prefix_is_where_images_come_from_and_their_own_name_is_what_they_get(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    _, image_id = registry.put(f"mirror/{name}", "1", b"one")
    node = images(runtime, prefix=f"{registry.address}/mirror")
    assert await node.ensure(f"{name}:1") == ""
    assert (await runtime.find_image(f"{name}:1")).id == image_id
    asked = len(registry.asked)
    assert await node.ensure(f"{name}:1") == ""
    assert len(registry.asked) == asked


async def test_a_tag_that_moved_is_followed_with_always_and_not_with_missing(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    _, first = registry.put(name, "1", b"one")
    missing, always = (images(runtime, prefix=registry.address, pull=pull) for pull in ("missing", "always"))
    await missing.ensure(f"{name}:1", run="r1")
    _, second = registry.put(name, "1", b"two")
    await missing.ensure(f"{name}:1", run="r2")
    assert (await runtime.find_image(f"{name}:1")).id == first
    await always.ensure(f"{name}:1", run="r3")
    assert (await runtime.find_image(f"{name}:1")).id == second


async def test_a_pinned_image_is_that_content_whatever_its_tag_says_by_now(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    digest, image_id = registry.put(name, "1", b"the right one")
    _, other = registry.put(name, "1", b"put there later")
    reference = f"{registry.address}/{name}:1"
    await images(runtime).ensure(reference)
    assert (await runtime.find_image(reference)).id == other
    for node, wanted in (
        (images(runtime, digests={reference: digest}), reference),
        (images(runtime, digests={reference: image_id}, pull="never"), reference),
        (images(runtime, require_digest=True, pull="never"), f"{registry.address}/{name}@{digest}"),
    ):
        assert await node.before_create(wanted) == image_id
    container = await runtime.create(ContainerSpec(name=name.replace("/", "-"), image=reference, image_id=image_id))
    try:
        info = await runtime.inspect(container)
        assert (info.image, info.raw["Image"]) == (reference, image_id)
        assert [each.image for each in await runtime.list(labels={"outrider.image": reference})] == [reference]
    finally:
        await runtime.remove(container, force=True)


async def test_a_registry_that_is_busy_is_asked_again(runtime: DockerRuntime, registry: Registry, name: str) -> None:
    registry.put(name, "1", b"one")
    registry.refusals = 1000
    counts = OperationCounts()
    pulling = asyncio.create_task(images(runtime, counts, prefix=registry.address).ensure(f"{name}:1"))
    while not counts.all():
        assert not pulling.done()
        await asyncio.sleep(0.02)
    registry.refusals = 0
    await pulling
    [counted] = counts.all()
    assert (counted.operation, counted.error_class, counted.failures) == ("image.pull", "temporary", 0)
    assert counted.retries >= 1
    registry.refusals = 1000
    with pytest.raises(TemporaryError, match="can't be pulled now") as caught:
        await runtime.pull_image(f"{registry.address}/{name}:2")
    assert caught.value.code == "registry_unavailable"


async def test_a_tag_that_the_registry_has_not_is_not_asked_for_again(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    counts = OperationCounts()
    with pytest.raises(NotFound, match="manifest unknown"):
        await images(runtime, counts, prefix=registry.address).ensure(f"{name}:7")
    assert [(each.retries, each.failures) for each in counts.all()] == [(0, 1)]


async def test_all_who_wait_for_a_pull_hear_how_far_it_is(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    registry.put(name, "1", secrets.token_bytes(4 * 2**20))
    registry.gate.clear()
    node = images(runtime, prefix=registry.address)
    told: list[list[tuple[int, int, str]]] = [[], []]
    first = asyncio.create_task(node.ensure(f"{name}:1", tell=lambda *words: told[0].append(words)))
    while not told[0]:
        assert not first.done()
        await asyncio.sleep(0.02)
    second = asyncio.create_task(node.ensure(f"{name}:1", tell=lambda *words: told[1].append(words)))
    while not told[1]:
        assert not second.done()
        await asyncio.sleep(0.02)
    first.cancel()  # who gives up does not end it for the other
    await asyncio.sleep(0.6)  # a rate is told once there is something to tell it of
    registry.gate.set()
    await second
    done, total, message = told[1][-2]
    assert done == total > 4 * 2**20
    rate = re.fullmatch(rf"pulling {name}:1 at (\d+\.\d) MB/s", message)
    assert rate is not None, message
    assert 0 < float(rate[1]) <= (total - told[1][0][0]) / 0.6 / 1e6 + 0.1
    assert 0 < told[0][0][0] < total
    assert told[1][-1] == (0, 0, "")
    assert len([line for line in registry.asked if line.startswith(f"GET /v2/{name}/manifests")]) == 1

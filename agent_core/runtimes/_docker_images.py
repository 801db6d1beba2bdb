"""Images of a Docker engine: found, pulled, named, and as a stream of bytes out of one engine into another.

Source for the calls: the Docker Engine API, version 1.41 and later, section "Images".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import quote

import docker.auth
import docker.errors
import docker.utils

from agent_core.runtimes import _docker_streams as streams
from agent_core.runtimes import _docker_wire as wire
from agent_core.runtimes._docker_http import EngineHttp
from agent_core.runtimes._docker_wire import Json
from agent_core.runtimes.base import ImageInfo, PullProgress
from outrider.errors import Conflict, InvalidInput, NotFound, OutriderError, PermanentError

_PULL_SILENCE_S = 300.0
_LOAD_SILENCE_S = 600.0
_DONE = ("Download complete", "Pull complete", "Already exists")


class DockerImages:
    """What one engine does with images. Every error is an OutriderError."""

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self._pulls: dict[str, _Pull] = {}

    async def find(self, image: str) -> ImageInfo:
        """The image that the engine has by this name or id. NotFound names it."""
        if any(part in ("", ".", "..") for part in image.split("/")):
            raise InvalidInput(f"{image!r} is not the name of an image", hint="it reads like name:tag or host/name:tag")
        path = f"/images/{quote(image, safe='/:@')}/json"
        answer: Json = await self._http.call("GET", path, doing="find the image", subject=image)
        return ImageInfo(
            id=str(answer["Id"]),
            tags=tuple(answer.get("RepoTags") or ()),
            digests=tuple(answer.get("RepoDigests") or ()),
            size_bytes=int(answer.get("Size") or 0),
            labels=dict((answer.get("Config") or {}).get("Labels") or {}),
        )

    async def pull(self, image: str, on_progress: PullProgress | None = None) -> ImageInfo:
        """Pull ``image`` from the registry in its name. One pull for all who want it at the same time.

        Who gives up waiting does not end it for the others.
        """
        pull = self._pulls.get(image)
        if pull is None:
            pull = self._pulls[image] = _Pull()
            pull.task = asyncio.create_task(self._pull(image, pull), name=f"pull {image}")
            pull.task.add_done_callback(lambda task: self._pulled(image, task))
        with pull.told(on_progress):
            return await asyncio.shield(pull.task)

    async def tag(self, image_id: str, name: str, tag: str) -> None:
        """Give an image of the engine a further name; another image that had it loses it."""
        path = f"/images/{quote(image_id, safe='/:@')}/tag"
        await self._http.call("POST", path, doing="tag the image", subject=name, parameters={"repo": name, "tag": tag})

    @contextlib.asynccontextmanager
    async def saved(self, names: Sequence[str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The images as the engine's own archive (what ``docker save`` writes), in chunks; shared layers once."""
        doing = f"save {', '.join(names)}"
        async with self._http.stream(
            "GET", "/images/get", [("names", name) for name in names], doing, silence_s=_LOAD_SILENCE_S
        ) as response:
            yield response.content.iter_chunked(2**20)

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Hand the engine an archive of `saved`. Raises what the engine finds wrong with it."""
        async with self._http.stream(
            "POST", "/images/load", {"quiet": 1}, "load images", silence_s=_LOAD_SILENCE_S, data=chunks
        ) as response:
            async for item in streams.json_lines(response):
                if item.get("error"):
                    raise PermanentError(f"the container engine can't load the images: {item['error']}")

    async def aclose(self) -> None:
        """End the pulls that are under way; the engine keeps the layers that it has whole."""
        tasks = [pull.task for pull in self._pulls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pulled(self, image: str, task: asyncio.Task[ImageInfo]) -> None:
        self._pulls.pop(image, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have

    async def _pull(self, image: str, pull: _Pull) -> ImageInfo:
        repository, tag = docker.utils.parse_repository_tag(image)
        parameters = {"fromImage": repository, "tag": tag or "latest"}
        headers = await asyncio.to_thread(_credentials, repository)
        try:
            async with self._http.stream(
                "POST", "/images/create", parameters, f"pull {image}", headers=headers, silence_s=_PULL_SILENCE_S
            ) as response:
                async for item in streams.json_lines(response):
                    if item.get("error"):
                        raise wire.pull_failed(image, str(item["error"]))
                    pull.hear(item)
        except (NotFound, Conflict, InvalidInput) as error:
            raise wire.pull_failed(image, error.message) from error
        except OutriderError as error:
            if error.code == "engine_error":  # how the engine tells that a registry did not do as it was asked
                raise wire.pull_failed(image, error.message) from error
            raise
        return await self.find(image)


class _Pull:
    """A pull under way: how far each layer is, and who wants to know."""

    task: asyncio.Task[ImageInfo]

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}
        self._listeners: list[PullProgress] = []

    @contextlib.contextmanager
    def told(self, on_progress: PullProgress | None) -> Any:
        """Tell ``on_progress`` from now on, and what is known by now at once."""
        if on_progress is None:
            yield
            return
        self._listeners.append(on_progress)
        try:
            if self._layers:
                on_progress(*self._sum())
            yield
        finally:
            self._listeners.remove(on_progress)

    def hear(self, item: Json) -> None:
        """A line of the engine's. A layer that is whole counts as far as its size is known."""
        layer, status = str(item.get("id") or ""), item.get("status")
        detail: Json = item.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._layers[layer] = (int(detail.get("current") or 0), int(detail["total"]))
        elif status in _DONE and layer in self._layers:
            size = self._layers[layer][1]
            self._layers[layer] = (size, size)
        else:
            return
        for listener in tuple(self._listeners):
            listener(*self._sum())

    def _sum(self) -> tuple[int, int]:
        return sum(done for done, _ in self._layers.values()), sum(size for _, size in self._layers.values())


def _credentials(repository: str) -> dict[str, str]:
    """The header with the registry's credentials from the engine client's own configuration, if it has any."""
    registry, _ = docker.auth.resolve_repository_name(repository)
    try:
        found = docker.auth.load_config().resolve_authconfig(registry)
    except (docker.errors.DockerException, OSError, ValueError) as error:
        raise PermanentError(
            f"the registry's credentials for {repository} can't be read: {error}", code="credentials_unreadable"
        ) from error
    return {"X-Registry-Auth": docker.auth.encode_header(found).decode()} if found else {}

"""Docker Engine, through docker-py's low-level client for calls and plain sockets for streams.

Calls run in threads of their own: a hung one holds its thread and nobody else. Every thread has a client of
its own, because docker-py shares connection pools between urls and evicts them while others use them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import aiohttp
import docker
import docker.auth
import docker.errors
import docker.utils
from docker.transport import UnixHTTPAdapter

from agent_core.runtimes import _docker_streams as streams
from agent_core.runtimes import _docker_wire as wire
from agent_core.runtimes._docker_exits import ACTIONS, Exits
from agent_core.runtimes._docker_wire import Json
from agent_core.runtimes.base import (
    ContainerInfo,
    ContainerSpec,
    EngineEvent,
    EngineInfo,
    Exit,
    PullProgress,
    StreamName,
)
from outrider.errors import Conflict, InvalidInput, NotFound, OutriderError

T = TypeVar("T")
Client = Any  # docker.APIClient, half of whose methods are not typed

DEFAULT_SOCKET = "/var/run/docker.sock"
_API_VERSIONS = ("1.40", "1.44")  # the oldest that has all we use; the oldest that engines from 29 on still speak
_CALL_TIMEOUT_S = 60.0
_PULL_SILENCE_S = 300.0
_INIT_PATH = "/usr/local/bin:/usr/bin:/usr/local/libexec/docker:/usr/libexec/docker"
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")

log = logging.getLogger(__name__)


class DockerRuntime:
    """The `Runtime` of one engine at a Unix socket.

    ``threads`` answer quick calls, ``slow_threads`` those that last by nature (stop with its grace, remove). Questions
    about no one container have two of their own: an engine may hang on as many containers as it likes.
    """

    def __init__(
        self,
        socket_path: str = DEFAULT_SOCKET,
        *,
        call_timeout_s: float = _CALL_TIMEOUT_S,
        threads: int = 16,
        slow_threads: int = 16,
    ) -> None:
        self._socket = socket_path.removeprefix("unix://")
        self._url = f"unix://{self._socket}"
        self._timeout_s = call_timeout_s
        self._quick = ThreadPoolExecutor(threads, "docker")
        self._slow = ThreadPoolExecutor(slow_threads, "docker-slow")
        self._general = ThreadPoolExecutor(2, "docker-general")
        self._local = threading.local()
        self._clients: set[Client] = set()
        self._version = ""
        # The engine looks for it in its own path, and does not say whether it found it.
        self._has_init = shutil.which("docker-init", path=f"{os.environ.get('PATH', '')}:{_INIT_PATH}") is not None
        self._session: aiohttp.ClientSession | None = None
        self._exits = Exits(self._events, self.inspect, self._boot, self._alive)
        self._pulls: dict[str, asyncio.Task[str]] = {}
        self._network_lock = asyncio.Lock()

    # -- the engine

    async def info(self) -> EngineInfo:
        answer = await self._about_itself()
        return EngineInfo(
            name="docker",
            version=str(answer.get("ServerVersion", "")),
            id=str(answer.get("ID", "")),
            boot=await self._boot_identity(),
            root=str(answer.get("DockerRootDir", "")),
            storage_driver=str(answer.get("Driver", "")),
        )

    async def ensure_image(
        self, image: str, *, pull: Literal["missing", "never"], on_progress: PullProgress | None = None
    ) -> str:
        try:
            return await self._image_id(image)
        except NotFound:
            if pull == "never":
                raise
        # One pull for all who want the same image; who gives up waiting does not end it for the others.
        task = self._pulls.get(image)
        if task is None:
            task = asyncio.create_task(self._pull(image, on_progress), name=f"pull {image}")
            self._pulls[image] = task
            task.add_done_callback(lambda done: self._pulled(image, done))
        return await asyncio.shield(task)

    async def ensure_network(self, name: str, *, labels: Mapping[str, str]) -> None:
        def ensure(client: Client) -> None:
            try:
                client.inspect_network(name)
            except docker.errors.NotFound:
                client.create_network(
                    name,
                    driver="bridge",
                    options={"com.docker.network.bridge.enable_icc": "false"},
                    check_duplicate=True,
                    labels=dict(labels),
                )

        async with self._network_lock:  # the engine allows two networks of one name
            await self._call("make the network", name, ensure)

    # -- containers

    async def create(self, spec: ContainerSpec) -> str:
        self._exits.start()
        body = wire.create_body(spec, has_init=self._has_init)
        answer = await self._call(
            "create", spec.name, lambda client: client.create_container_from_config(body, spec.name)
        )
        container = str(answer["Id"])
        self._exits.created(container)
        return container

    async def start(self, container: str) -> None:
        await self._call("start", container, lambda client: client.start(container))

    async def stop(self, container: str, *, grace_s: float) -> None:
        grace = math.ceil(grace_s)
        await self._call("stop", container, lambda client: client.stop(container, timeout=grace), pool=self._slow)

    async def restart(self, container: str, *, grace_s: float) -> None:
        grace = math.ceil(grace_s)
        await self._call("restart", container, lambda client: client.restart(container, timeout=grace), pool=self._slow)

    async def kill(self, container: str, *, signal: str = "SIGKILL") -> None:
        await self._call("kill", container, lambda client: client.kill(container, signal), pool=self._slow)

    async def remove(self, container: str, *, force: bool = False) -> None:
        def remove(client: Client) -> None:
            try:
                # With its anonymous volumes: an image that declares some gets them, and nobody else knows them.
                client.remove_container(container, v=True, force=force)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                if "already in progress" not in str(error.explanation):
                    raise

        await self._call("remove", container, remove, pool=self._slow)

    async def inspect(self, container: str) -> ContainerInfo:
        if not _CONTAINER_NAME.fullmatch(container):
            # It becomes part of a path, where ".." would lead to other things than containers.
            raise NotFound(f"there is no container {container[:255]} on this node", code="container_not_found")
        answer = await self._call("inspect", container, lambda client: client.inspect_container(container))
        return wire.info_from_inspect(answer)

    async def list(self, *, labels: Mapping[str, str] | None = None, all: bool = True) -> list[ContainerInfo]:
        wanted = [f"{name}={value}" if value else name for name, value in (labels or {}).items()]
        filters: dict[str, Any] = {"label": wanted} if wanted else {}
        items: list[Json] = await self._call(
            "list", "containers", lambda client: client.containers(all=all, filters=filters), pool=self._general
        )
        return [wire.info_from_list(item) for item in items]

    # -- output and ends

    @contextlib.asynccontextmanager
    async def attach(self, container: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        target = f"{await self._prefix()}/containers/{container}/attach?stream=1&stdout=1&stderr=1"
        try:
            async with streams.hijack(self._socket, target, self._timeout_s) as output:
                yield output
        except streams.HijackRefused as error:
            raise wire.translate_answer(error.status, error.message, "attach to", container) from error
        except (ConnectionError, FileNotFoundError) as error:
            raise wire.unavailable(self._url, error) from error

    async def logs(
        self, container: str, *, follow: bool = False, tail: int | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        info = await self.inspect(container)
        config: Any = info.raw.get("Config")
        parameters = {
            "stdout": 1,
            "stderr": 1,
            "follow": int(follow),
            "tail": "all" if tail is None else tail,
        }
        async with (
            self._open("GET", f"/containers/{info.id}/logs", parameters, f"read the log of {info.name}") as response,
            contextlib.aclosing(streams.output(response, raw=bool(config and config.get("Tty")))) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        if not _CONTAINER_ID.fullmatch(container):
            container = (await self.inspect(container)).id
        return await self._exits.wait(container, boot)

    def events(self) -> AsyncGenerator[EngineEvent, None]:
        return self._exits.events()

    async def aclose(self) -> None:
        await self._exits.aclose()
        for task in self._pulls.values():
            task.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None
        for pool in (self._quick, self._slow, self._general):
            # A hung call must not keep the agent from ending; its thread is left to its own timeout.
            pool.shutdown(wait=False, cancel_futures=True)
        while self._clients:
            self._clients.pop().close()

    # -- inside

    async def _call(
        self, doing: str, subject: str, work: Callable[[Client], T], *, pool: ThreadPoolExecutor | None = None
    ) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(pool or self._quick, lambda: work(self._client()))
        except (docker.errors.DockerException, OSError, ValueError) as error:  # requests' errors are OSErrors
            raise wire.translate(error, url=self._url, doing=doing, subject=subject) from error

    def _client(self) -> Client:
        """This thread's client, of the version that the engine speaks. Runs in a thread of ours."""
        # Tried first, because docker-py leaves a socket open for each connection that fails.
        streams.knock(self._socket)
        version = self._version or self._negotiate()
        client: Client = getattr(self._local, "client", None)
        if client is None or client.api_version != version:
            if client is not None:
                self._clients.discard(client)
                client.close()
            client = docker.APIClient(self._url, version=version, timeout=self._timeout_s)  # type: ignore[arg-type]
            # A connection is kept for each of the last paths, and nearly every call has a path of its own: 25 for each
            # thread (`num_pools` counts for ssh alone) would be most of the descriptors that a process may have.
            adapter = UnixHTTPAdapter(f"http+{self._url}", timeout=self._timeout_s, pool_connections=1)  # type: ignore[arg-type]
            client.mount("http+docker://", adapter)
            self._local.client = client
            self._clients.add(client)
        return client

    def _negotiate(self) -> str:
        probe = docker.APIClient(self._url, version=_API_VERSIONS[0], timeout=self._timeout_s)  # type: ignore[arg-type]
        try:
            answer = probe.version(api_version=False)
        finally:
            probe.close()
        spoken = str(answer.get("ApiVersion", _API_VERSIONS[0]))
        self._version = spoken if docker.utils.version_lt(spoken, _API_VERSIONS[1]) else _API_VERSIONS[1]
        return self._version

    async def _prefix(self) -> str:
        if not self._version:
            await self._call("ask about itself", "", lambda client: client.ping(), pool=self._general)
        return f"/v{self._version}"

    @contextlib.asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, object],
        doing: str,
        *,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A streamed answer; errors of the transport and of the engine are translated."""
        prefix = await self._prefix()
        if self._session is None:
            connector = aiohttp.UnixConnector(self._socket, force_close=True, limit=0)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**18, auto_decompress=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence_s)
        try:
            async with self._session.request(
                method,
                f"http://docker{prefix}{path}",
                params=streams.query(parameters),
                headers=headers,
                timeout=timeout,
            ) as response:
                if response.status >= 400:
                    message = str((await response.json(content_type=None)).get("message", response.reason))
                    raise wire.translate_answer(response.status, message, doing, "")
                yield response
        except aiohttp.ClientPayloadError as error:
            raise wire.unavailable(self._url, "it closed the connection") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise wire.unavailable(self._url, error) from error

    async def _events(self) -> AsyncGenerator[Json, None]:
        # A new engine may speak another version.
        self._version = ""
        filters = {"type": ["container"], "event": list(ACTIONS)}
        async with self._open("GET", "/events", {"filters": filters}, "read events") as response:
            yield {}
            async with contextlib.aclosing(streams.json_lines(response)) as items:
                async for item in items:
                    yield item

    async def _boot(self) -> tuple[str, bool]:
        answer = await self._about_itself()
        return await self._boot_identity(), bool(answer.get("LiveRestoreEnabled"))

    async def _about_itself(self) -> Json:
        answer: Json = await self._call("ask about itself", "", lambda client: client.info(), pool=self._general)
        return answer

    async def _alive(self) -> bool:
        return await streams.answers(self._socket)

    async def _boot_identity(self) -> str:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._general, streams.boot_identity, self._socket)
        except OSError as error:
            raise wire.unavailable(self._url, error) from error

    async def _image_id(self, image: str) -> str:
        if any(part in ("", ".", "..") for part in image.split("/")):
            raise InvalidInput(f"{image!r} is not the name of an image", hint="it reads like name:tag or host/name:tag")
        answer = await self._call("find the image", image, lambda client: client.inspect_image(image))
        return str(answer["Id"])

    def _pulled(self, image: str, task: asyncio.Task[str]) -> None:
        self._pulls.pop(image, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody may have

    async def _pull(self, image: str, on_progress: PullProgress | None) -> str:
        repository, tag = docker.utils.parse_repository_tag(image)
        parameters = {"fromImage": repository, "tag": tag or "latest"}
        headers = await self._call("read the credentials for", image, lambda client: _credentials(client, repository))
        layers: dict[str, tuple[int, int]] = {}
        try:
            async with self._open(
                "POST", "/images/create", parameters, f"pull {image}", headers=headers, silence_s=_PULL_SILENCE_S
            ) as response:
                async for item in streams.json_lines(response):
                    if item.get("error"):
                        raise wire.image_not_found(image, str(item["error"]))
                    detail: Json = item.get("progressDetail") or {}
                    if on_progress and item.get("status") == "Downloading" and detail.get("total"):
                        layers[str(item.get("id"))] = (int(detail.get("current") or 0), int(detail["total"]))
                        on_progress(sum(done for done, _ in layers.values()), sum(size for _, size in layers.values()))
        except (NotFound, Conflict, InvalidInput) as error:
            raise wire.image_not_found(image, error.message) from error
        except OutriderError as error:
            if error.code == "engine_error":  # how the engine tells a registry that can't be reached
                raise wire.image_not_found(image, error.message) from error
            raise
        return await self._image_id(image)


def _credentials(client: Client, repository: str) -> dict[str, str]:
    """The header with the registry's credentials from the engine client's own configuration, if it has any."""
    registry, _ = docker.auth.resolve_repository_name(repository)
    header = docker.auth.get_config_header(client, registry)
    return {"X-Registry-Auth": header.decode() if isinstance(header, bytes) else str(header)} if header else {}

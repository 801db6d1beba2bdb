"""Docker Engine, through its HTTP API at a Unix socket; credentials of registries are docker-py's matter.

Calls are made on the event loop and not with docker-py's client: its thread, its connection and its layers took
a quarter of the time of server and agent for a step (docs/decisions/0006).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from agent_core.runtimes import _docker_forgotten as forgotten
from agent_core.runtimes import _docker_streams as streams
from agent_core.runtimes import _docker_wire as wire
from agent_core.runtimes._docker_exits import ACTIONS, Exits
from agent_core.runtimes._docker_http import EngineHttp
from agent_core.runtimes._docker_images import DockerImages
from agent_core.runtimes._docker_wire import Json
from agent_core.runtimes._netfilter import guard_bridge
from agent_core.runtimes.base import (
    ContainerInfo,
    ContainerSpec,
    EngineEvent,
    EngineInfo,
    ExecInfo,
    Exit,
    ImageInfo,
    NetworkGuard,
    PullProgress,
    StreamName,
)
from outrider.errors import Conflict, NotFound, OutriderError, PolicyViolation, TemporaryError

DEFAULT_SOCKET = "/var/run/docker.sock"
_CALL_TIMEOUT_S = 60.0
_FORGOTTEN_TRIES, _FORGOTTEN_S = 50, 0.1
_INIT_PATH = "/usr/local/bin:/usr/bin:/usr/local/libexec/docker:/usr/libexec/docker"
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")

log = logging.getLogger(__name__)


class DockerRuntime:
    """The `Runtime` of one engine at a Unix socket."""

    def __init__(self, socket_path: str = DEFAULT_SOCKET, *, call_timeout_s: float = _CALL_TIMEOUT_S) -> None:
        self._socket = socket_path.removeprefix("unix://")
        self._timeout_s = call_timeout_s
        self._http = EngineHttp(self._socket, timeout_s=call_timeout_s)
        # The engine looks for it in its own path, and does not say whether it found it.
        self._has_init = shutil.which("docker-init", path=f"{os.environ.get('PATH', '')}:{_INIT_PATH}") is not None
        self._exits = Exits(self._events, self.inspect, self._boot, self._alive)
        self._images = DockerImages(self._http)
        self._network_lock = asyncio.Lock()

    # -- the engine

    async def info(self) -> EngineInfo:
        answer = await self._info()
        self._exits.engine_answers()
        return EngineInfo(
            name="docker",
            version=str(answer.get("ServerVersion", "")),
            id=str(answer.get("ID", "")),
            boot=await self._boot_identity(),
            root=str(answer.get("DockerRootDir", "")),
            storage_driver=str(answer.get("Driver", "")),
            oci_runtimes=tuple(answer.get("Runtimes") or ()),
        )

    async def find_image(self, image: str) -> ImageInfo:
        return await self._images.find(image)

    async def pull_image(self, image: str, *, on_progress: PullProgress | None = None) -> ImageInfo:
        return await self._images.pull(image, on_progress)

    async def tag_image(self, image_id: str, name: str, tag: str) -> None:
        await self._images.tag(image_id, name, tag)

    async def ensure_network(self, name: str, *, labels: Mapping[str, str]) -> None:
        doing = "make the network"
        async with self._network_lock:  # the engine allows two networks of one name
            with contextlib.suppress(NotFound):
                await self._http.call("GET", f"/networks/{quote(name)}", doing=doing, subject=name)
                return
            body = {
                "Name": name,
                "Driver": "bridge",
                "Options": {"com.docker.network.bridge.enable_icc": "false"},
                "CheckDuplicate": True,
                "Labels": dict(labels),
            }
            await self._http.call("POST", "/networks/create", doing=doing, subject=name, body=body)

    async def guard_network(self, name: str, guard: NetworkGuard) -> None:
        answer = await self._http.call("GET", f"/networks/{quote(name)}", doing="look at the network", subject=name)
        network_id = str(answer["Id"])
        bridge = (answer.get("Options") or {}).get("com.docker.network.bridge.name") or f"br-{network_id[:12]}"
        if answer.get("Driver") != "bridge":
            raise PolicyViolation(
                f"what containers of the network {name} reach can't be filtered: it is no bridge of this machine",
                code="network_unguarded",
                hint="say `guard: false` for its class in the policy file, if something else guards it",
            )
        await guard_bridge(network_id, bridge, guard)

    async def ensure_private_network(self, name: str, *, labels: Mapping[str, str], subnets: Sequence[str]) -> None:
        doing = "make the network"
        async with self._network_lock:
            with contextlib.suppress(NotFound):
                await self._http.call("GET", f"/networks/{quote(name)}", doing=doing, subject=name)
                return
            for subnet in subnets:
                body = {
                    "Name": name,
                    "Driver": "bridge",
                    "Internal": True,
                    # Linux allows an interface's name 15 characters; packet filters know these by their beginning.
                    "Options": {"com.docker.network.bridge.name": name[:15]},
                    "IPAM": {"Driver": "default", "Config": [{"Subnet": subnet}]},
                    "CheckDuplicate": True,
                    "Labels": dict(labels),
                }
                try:
                    await self._http.call("POST", "/networks/create", doing=doing, subject=name, body=body)
                except Conflict as error:
                    if error.code != "subnet_taken":
                        raise
                    continue
                return
        raise TemporaryError(
            f"no addresses are free for the network {name}",
            code="subnets_exhausted",
            hint="widen `managed.private_subnets` in the node's policy",
        )

    async def connect(self, network: str, container: str, *, aliases: Sequence[str]) -> None:
        body = {"Container": container, "EndpointConfig": {"Aliases": list(aliases)}}
        path = f"/networks/{quote(network)}/connect"
        try:
            await self._http.call("POST", path, doing="connect", subject=container, body=body)
        except OutriderError as error:
            if "already exists in network" not in error.message:
                raise

    async def remove_network(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            await self._http.call("DELETE", f"/networks/{quote(name)}", doing="remove the network", subject=name)

    async def list_networks(self, *, labels: Mapping[str, str]) -> list[str]:
        wanted = [f"{name}={value}" if value else name for name, value in labels.items()]
        parameters = {"filters": {"label": wanted}}
        items: list[Json] = await self._http.call(
            "GET", "/networks", doing="list", subject="networks", parameters=parameters
        )
        return [str(item["Name"]) for item in items]

    # -- containers

    async def create(self, spec: ContainerSpec) -> str:
        self._exits.start()
        body = wire.create_body(spec, has_init=self._has_init)
        answer = await self._http.call(
            "POST", "/containers/create", doing="create", subject=spec.name, parameters={"name": spec.name}, body=body
        )
        container = str(answer["Id"])
        self._exits.created(container)
        return container

    async def start(self, container: str) -> None:
        patience = _FORGOTTEN_TRIES
        while True:
            try:
                await self._do("start", container)
                return
            except Conflict as error:
                if error.code != "start_forgotten" or not patience:
                    raise
            if patience == _FORGOTTEN_TRIES:
                await self.end_forgotten((await self.inspect(container)).id)
            patience -= 1
            await asyncio.sleep(_FORGOTTEN_S)  # the container runtime clears away behind it by and by

    async def forgotten(self, container: str, *, boot: str = "") -> bool:
        if forgotten.processes(container):
            return True
        if boot and boot == await self._boot_identity():
            return False
        root = Path(str((await self._info()).get("DockerRootDir", "")))
        return await asyncio.to_thread(forgotten.has_begun, container, root)

    async def end_forgotten(self, container: str) -> None:
        await asyncio.to_thread(forgotten.end, container)

    async def stop(self, container: str, *, grace_s: float) -> None:
        await self._do("stop", container, within_s=grace_s, t=math.ceil(grace_s))

    async def restart(self, container: str, *, grace_s: float) -> None:
        await self._do("restart", container, within_s=grace_s, t=math.ceil(grace_s))

    async def kill(self, container: str, *, signal: str = "SIGKILL") -> None:
        await self._do("kill", container, signal=signal)

    async def remove(self, container: str, *, force: bool = False) -> None:
        # With its anonymous volumes: an image that declares some gets them, and nobody else knows them.
        parameters = {"v": 1, "force": int(force)}
        try:
            await self._http.call(
                "DELETE", f"/containers/{_path(container)}", doing="remove", subject=container, parameters=parameters
            )
        except NotFound:
            return
        except Conflict as error:
            if "already in progress" not in error.message:
                raise
        if force and forgotten.processes(container):
            await self.end_forgotten(container)

    async def rename(self, container: str, name: str) -> None:
        await self._do("rename", container, name=name)

    async def inspect(self, container: str) -> ContainerInfo:
        answer = await self._http.call(
            "GET", f"/containers/{_path(container)}/json", doing="inspect", subject=container
        )
        return wire.info_from_inspect(answer)

    async def list(self, *, labels: Mapping[str, str] | None = None, all: bool = True) -> list[ContainerInfo]:
        wanted = [f"{name}={value}" if value else name for name, value in (labels or {}).items()]
        parameters = {"all": int(all), "filters": {"label": wanted} if wanted else {}}
        items: list[Json] = await self._http.call(
            "GET", "/containers/json", doing="list", subject="containers", parameters=parameters
        )
        return [wire.info_from_list(item) for item in items]

    # -- output and ends

    @contextlib.asynccontextmanager
    async def attach(self, container: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        target = f"{await self._http.prefix()}/containers/{container}/attach?stream=1&stdout=1&stderr=1"
        try:
            async with streams.hijack(self._socket, target, self._timeout_s) as output:
                yield output
        except streams.HijackRefused as error:
            raise wire.translate_answer(error.status, error.message, "attach to", container) from error
        except (ConnectionError, FileNotFoundError) as error:
            raise wire.unavailable(self._http.url, error) from error

    async def logs(
        self, container: str, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        info = await self.inspect(container)
        config: Any = info.raw.get("Config")
        parameters = {
            "stdout": 1,
            "stderr": 1,
            "follow": int(follow),
            "tail": "all" if tail is None else tail,
        }
        if since is not None:
            parameters["since"] = wire.since(since)
        async with (
            self._http.stream(
                "GET", f"/containers/{info.id}/logs", parameters, f"read the log of {info.name}"
            ) as response,
            contextlib.aclosing(streams.output(response, raw=bool(config and config.get("Tty")))) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def exec_create(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Mapping[str, str] = MappingProxyType({}),
        workdir: str | None = None,
        user: str | None = None,
    ) -> str:
        body: Json = {
            "AttachStdout": True,
            "AttachStderr": True,
            "Cmd": list(args),
            "Env": [f"{name}={value}" for name, value in env.items()],
            "Privileged": False,
        }
        if workdir is not None:
            body["WorkingDir"] = workdir
        if user is not None:
            body["User"] = user
        path = f"/containers/{_path(container)}/exec"
        answer = await self._http.call("POST", path, doing="run a program in", subject=container, body=body)
        return str(answer["Id"])

    @contextlib.asynccontextmanager
    async def exec_start(self, execution: str) -> AsyncIterator[AsyncIterator[tuple[StreamName, bytes]]]:
        target = f"{await self._http.prefix()}/exec/{execution}/start"
        body = {"Detach": False, "Tty": False}
        try:
            async with streams.hijack(self._socket, target, self._timeout_s, body) as output:
                yield output
        except streams.HijackRefused as error:
            raise wire.translate_answer(error.status, error.message, "run a program in", execution[:12]) from error
        except (ConnectionError, FileNotFoundError) as error:
            raise wire.unavailable(self._http.url, error) from error

    async def exec_inspect(self, execution: str) -> ExecInfo:
        answer = await self._http.call("GET", f"/exec/{_path(execution)}/json", doing="look at", subject=execution[:12])
        code = answer.get("ExitCode")
        return ExecInfo(
            container_id=str(answer.get("ContainerID", "")),
            running=bool(answer.get("Running")),
            exit_code=None if code is None else int(code),
            pid=int(answer.get("Pid") or 0),
        )

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        if not _CONTAINER_ID.fullmatch(container):
            container = (await self.inspect(container)).id
        return await self._exits.wait(container, boot)

    def events(self) -> AsyncGenerator[EngineEvent, None]:
        return self._exits.events()

    async def aclose(self) -> None:
        await self._exits.aclose()
        await self._images.aclose()
        await self._http.aclose()

    # -- inside

    async def _do(self, doing: str, container: str, *, within_s: float = 0.0, **parameters: object) -> None:
        path = f"/containers/{_path(container)}/{doing}"
        await self._http.call("POST", path, doing=doing, subject=container, parameters=parameters, within_s=within_s)

    async def _info(self) -> Json:
        answer: Json = await self._http.call("GET", "/info", doing="ask about itself", subject="")
        return answer

    async def _events(self) -> AsyncGenerator[Json, None]:
        # A new engine may speak another version.
        self._http.forget_version()
        filters = {"type": ["container"], "event": list(ACTIONS)}
        async with self._http.stream("GET", "/events", {"filters": filters}, "read events") as response:
            yield {}
            async with contextlib.aclosing(streams.json_lines(response)) as items:
                async for item in items:
                    yield item

    async def _boot(self) -> tuple[str, bool]:
        answer = await self._info()
        return await self._boot_identity(), bool(answer.get("LiveRestoreEnabled"))

    async def _alive(self) -> bool:
        return await streams.answers(self._socket)

    async def _boot_identity(self) -> str:
        try:
            return await asyncio.to_thread(streams.boot_identity, self._socket)
        except OSError as error:
            raise wire.unavailable(self._http.url, error) from error


def _path(container: str) -> str:
    """A container's name or id as part of a path, where ".." would lead to other things than containers."""
    if not _CONTAINER_NAME.fullmatch(container):
        raise NotFound(f"there is no container {container[:255]} on this node", code="container_not_found")
    return container

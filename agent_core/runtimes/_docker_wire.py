"""What the Docker driver says and hears: create bodies, descriptions, and the engine's errors in our words.

Source for the fields: the Docker Engine API, version 1.41 and later.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from agent_core.runtimes.base import LABEL_IMAGE, ContainerInfo, ContainerSpec, Mount, PortBinding, secrets_in
from outrider.errors import (
    Conflict,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    OutriderError,
    PermanentError,
    TemporaryError,
)

# JSON of the engine: objects of any shape, checked where they are read.
Json = dict[str, Any]

_STATES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")
_TASK_THERE = re.compile(r"\btask \w+: already exists")
_PORT = re.compile(r"(?:0\.0\.0\.0|[\d.]+|\[[^\]]*\]):(\d{1,5})\b")
_EXIT_CODE = re.compile(r"Exited \((\d+)\)")
# How Go's network library, TLS and the engine's registry client say that another try may do.
_REGISTRY_BUSY = (
    "connection refused",
    "connection reset",
    "broken pipe",
    "i/o timeout",
    "timeout exceeded",
    "handshake timeout",
    "awaiting headers",
    "deadline exceeded",
    "network is unreachable",
    "no route to host",
    "temporary failure in name resolution",
    "server misbehaving",
    "toomanyrequests",
    "too many requests",
    "unexpected eof",
)
_HTTP_5XX = re.compile(r"(?:http status|status code|status from [^:]*request)[^0-9]{0,40}5\d\d\b|: eof$")
_EPOCH = datetime.fromtimestamp(0, UTC)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)$")


def create_body(spec: ContainerSpec, *, has_init: bool = False) -> Json:
    """The body of a create call. The sandbox is here: what is not asked for by name is off.

    ``has_init``: the engine has its init program; without one it would refuse to start the container.
    """
    host: Json = {
        "Privileged": False,
        "CapDrop": ["ALL"],
        "CapAdd": list(spec.cap_add),
        "SecurityOpt": ["no-new-privileges"],
        "ReadonlyRootfs": spec.read_only_root,
        # Mounts, not Binds: a source that is not there is refused, where Binds would make it, as root. A fenced
        # attempt (its directory renamed) depends on that.
        "Mounts": [
            {
                "Type": "bind",
                "Source": mount.source,
                "Target": mount.target,
                "ReadOnly": not mount.writable,
                "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
            }
            for mount in spec.mounts
        ],
        "NetworkMode": spec.network,
        "IpcMode": "private",
        "CgroupnsMode": "private",  # on cgroup v1 the engine's own default is the host's
        "Init": spec.init and has_init,
        "GroupAdd": [str(group) for group in spec.groups],
        "Devices": [
            {"PathOnHost": each.host, "PathInContainer": each.container, "CgroupPermissions": each.permissions}
            for each in spec.devices
        ],
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "RestartPolicy": {
            "Name": spec.restart_policy,
            "MaximumRetryCount": spec.restart_max if spec.restart_policy == "on-failure" else 0,
        },
        "LogConfig": {
            "Type": "local",
            "Config": {
                "max-size": str(spec.log_max_bytes),
                "max-file": str(spec.log_files),
                # The engine refuses compression for a single file.
                "compress": "true" if spec.log_files > 1 else "false",
            },
        },
    }
    if spec.oci_runtime:
        host["Runtime"] = spec.oci_runtime
    if spec.tmp_size_bytes:
        host["Tmpfs"] = {"/tmp": f"rw,nosuid,nodev,noexec,mode=1777,size={spec.tmp_size_bytes}"}  # noqa: S108
    if spec.memory_bytes is not None:
        host["Memory"] = spec.memory_bytes
        host["MemorySwap"] = spec.memory_bytes  # memory and swap together: no swap
    if spec.cpus is not None:
        host["NanoCpus"] = int(spec.cpus * 1_000_000_000)
    if spec.pids is not None:
        host["PidsLimit"] = spec.pids
    body: Json = {
        "Image": spec.image_id or spec.image,
        "Env": [f"{name}={value}" for name, value in spec.env.items()],
        "Labels": {**spec.labels, **({LABEL_IMAGE: spec.image} if spec.image_id else {})},
        "Tty": False,
        "OpenStdin": False,
        "HostConfig": host,
    }
    if spec.args or spec.entrypoint is not None:
        body["Cmd"] = list(spec.args)
    if spec.entrypoint is not None:
        body["Entrypoint"] = list(spec.entrypoint)
    if spec.user is not None:
        body["User"] = spec.user
    if spec.workdir is not None:
        body["WorkingDir"] = spec.workdir
    if spec.stop_signal is not None:
        body["StopSignal"] = spec.stop_signal
    if spec.aliases:
        body["NetworkingConfig"] = {"EndpointsConfig": {spec.network: {"Aliases": list(spec.aliases)}}}
    if spec.ports:
        bindings: dict[str, list[dict[str, str]]] = {}
        for port in spec.ports:
            key = f"{port.container}/{port.protocol}"
            bindings.setdefault(key, []).append({"HostIp": port.host_ip, "HostPort": str(port.host)})
        body["ExposedPorts"] = {key: {} for key in bindings}
        host["PortBindings"] = bindings
    return body


def info_from_inspect(answer: Json) -> ContainerInfo:
    """A container as inspect tells it. Values of its environment are left out of ``raw``."""
    state: Json = answer["State"]
    config: Json = answer["Config"]
    host: Json = answer.get("HostConfig") or {}
    network: Json = answer.get("NetworkSettings") or {}
    status = _state(state.get("Status", ""))
    ended = status in ("exited", "dead")
    env = dict(item.split("=", 1) for item in config.get("Env") or () if "=" in item)
    raw = {**answer, "Config": {**config, "Env": list(env)}}
    return ContainerInfo(
        id=answer["Id"],
        name=answer["Name"].removeprefix("/"),
        image=(config.get("Labels") or {}).get(LABEL_IMAGE) or config["Image"],
        state=status,
        labels=dict(config.get("Labels") or {}),
        exit_code=int(state["ExitCode"]) if ended or status == "restarting" else None,
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        created_at=moment(answer.get("Created")),
        started_at=moment(state.get("StartedAt")),
        finished_at=moment(state.get("FinishedAt")),
        ports=_bindings(host.get("PortBindings") or {}),
        mounts=tuple(
            Mount(mount.get("Source", ""), mount.get("Destination", ""), bool(mount.get("RW")))
            for mount in answer.get("Mounts") or ()
        ),
        restart_policy=(host.get("RestartPolicy") or {}).get("Name", ""),
        restart_count=int(answer.get("RestartCount") or 0),
        health=(state.get("Health") or {}).get("Status", ""),
        ip_address=_address(network),
        raw=raw,
        secrets=secrets_in(env, config.get("Labels") or {}),
    )


def info_from_list(item: Json) -> ContainerInfo:
    """A container as a list tells it: less than inspect, one call for all."""
    ports: dict[tuple[int, str], PortBinding] = {}
    for port in item.get("Ports") or ():
        if port.get("PublicPort"):
            # Listed once for IPv4 and once for IPv6.
            ports.setdefault(
                (port["PublicPort"], port["Type"]),
                PortBinding(port["PrivatePort"], port["PublicPort"], _protocol(port["Type"]), port.get("IP", "")),
            )
    code = _EXIT_CODE.match(item.get("Status") or "")
    names = item.get("Names") or [item["Id"][:12]]
    return ContainerInfo(
        id=item["Id"],
        name=names[0].removeprefix("/"),
        image=(item.get("Labels") or {}).get(LABEL_IMAGE) or item["Image"],
        state=_state(item.get("State", "")),
        labels=dict(item.get("Labels") or {}),
        exit_code=int(code[1]) if code else None,
        created_at=datetime.fromtimestamp(item["Created"], UTC),
        ports=tuple(ports.values()),
        mounts=tuple(
            Mount(mount.get("Source", ""), mount.get("Destination", ""), bool(mount.get("RW")))
            for mount in item.get("Mounts") or ()
        ),
        ip_address=_address(item.get("NetworkSettings") or {}),
    )


def moment(text: str | None) -> datetime | None:
    """RFC 3339 with nanoseconds; the engine's zero time means never."""
    match = _TIME.match(text or "")
    if match is None or match[1].startswith("0001-"):
        return None
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(f"{match[1]}{(match[2] or '.0')[:7].ljust(7, '0')}{zone}")


def since(moment: datetime) -> str:
    """A moment as the logs' parameter ``since`` has it: seconds of the epoch, and their fraction."""
    seconds, fraction = divmod(moment - _EPOCH, timedelta(seconds=1))
    return f"{seconds}.{fraction.microseconds:06d}"


def unavailable(url: str, error: object) -> EngineUnavailable:
    """The engine can't be reached at all."""
    reason = _innermost(error)
    return EngineUnavailable(
        f"the container engine at {url} can't be reached: {reason}",
        hint="run the agent as root"
        if reason == os.strerror(errno.EACCES)
        else "start it; the agent goes on by itself once it answers",
    )


def image_not_found(image: str, tried: str = "") -> NotFound:
    """No such image, neither here nor where it was looked for."""
    return NotFound(
        f"the image {image} is not on this node{f' and could not be pulled: {tried}' if tried else ''}",
        code="image_not_found",
        hint="check its name and tag, load it on the node, or see that its registry can be reached",
    )


def pull_failed(image: str, reason: str) -> OutriderError:
    """Why a pull failed, by the engine's sentence, which is all that it gives."""
    lower = reason.lower()
    if any(words in lower for words in _REGISTRY_BUSY) or _HTTP_5XX.search(lower):
        return TemporaryError(
            f"the image {image} can't be pulled now: {reason}",
            code="registry_unavailable",
            hint="see that its registry can be reached, or load the image on the node",
        )
    if "no space left on device" in lower:
        return TemporaryError(f"the node's disk is full: pull {image}", code="disk_full", hint="free some space")
    return image_not_found(image, reason)


def translate_answer(status: int, message: str, doing: str, subject: str) -> OutriderError:
    lower = message.lower()
    if "port is already allocated" in lower or "address already in use" in lower:
        port = _PORT.search(message)
        return Conflict(
            f"port {port[1] if port else '?'} is taken on this node, so {subject} can't be started",
            code="port_taken",
            hint="stop what uses it, or choose another port",
        )
    if "id already in use" in lower or _TASK_THERE.search(lower):
        return Conflict(f"the container engine forgot that it had started {subject}", code="start_forgotten")
    if "no space left on device" in lower:
        return TemporaryError(f"the node's disk is full: {doing} {subject}", code="disk_full", hint="free some space")
    if "cannot join network of a non running container" in lower or "joining network namespace" in lower:
        return TemporaryError(f"the network namespace of {subject} is gone", code="namespace_gone")
    missing_program = "executable file" in lower and "not found" in lower  # in between, some runtimes name it
    if missing_program or "exec format error" in lower or "permission denied: unknown" in lower:
        return PermanentError(f"{subject} can't be started: {_plain(message)}", code="cannot_start")
    if "bind source path does not exist" in lower:
        return PermanentError(f"{subject} can't be started: {_plain(message)}", code="mount_missing")
    if status == 404 and "no such image" in lower:
        return image_not_found(subject if doing == "find the image" else _image_in(message, subject))
    if status == 404 and "no such exec instance" in lower:
        return NotFound(f"the container engine does not know the execution {subject} any more", code="exec_not_found")
    if status == 404 and "network" in lower:
        return NotFound(f"the engine's network that {subject} needs is gone: {message}", code="network_not_found")
    if status == 404:
        return NotFound(f"there is no container {subject} on this node", code="container_not_found")
    if status == 409 and "exec" in lower and "already" in lower:
        return Conflict(f"the execution {subject} was started before", code="exec_started")
    if "pool overlaps" in lower or "invalid pool request" in lower:
        return Conflict(f"{subject}: its addresses are used by another network", code="subnet_taken")
    if status == 409 and "is already in use by container" in lower:
        return Conflict(f"there is a container named {subject} on this node already", code="name_taken")
    if status == 409 and "marked for removal" in lower:
        return Conflict(f"{subject} is being removed", code="being_removed")
    if status == 409:
        return Conflict(f"{doing} {subject}: {_plain(message)}", code="container_busy")
    if status == 400:
        return InvalidInput(f"the container engine refuses to {doing} {subject}: {_plain(message)}")
    if status == 503:
        return EngineUnavailable(f"the container engine is not ready: {message}")
    if "oci runtime" in lower or "failed to create shim" in lower:
        return PermanentError(f"{subject} can't be started: {_plain(message)}", code="cannot_start")
    return TemporaryError(f"the container engine failed to {doing} {subject}: {_plain(message)}", code="engine_error")


def _plain(message: str) -> str:
    """Without the chain of components that each said it again."""
    return message.strip().removesuffix(": unknown").rpartition("caused: ")[2]


def _image_in(message: str, fallback: str) -> str:
    match = re.search(r"[Nn]o such image: (\S+)", message)
    return match[1] if match else fallback


def _innermost(error: object) -> str:
    seen: set[int] = set()
    current = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.strerror:
            return current.strerror
        inner = next((arg for arg in current.args if isinstance(arg, BaseException)), None)
        current = inner or current.__cause__ or current.__context__
    return str(error)


def _state(text: str) -> Any:
    return text if text in _STATES else "dead"


def _protocol(text: str) -> Literal["tcp", "udp"]:
    return cast("Literal['tcp', 'udp']", text) if text in ("tcp", "udp") else "tcp"


def _bindings(bindings: Mapping[str, Any]) -> tuple[PortBinding, ...]:
    found = []
    for key, hosts in bindings.items():
        number, _, protocol = key.partition("/")
        for host in hosts or ():
            if str(host.get("HostPort") or "").isdigit():
                found.append(
                    PortBinding(int(number), int(host["HostPort"]), _protocol(protocol), host.get("HostIp") or "")
                )
    return tuple(found)


def _address(network: Json) -> str:
    for endpoint in (network.get("Networks") or {}).values():
        if endpoint.get("IPAddress"):
            return str(endpoint["IPAddress"])
    return ""

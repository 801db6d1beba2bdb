"""What a managed container is asked to be, as the control socket takes it, and what it is made from.

The model is strict; values that exist only on the node (leased ports) are written ``$(ports.<name>)`` in the
environment, the arguments and the entrypoint, ``$$(`` for a literal ``$(``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from agent_core.policy import INTERFACE_NAME, NodePolicy
from agent_core.ports import PortWish, Protocols
from agent_core.probes import Liveness, PortName, Readiness
from agent_core.runtimes.base import LABEL_PREFIX, Device, Mount
from outrider._model_errors import problems_of
from outrider.errors import InvalidInput, PolicyViolation
from outrider.steps import Resources

PortNumber = Annotated[int, Field(ge=1, le=65535)]

RestartPolicyName = Literal["no", "on-failure", "unless-stopped", "always"]
Replace = Literal["no", "stop-first", "start-first"]

MAX_FILE_BYTES = 256 * 1024
"""Of all files of a container together."""
NEXT, PREVIOUS = ".next", ".prev"
"""What a container is called that is to take another's place, and the one that is to leave it, meanwhile."""

_PLACEHOLDER = re.compile(r"\$\$\(|\$\(([^()]*)\)")
_RESERVED_TARGETS = ("/proc", "/sys", "/dev", "/outrider")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManagedPort(_Model):
    """A port to publish. ``container`` left out: the same number as the leased host port. ``host`` asks for one,
    ``range`` for one of those. ``protocol``: "tcp+udp" is the same number for both. ``interface``: one of the node's
    policy; ``None``: where its ports are by default."""

    name: PortName
    container: PortNumber | None = None
    protocol: Protocols = "tcp"
    host: PortNumber | None = None
    range: tuple[PortNumber, PortNumber] | None = None
    interface: Annotated[str, StringConstraints(pattern=INTERFACE_NAME)] | None = None

    @model_validator(mode="after")
    def _either(self) -> ManagedPort:
        if self.host is not None and self.range is not None:
            raise ValueError("give host or range, not both")
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range: {self.range[0]} is more than {self.range[1]}")
        return self

    @property
    def wish(self) -> PortWish:
        """What to lease for it."""
        return PortWish(self.name, self.protocol, self.host, self.range, self.interface)


class Restart(_Model):
    """What follows a container's end, and a failed liveness.

    The engine restarts what ended by itself, also while the agent is away: 100 ms later, twice as much each time, a
    minute at most. The agent restarts what is not alive any more: at once, then after ``first_wait_s``, twice as much
    each time up to ``longest_wait_s``, from the beginning once it has worked for ``calm_s``. ``max``: so often at most
    (0: no limit); of ends only with "on-failure".
    """

    policy: RestartPolicyName = "unless-stopped"
    max: Annotated[int, Field(ge=0, le=1000)] = 0
    first_wait_s: Annotated[float, Field(ge=0.1, le=3600)] = 1.0
    longest_wait_s: Annotated[float, Field(ge=0.1, le=3600)] = 300.0
    calm_s: Annotated[float, Field(ge=1, le=86400)] = 600.0


class FileSpec(_Model):
    """A file of the container, made by the agent and read-only there: ``text``, with ``$(ports.NAME)`` replaced."""

    text: Annotated[str, StringConstraints(max_length=MAX_FILE_BYTES)]
    executable: bool = False


class ManagedSpec(_Model):
    """A managed container. Its volumes are names of volumes of the step: ``"/path"`` or ``"/path:rw"``.

    ``private_network``: it is on the network of its object (or run) as well, where the containers of that find one
    another by name and by ``aliases``. ``devices``: ``/dev/x``, ``/dev/x:/dev/y`` or ``/dev/x:/dev/y:r``.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$")]
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    args: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    workdir: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    ports: tuple[ManagedPort, ...] = ()
    volumes: dict[str, str] = Field(default_factory=dict)
    ready: Readiness | None = None
    live: Liveness | None = None
    restart: Restart = Restart()
    resources: Resources = Resources()
    stop_signal: Annotated[str, StringConstraints(pattern=r"^(SIG)?[A-Z0-9+]{1,12}$")] | None = None
    stop_grace_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    network: str = "egress"  # a class of the node's policy, "none", or "host"
    init: bool = False
    writable_root: bool = False
    user: str | None = None
    capabilities: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    tmp_size_bytes: Annotated[int, Field(ge=0)] = 64 * 1024**2
    files: dict[str, FileSpec] = Field(default_factory=dict)
    labels: dict[str, Annotated[str, StringConstraints(max_length=4096)]] = Field(default_factory=dict, max_length=64)
    private_network: bool = False
    aliases: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")], ...] = ()

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name.endswith((NEXT, PREVIOUS)):
            raise ValueError(f"names that end with {NEXT} or {PREVIOUS} are the agent's own, for a replacement")
        return name

    @field_validator("restart", mode="before")
    @classmethod
    def _restart(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @field_validator("devices")
    @classmethod
    def _devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        for device in devices:
            device_of(device)
        return devices

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for name in labels:
            if name.startswith(LABEL_PREFIX):
                raise ValueError(f"{name!r}: labels that begin with {LABEL_PREFIX} are the agent's own")
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?", name):
                raise ValueError(f"{name!r} is not the name of a label; it reads like team or example.com/team")
        return labels

    @field_validator("ports")
    @classmethod
    def _distinct(cls, ports: tuple[ManagedPort, ...]) -> tuple[ManagedPort, ...]:
        names = [port.name for port in ports]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are two ports named {name!r}")
        return ports

    @field_validator("env")
    @classmethod
    def _env(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is not the name of an environment variable")
        return env

    @model_validator(mode="after")
    def _references(self) -> ManagedSpec:
        names = {port.name for port in self.ports}
        for what, probe in (("ready", self.ready), ("live", self.live)):
            if probe is not None and probe.port is not None and probe.port not in names:
                raise ValueError(f"{what}: there is no port named {probe.port!r}")
            if probe is not None and probe.port is not None and self._is_udp(probe.port):
                raise ValueError(f"{what}: port {probe.port} is udp alone, and can't be connected to; use exec or log")
        files = [each.text for each in self.files.values()]
        if sum(len(text.encode()) for text in files) > MAX_FILE_BYTES:
            raise ValueError(f"files: they are over {MAX_FILE_BYTES // 1024} KiB together")
        for text in (*self.env.values(), *self.args, *(self.entrypoint or ()), *files):
            for match in _PLACEHOLDER.finditer(text):
                reference = match[1]
                if reference is not None and reference.removeprefix("ports.") not in names:
                    raise ValueError(f"$({reference}): there is no such port; write $(ports.NAME), or $$( for $(")
        if self.ports and self.network == "none":
            raise ValueError("ports can't be published with network 'none'")
        if self.network == "host" and any(port.interface for port in self.ports):
            raise ValueError("with the host's network nothing is published: the program itself chooses the interface")
        if self.private_network and self.network == "host":
            raise ValueError("a container with the host's network can't be on a private one as well")
        if self.aliases and not self.private_network:
            raise ValueError("aliases are names on the private network: set private_network, too")
        return self

    def _is_udp(self, name: str) -> bool:
        return any(port.name == name and port.protocol == "udp" for port in self.ports)

    @classmethod
    def parse(cls, document: Any) -> ManagedSpec:
        """The model from JSON; InvalidInput lists every problem."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = list(problems_of(error, cls))
            raise InvalidInput(
                f"the container's specification is not valid: {'; '.join(map(str, problems))}", problems
            ) from error

    def wishes(self) -> list[PortWish]:
        """What to lease for it."""
        return [port.wish for port in self.ports]

    def numbers(self, leased: Mapping[str, int]) -> dict[str, int]:
        """What each port is at the container's own address, by name. ``leased``: the host ports."""
        host = self.network == "host"
        return {port.name: leased[port.name] if host else port.container or leased[port.name] for port in self.ports}


@dataclass(frozen=True, slots=True)
class GrantedVolume:
    """A volume as a step has it: where it is on the node, and whether the step may write."""

    host_path: str
    writable: bool
    group: int | None = None


@dataclass(frozen=True, slots=True)
class ContainerScope:
    """On whose behalf containers are managed: one attempt of a step. It reaches what its run or object owns."""

    run_id: str
    step: str
    attempt: int
    object_ref: str | None = None
    volumes: Mapping[str, GrantedVolume] = field(default_factory=dict)
    uid: int = 65534
    gid: int = 65534
    secrets: tuple[str, ...] = field(default=(), repr=False)  # values of the run; a container may be given some


def mounts_of(spec: ManagedSpec, scope: ContainerScope) -> tuple[Mount, ...]:
    """The bind mounts: never more than the step itself was allotted. PolicyViolation says what is."""
    mounts = []
    for name, text in sorted(spec.volumes.items()):
        target, _, mode = text.partition(":")
        granted = scope.volumes.get(name)
        if granted is None:
            raise PolicyViolation(
                f"the container {spec.name} asks for the volume {name}, which its step was not given",
                code="volume_not_allotted",
                hint=f"the step has: {', '.join(sorted(scope.volumes)) or 'none'}",
            )
        if mode not in ("", "ro", "rw") or not _clean(target):
            raise InvalidInput(f"volumes.{name}: {text!r} is not a mount", hint="an absolute path, with :rw to write")
        if mode == "rw" and not granted.writable:
            raise PolicyViolation(
                f"the container {spec.name} asks to write the volume {name}, which its step has read-only",
                code="volume_read_only",
                hint=f"give the step {name}: PATH:rw",
            )
        mounts.append(Mount(granted.host_path, target.rstrip("/"), writable=mode == "rw"))
    for mount in mounts:
        for other in mounts:
            # Inside of another volume, a link there would decide where it really is in the container.
            if other is not mount and f"{mount.target}/".startswith(f"{other.target}/"):
                raise InvalidInput(
                    f"the container {spec.name} has a volume at {mount.target} and one at {other.target}",
                    hint="mount them side by side",
                )
    for target in spec.files:
        if not _clean(target) or target.endswith("/"):
            raise InvalidInput(f"files: {target!r} is not a file's path", hint="an absolute path, such as /etc/x.cfg")
        others = [mount.target for mount in mounts] + [other for other in spec.files if other != target]
        if any(f"{target}/".startswith(f"{other}/") for other in others):
            raise InvalidInput(
                f"the container {spec.name} has a file at {target}, inside of a volume or of another file",
                code="file_in_volume",
                hint="put it elsewhere: a link in the volume would decide where it really is",
            )
        if any(f"{mount.target}/".startswith(f"{target}/") for mount in mounts):
            raise InvalidInput(f"the container {spec.name} has a file at {target}, where a volume is")
    return tuple(mounts)


def device_of(text: str) -> Device:
    """A device as it is written: ``/dev/x``, ``/dev/x:/dev/y``, ``/dev/x:/dev/y:rwm``. ValueError if it is none."""
    host, _, rest = text.partition(":")
    target, _, permissions = rest.partition(":")
    for path in (host, target or host):
        if not path.startswith("/dev/") or any(part in ("", ".", "..") for part in path[1:].split("/")):
            raise ValueError(f"{text!r} is not a device; it reads like /dev/dri/renderD128 or /dev/x:/dev/y:r")
    if not re.fullmatch(r"[rwm]{1,3}", permissions or "rw") or len(set(permissions)) != len(permissions):
        raise ValueError(f"{text!r}: {permissions!r} is not some of r, w and m")
    return Device(host, target or host, permissions or "rw")


def check_against_policy(spec: ManagedSpec, policy: NodePolicy) -> tuple[str, Resources]:
    """The engine's network and the limits of the container. PolicyViolation if the node must not run it."""
    policy.check_image(spec.image)
    policy.check_additions(
        capabilities=spec.capabilities,
        devices=tuple(device_of(each).host for each in spec.devices),
        host_network=spec.network == "host",
        writable_root=spec.writable_root,
        user=spec.user,
    )
    for port in spec.ports:
        policy.ports.address_of(port.interface)
    network = "host" if spec.network == "host" else policy.network_of(spec.network)
    return network, policy.limits_for(spec.resources)


def digest_of(spec: ManagedSpec, mounts: tuple[Mount, ...], user: str) -> str:
    """SHA-256 of all that makes the container what it is: the same digest means it need not be made again."""
    content = spec.model_dump(mode="json", exclude={"ready", "live"})
    # A container made by an agent of before has to be known again: what is new counts where it is used alone.
    content["restart"] = spec.restart.policy
    if spec.restart.max and spec.restart.policy == "on-failure":
        content["restart_max"] = spec.restart.max
    for name in ("files", "labels", "private_network", "aliases"):
        if not content[name]:
            del content[name]
    for port in content["ports"]:
        for name in ("range", "interface"):
            if port[name] is None:
                del port[name]
    document = {
        "spec": content,
        "mounts": [[mount.source, mount.target, mount.writable] for mount in mounts],
        "user": user,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def substitute(text: str, ports: Mapping[str, int]) -> str:
    """``text`` with each ``$(ports.<name>)`` replaced by the host port."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$("
        return str(ports[match[1].removeprefix("ports.")])

    return _PLACEHOLDER.sub(value, text)


def _clean(target: str) -> bool:
    if not target.startswith("/") or "\0" in target or target == "/":
        return False
    if any(part in ("", ".", "..") for part in target[1:].rstrip("/").split("/")):
        return False
    return not any(target == reserved or target.startswith(f"{reserved}/") for reserved in _RESERVED_TARGETS)

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

from agent_core.policy import NodePolicy
from agent_core.ports import PortWish
from agent_core.runtimes.base import Mount
from outrider.errors import InvalidInput, PolicyViolation, Problem
from outrider.steps import Resources

PortName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
PortNumber = Annotated[int, Field(ge=1, le=65535)]

_PLACEHOLDER = re.compile(r"\$\$\(|\$\(([^()]*)\)")
_RESERVED_TARGETS = ("/proc", "/sys", "/dev", "/outrider")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManagedPort(_Model):
    """A port to publish. ``container`` left out: the same number as the leased host port. ``host`` asks for one."""

    name: PortName
    container: PortNumber | None = None
    protocol: Literal["tcp", "udp"] = "tcp"
    host: PortNumber | None = None


class TcpReady(_Model):
    port: PortName


class HttpReady(_Model):
    port: PortName
    path: Annotated[str, StringConstraints(pattern=r"^/[^\s]*$")] = "/"
    status: Annotated[int, Field(ge=100, le=599)] | None = None  # None: any of 200 to 399


class Readiness(_Model):
    """When the container counts as started: exactly one of the three, within ``timeout_s`` seconds."""

    tcp: TcpReady | None = None
    http: HttpReady | None = None
    log: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0

    @model_validator(mode="after")
    def _one(self) -> Readiness:
        if sum(probe is not None for probe in (self.tcp, self.http, self.log)) != 1:
            raise ValueError("give exactly one of tcp, http, log")
        return self


class ManagedSpec(_Model):
    """A managed container. Its volumes are names of volumes of the step: ``"/path"`` or ``"/path:rw"``."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$")]
    image: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    args: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    workdir: str | None = None
    env: dict[str, str] = Field(default_factory=dict)
    ports: tuple[ManagedPort, ...] = ()
    volumes: dict[str, str] = Field(default_factory=dict)
    ready: Readiness | None = None
    restart: Literal["no", "on-failure", "unless-stopped", "always"] = "unless-stopped"
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
        probe = self.ready and (self.ready.tcp or self.ready.http)
        if probe and probe.port not in names:
            raise ValueError(f"ready: there is no port named {probe.port!r}")
        for text in (*self.env.values(), *self.args, *(self.entrypoint or ())):
            for match in _PLACEHOLDER.finditer(text):
                reference = match[1]
                if reference is not None and reference.removeprefix("ports.") not in names:
                    raise ValueError(f"$({reference}): there is no such port; write $(ports.NAME), or $$( for $(")
        if self.ports and self.network == "none":
            raise ValueError("ports can't be published with network 'none'")
        return self

    @classmethod
    def parse(cls, document: Any) -> ManagedSpec:
        """The model from JSON; InvalidInput lists every problem."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problems = [
                Problem(item["msg"].removeprefix("Value error, "), path=".".join(map(str, item["loc"])))
                for item in error.errors(include_url=False, include_input=False)
            ]
            raise InvalidInput(
                f"the container's specification is not valid: {'; '.join(map(str, problems))}", problems
            ) from error

    def wishes(self) -> list[PortWish]:
        """What to lease for it."""
        return [PortWish(port.name, port.protocol, port.host) for port in self.ports]


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
    return tuple(mounts)


def check_against_policy(spec: ManagedSpec, policy: NodePolicy) -> tuple[str, Resources]:
    """The engine's network and the limits of the container. PolicyViolation if the node must not run it."""
    policy.check_image(spec.image)
    policy.check_additions(
        capabilities=spec.capabilities,
        devices=spec.devices,
        host_network=spec.network == "host",
        writable_root=spec.writable_root,
        user=spec.user,
    )
    network = "host" if spec.network == "host" else policy.network_of(spec.network)
    return network, policy.limits_for(spec.resources)


def digest_of(spec: ManagedSpec, mounts: tuple[Mount, ...], user: str) -> str:
    """SHA-256 of all that makes the container what it is: the same digest means it need not be made again."""
    document = {
        "spec": spec.model_dump(mode="json", exclude={"ready"}),
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

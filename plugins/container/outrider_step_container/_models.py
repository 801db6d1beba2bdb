"""Parameters and outputs of the container steps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from outrider.steps import Resources, VolumeMounts

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(B|[KMGT]i?B?)?")
_SIZE_UNITS = {"": 1, "B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


def _seconds(value: Any) -> Any:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None and isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; it reads like 30s, 500ms or 2m")
    return float(match[1]) * _DURATION_UNITS[match[2]] if match else value


def _bytes(value: Any) -> Any:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None and isinstance(value, str):
        raise ValueError(f"{value!r} is not a size; it reads like 512MiB or 2GiB")
    if match is None:
        return value
    unit = match[2] or ""
    factor = 1024 ** ("KMGT".index(unit[0]) + 1) if "i" in unit else _SIZE_UNITS[unit.removesuffix("B") or unit]
    return int(float(match[1]) * factor)


Duration = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(gt=0, le=3600),
    WithJsonSchema(
        {
            "description": "seconds, or a text like 30s",
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
                {"type": "string", "pattern": f"^{_DURATION.pattern}$"},
            ],
        }
    ),
]
Size = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=0),
    WithJsonSchema(
        {
            "description": "bytes, or a text like 512MiB",
            "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_SIZE.pattern}$"}],
        }
    ),
]
ContainerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$")]
PortName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
Text = Annotated[str, WithJsonSchema({"type": "string", "x-outrider-placeholders": True})]  # with $(ports.NAME)
Image = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Port(_Model):
    """A port to publish. The host port is leased from the node's range."""

    name: PortName
    container: PortNumber | None = Field(
        default=None, description="the port inside the container; the leased host port's number if left out"
    )
    protocol: Literal["tcp", "udp"] = "tcp"
    host: PortNumber | None = Field(default=None, description="ask for this host port; any free one if left out")


class TcpProbe(_Model):
    port: PortName


def _probe(value: Any) -> Any:
    return {"port": value} if isinstance(value, str) else value


_PORT_NAME = {"type": "string", "pattern": r"^[a-z][a-z0-9_-]{0,31}$"}
ShortTcpProbe = Annotated[
    TcpProbe,
    BeforeValidator(_probe),
    # The server has the schema alone: what the validator takes has to stand in it, too.
    WithJsonSchema(
        {
            "anyOf": [
                _PORT_NAME,
                {
                    "type": "object",
                    "properties": {"port": _PORT_NAME},
                    "required": ["port"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class HttpProbe(_Model):
    port: PortName
    path: Annotated[str, StringConstraints(pattern=r"^/[^\s]*$")] = "/"
    status: Annotated[int, Field(ge=100, le=599)] | None = Field(
        default=None, description="the status that means ready; any from 200 to 399 if left out"
    )


class Ready(_Model):
    """When the container counts as started: exactly one of tcp, http, log."""

    tcp: ShortTcpProbe | None = Field(default=None, description="a connection to this port is accepted")
    http: HttpProbe | None = Field(default=None, description="a GET is answered")
    log: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="this text appears in its log"
    )
    timeout: Duration = 30.0

    @model_validator(mode="after")
    def _one(self) -> Ready:
        if sum(probe is not None for probe in (self.tcp, self.http, self.log)) != 1:
            raise ValueError("give exactly one of tcp, http, log")
        return self


class Limits(_Model):
    """Limits of the container; the node's defaults for what is left out."""

    memory: Size | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None
    pids: Annotated[int, Field(ge=1)] | None = None

    def as_resources(self) -> Resources:
        return Resources(memory_bytes=self.memory, cpus=self.cpus, pids=self.pids)


class StartParams(_Model):
    """A managed container. ``$(ports.NAME)`` in env, args and entrypoint becomes the leased host port."""

    name: ContainerName
    image: Image
    args: list[Text] = Field(default_factory=list)
    entrypoint: list[Text] | None = None
    workdir: str | None = None
    env: dict[EnvName, Text] = Field(
        default_factory=dict, description="rests in the engine's configuration for as long as the container exists"
    )
    env_from: list[EnvName] = Field(
        default_factory=list, description="envs of this step that the container gets too, values of secrets included"
    )
    ports: list[Port] = Field(default_factory=list)
    volumes: VolumeMounts = Field(default_factory=dict, description="volumes of this step: /path, or /path:rw")
    ready: Ready | None = None
    restart: Literal["no", "on-failure", "unless-stopped", "always"] = "unless-stopped"
    resources: Limits = Limits()
    stop_signal: Annotated[str, StringConstraints(pattern=r"^(SIG)?[A-Z0-9+]{1,12}$")] | None = None
    stop_grace: Duration = 10.0
    network: str = Field(default="egress", description="a network class of the node, none, or host")
    init: bool = Field(default=False, description="a small init as PID 1, for programs that handle no signals")
    writable_root: bool = False
    user: str | None = None
    capabilities: list[str] = Field(default_factory=list)
    devices: list[str] = Field(default_factory=list)
    tmp: Size = Field(default=64 * 1024**2, description="size of /tmp; 0: none")
    replace: bool = Field(
        default=False, description="stop and remove a container of this name made from another specification"
    )

    def as_request(self) -> dict[str, Any]:
        """The body of the start call; the values of ``env_from`` are added by the program, which has them."""
        request = self.model_dump(
            mode="json",
            include={
                "name", "image", "args", "entrypoint", "workdir", "env", "restart", "stop_signal", "network",
                "init", "writable_root", "user", "capabilities", "devices", "replace",
            },
        )  # fmt: skip
        request["ports"] = [port.model_dump(mode="json") for port in self.ports]
        request["volumes"] = dict(self.volumes)
        request["resources"] = self.resources.as_resources().model_dump(mode="json")
        request["stop_grace_s"] = self.stop_grace
        request["tmp_size_bytes"] = self.tmp
        if self.ready is not None:
            request["ready"] = {
                **self.ready.model_dump(mode="json", exclude={"timeout"}, exclude_none=True),
                "timeout_s": self.ready.timeout,
            }
        return request


class StartOutputs(_Model):
    id: str
    name: str
    image: str
    ports: dict[str, int] = Field(description="host port by name")
    address: str = Field(description="where the host ports are reached")
    adopted: bool = Field(default=False, description="it was there already, made from the same specification")


class StopParams(_Model):
    name: ContainerName
    grace: Duration | None = Field(default=None, description="between the stop signal and the kill; else its own")
    remove: bool = Field(default=False, description="remove it as well, and give its ports back")
    missing_ok: bool = Field(default=False, description="succeed if there is no such container")


class RestartParams(_Model):
    name: ContainerName
    grace: Duration | None = None


class StateOutputs(_Model):
    name: str
    state: str = Field(description="the engine's word, 'removed' or 'missing'")
    exit_code: int | None = None
    ports: dict[str, int] = Field(default_factory=dict)


class RunParams(_Model):
    """Any image, run to completion as this very step, in its sandbox and with its volumes."""

    image: Image
    args: list[str] = Field(default_factory=list)
    entrypoint: list[str] | None = None
    workdir: str | None = None
    env: dict[EnvName, str] = Field(default_factory=dict)
    network: str = "none"
    resources: Limits = Limits()
    user: str | None = None


class RunOutputs(BaseModel):
    """What the image appended to /outrider/outputs: any JSON objects, merged in order."""

    model_config = ConfigDict(extra="allow", frozen=True)

"""Parameters and outputs of the container steps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from outrider.steps import Resources, VolumeMounts, WritePath

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
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


def _duration_schema(most_s: int) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "description": "seconds, or a text like 30s",
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": most_s},
                {"type": "string", "pattern": f"^{_DURATION.pattern}$"},
            ],
        }
    )


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=3600), _duration_schema(3600)]
LongDuration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=86400), _duration_schema(86400)]
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


def _range(value: Any) -> Any:
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None and isinstance(value, str):
        raise ValueError(f"{value!r} is not a range of ports; it reads like 27010-27020")
    return (int(match[1]), int(match[2])) if match else value


PortRange = Annotated[
    tuple[PortNumber, PortNumber],
    BeforeValidator(_range),
    WithJsonSchema({"type": "string", "pattern": f"^{_RANGE.pattern}$", "description": "such as 27010-27020"}),
]


class Port(_Model):
    """A port to publish. The host port is leased from the node's range, and kept until the container is removed and
    the kernel has let go of it."""

    name: PortName
    container: PortNumber | None = Field(
        default=None, description="the port inside the container; the leased host port's number if left out"
    )
    protocol: Literal["tcp", "udp", "tcp+udp"] = Field(default="tcp", description="tcp+udp: one number for both")
    host: PortNumber | None = Field(default=None, description="ask for this host port; any free one if left out")
    range: PortRange | None = Field(default=None, description="ask for a host port of this part of the node's range")
    interface: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")] | None = Field(
        default=None, description="one that the node's policy has by this name; its usual one if left out"
    )

    @model_validator(mode="after")
    def _either(self) -> Port:
        if self.host is not None and self.range is not None:
            raise ValueError("give host or range, not both")
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range: {self.range[0]} is more than {self.range[1]}")
        return self


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


class ExecProbe(_Model):
    args: Annotated[list[str], Field(min_length=1, max_length=64)]


def _program(value: Any) -> Any:
    return {"args": value} if isinstance(value, list | tuple) else value


_ARGS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 64}
ShortExecProbe = Annotated[
    ExecProbe,
    BeforeValidator(_program),
    WithJsonSchema(
        {
            "anyOf": [
                _ARGS,
                {"type": "object", "properties": {"args": _ARGS}, "required": ["args"], "additionalProperties": False},
            ]
        }
    ),
]


class _Probe(_Model):
    tcp: ShortTcpProbe | None = Field(default=None, description="a connection to this port is accepted")
    http: HttpProbe | None = Field(default=None, description="a GET is answered")
    exec: ShortExecProbe | None = Field(
        default=None, description="a program that is run inside the container ends with exit code 0"
    )

    def _request(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"tcp", "http", "exec", "log"}, exclude_none=True)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self._request()) != 1:
            raise ValueError("give exactly one of tcp, http, exec, log")
        return self


class Ready(_Probe):
    """When the container counts as started: exactly one of tcp, http, exec, log."""

    log: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="this text appears in its log"
    )
    timeout: Duration = 30.0

    def as_request(self) -> dict[str, Any]:
        return {**self._request(), "timeout_s": self.timeout}


class Live(_Probe):
    """Whether the container still works, asked by the agent for as long as it is there: exactly one of tcp, http,
    exec, log. What does not is restarted as `restart` says."""

    log: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="this text in its log means that it is broken"
    )
    interval: Annotated[Duration, Field(ge=1)] = Field(default=10.0, description="between two questions")
    timeout: Annotated[Duration, Field(le=60)] = Field(default=5.0, description="for one answer")
    failures: Annotated[int, Field(ge=1, le=100)] = Field(default=3, description="so many in a row are one too many")
    grace: Duration = Field(default=30.0, description="after its start in which a failure does not count")

    def as_request(self) -> dict[str, Any]:
        return {
            **self._request(),
            "interval_s": self.interval,
            "timeout_s": self.timeout,
            "failures": self.failures,
            "grace_s": self.grace,
        }


RestartPolicy = Literal["no", "on-failure", "unless-stopped", "always"]


class Restart(_Model):
    """What follows when the container ends, or does not work any more.

    What ends is restarted by the engine, after 100 ms, then later and later, a minute at most. What is not live any
    more is restarted by the agent: at once, then after first_wait, twice as much each time up to longest_wait.
    """

    policy: RestartPolicy = "unless-stopped"
    max: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=0, description="so often at most (ends: with on-failure only); 0: no limit"
    )
    first_wait: Duration = 1.0
    longest_wait: Duration = 300.0
    calm: LongDuration = Field(default=600.0, description="once it has worked for so long, all begins anew")


def _restart(value: Any) -> Any:
    return {"policy": value} if isinstance(value, str) else value


ShortRestart = Annotated[
    Restart,
    BeforeValidator(_restart),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["no", "on-failure", "unless-stopped", "always"]},
                {
                    "type": "object",
                    "properties": {
                        "policy": {"enum": ["no", "on-failure", "unless-stopped", "always"]},
                        "max": {"type": "integer", "minimum": 0, "maximum": 1000},
                        **{name: {"type": ["string", "number"]} for name in ("first_wait", "longest_wait", "calm")},
                    },
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class File(_Model):
    """A file that the container gets, read-only: a text, or the value of an env of this step."""

    text: Text | None = Field(
        default=None, description="$(ports.NAME) becomes the host port, $(envs.NAME) the value of an env of this step"
    )
    env: EnvName | None = Field(default=None, description="the env of this step whose value it is")
    executable: bool = False

    @model_validator(mode="after")
    def _one(self) -> File:
        if (self.text is None) == (self.env is None):
            raise ValueError("give text or env")
        return self


def _file(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


ShortFile = Annotated[
    File,
    BeforeValidator(_file),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "x-outrider-placeholders": True},
                {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string", "x-outrider-placeholders": True},
                        "env": {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"},
                        "executable": {"type": "boolean"},
                    },
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
FilePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*[^/\x00]$", max_length=4096)]


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
    live: Live | None = Field(default=None, description="how the agent goes on to watch it; with what, restart says")
    restart: ShortRestart = Restart()
    resources: Limits = Limits()
    stop_signal: Annotated[str, StringConstraints(pattern=r"^(SIG)?[A-Z0-9+]{1,12}$")] | None = None
    stop_grace: Duration = 10.0
    network: str = Field(default="egress", description="a network class of the node, none, or host")
    init: bool = Field(default=False, description="a small init as PID 1, for programs that handle no signals")
    writable_root: bool = False
    user: str | None = None
    capabilities: list[str] = Field(default_factory=list)
    devices: list[str] = Field(default_factory=list, description="/dev/x, or /dev/x:/dev/y:r")
    files: dict[FilePath, ShortFile] = Field(
        default_factory=dict, description="files by their path in the container; they rest on the node's disk"
    )
    labels: dict[str, str] = Field(default_factory=dict, description="labels of the container in the engine")
    private_network: bool = Field(
        default=False, description="be on a network of this object (or run) as well, with its other containers"
    )
    aliases: list[str] = Field(default_factory=list, description="further names on that network")
    tmp: Size = Field(default=64 * 1024**2, description="size of /tmp; 0: none")
    replace: bool | Literal["no", "stop-first", "start-first"] = Field(
        default="no",
        description="what becomes of a container of this name made from another specification: no, an error; "
        "stop-first (or true), it is stopped and comes back if this one does not get ready; start-first, it runs on "
        "until this one is ready",
    )

    def as_request(self) -> dict[str, Any]:
        """The body of the start call; values of envs are added by the program, which has them."""
        request = self.model_dump(
            mode="json",
            include={
                "name", "image", "args", "entrypoint", "workdir", "env", "stop_signal", "network", "init",
                "writable_root", "user", "capabilities", "devices", "labels", "private_network", "aliases",
            },
        )  # fmt: skip
        chosen = self.replace
        request["replace"] = chosen if isinstance(chosen, str) else "stop-first" if chosen else "no"
        request["ports"] = [port.model_dump(mode="json", exclude_none=True) for port in self.ports]
        request["volumes"] = dict(self.volumes)
        request["resources"] = self.resources.as_resources().model_dump(mode="json")
        request["stop_grace_s"] = self.stop_grace
        request["tmp_size_bytes"] = self.tmp
        request["restart"] = {
            "policy": self.restart.policy,
            "max": self.restart.max,
            "first_wait_s": self.restart.first_wait,
            "longest_wait_s": self.restart.longest_wait,
            "calm_s": self.restart.calm,
        }
        if self.ready is not None:
            request["ready"] = self.ready.as_request()
        if self.live is not None:
            request["live"] = self.live.as_request()
        return request

    def as_inputs(self) -> dict[str, Any]:
        """What the program gets."""
        return {
            "request": self.as_request(),
            "env_from": self.env_from,
            "files": {path: file.model_dump(mode="json") for path, file in self.files.items()},
        }


class StartOutputs(_Model):
    id: str
    name: str
    image: str
    ports: dict[str, int] = Field(description="host port by name")
    address: str = Field(description="where the host ports are reached")
    host_paths: dict[str, str] = Field(default_factory=dict, description="where its volumes are on the node, by name")
    adopted: bool = Field(default=False, description="it was there already, made from the same specification")
    replaced: bool = Field(default=False, description="it took another's place")


class ExecParams(_Model):
    """A program, run inside a container that runs, with no more rights than it has."""

    name: ContainerName
    args: Annotated[list[str], Field(min_length=1, max_length=1024)]
    env: dict[EnvName, str] = Field(default_factory=dict)
    env_from: list[EnvName] = Field(default_factory=list, description="envs of this step that the program gets too")
    workdir: Annotated[str, StringConstraints(pattern=r"^/")] | None = None
    user: str | None = Field(
        default=None, description="another than the container's, where the node's policy allows it"
    )
    timeout: LongDuration = Field(default=600.0, description="then it is killed")
    ok: Annotated[list[int], Field(min_length=1)] = Field(default=[0], description="exit codes that are no failure")
    capture: bool = Field(default=False, description="its stdout, 16 KiB at most, becomes the output stdout")


class ExecOutputs(_Model):
    exit_code: int
    stdout: str = Field(default="", description="with capture: what it printed, without the last line's end")


class WaitParams(_Model):
    name: ContainerName
    timeout: LongDuration | None = Field(default=None, description="as long as the step may take, if left out")
    ok: Annotated[list[int], Field(min_length=1)] | None = Field(
        default=[0], description="exit codes that are no failure; null: any"
    )


class WaitOutputs(_Model):
    exit_code: int
    oom_killed: bool = False


class LogsParams(_Model):
    name: ContainerName
    to: WritePath
    tail: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="its last lines only (4 MiB at most); all of it if left out"
    )
    follow: bool = Field(default=False, description="until the container ends")

    @model_validator(mode="after")
    def _either(self) -> LogsParams:
        if self.tail is not None and self.follow:
            raise ValueError("give tail or follow, not both")
        return self


class LogsOutputs(_Model):
    path: str
    size_bytes: int
    sha256: str


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

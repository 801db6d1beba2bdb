"""What the agent asks of a container engine. Drivers translate their engine's errors into outrider.errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Literal, Protocol

StreamName = Literal["stdout", "stderr"]

# Labels on everything that Outrider creates; containers are found by them after a restart.
LABEL_NODE = "outrider.node"  # node id: what lacks it, or has another, is not ours
LABEL_KIND = "outrider.kind"  # "step", "managed", "pause"
LABEL_POOL = "outrider.pool"  # of a pause container: whose pool it is of, by the agent's state directory
LABEL_RUN = "outrider.run"
LABEL_STEP = "outrider.step"
LABEL_ATTEMPT = "outrider.attempt"
LABEL_LEASE = "outrider.lease"
LABEL_PLAN = "outrider.plan"  # SHA-256 of the journalled plan
LABEL_OBJECT = "outrider.object"  # "kind/name"
LABEL_SPEC = "outrider.spec"  # SHA-256 of a managed container's specification
LABEL_SECRETS = "outrider.secrets"  # names of the environment variables that hold secrets, comma-separated
LABEL_BOOT = "outrider.boot"  # EngineInfo.boot of the engine that a step's container was made with
LABEL_PORTS = "outrider.ports"  # a managed container's leased ports: "game=27001/udp,http=27002/tcp"
LABEL_IMAGE = "outrider.image"  # the image as it was named, where the container was made from its id
LABEL_NAME = "outrider.name"  # a managed container's name as the pipeline gave it
LABEL_NETWORK = "outrider.network"  # the private network of its object that a managed container is on
LABEL_SUPERVISION = "outrider.supervision"  # how a managed container is watched once it is ready; JSON
LABEL_PREFIX = "outrider."


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind mount. ``source`` is a host path made by the agent, never one from a pipeline."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class PortBinding:
    """A published port: a host port leased from the node's range."""

    container: int
    host: int
    protocol: Literal["tcp", "udp"] = "tcp"
    host_ip: str = "0.0.0.0"
    name: str = ""


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """All that a container is made from. The defaults are the sandbox; options only add to it by name."""

    name: str
    image: str
    image_id: str = ""  # the content that it is made from, where the node's policy says which; "": what `image` names
    args: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    user: str | None = None  # "uid:gid"
    groups: tuple[int, ...] = ()  # further group ids
    workdir: str | None = None
    network: str = "none"  # "none", "container:<id>", a network's name, "host"
    aliases: tuple[str, ...] = ()  # further names on that network
    read_only_root: bool = True
    tmp_size_bytes: int = 64 * 1024**2  # /tmp as a tmpfs of this size; 0: none
    cap_add: tuple[str, ...] = ()  # everything is dropped first
    devices: tuple[Device, ...] = ()
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    ports: tuple[PortBinding, ...] = ()
    restart_policy: Literal["no", "on-failure", "unless-stopped", "always"] = "no"
    restart_max: int = 0
    log_max_bytes: int = 64 * 1024**2  # of the engine's log file, before it rotates
    log_files: int = 1
    stop_signal: str | None = None
    oci_runtime: str = ""  # by the engine's name for it; "": the engine's default
    init: bool = (
        False  # a small init as PID 1, where the engine has one: PID 1 alone ignores signals it has no handler for
    )


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the host. ``permissions``: some of "r", "w" and "m" (make device nodes)."""

    host: str
    container: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container as the engine describes it."""

    id: str
    name: str
    image: str
    state: Literal["created", "running", "paused", "restarting", "removing", "exited", "dead"]
    labels: Mapping[str, str]
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    created_at: datetime | None = None
    started_at: datetime | None = None  # None: never started
    finished_at: datetime | None = None  # of the last run that has ended: of the one before, where it runs
    ports: tuple[PortBinding, ...] = ()
    mounts: tuple[Mount, ...] = ()
    restart_policy: str = ""
    restart_count: int = 0
    health: str = ""
    ip_address: str = ""
    raw: Mapping[str, object] = field(default_factory=dict)  # inspect only
    # Inspect only: the values in its environment that its label LABEL_SECRETS names, so that its log can be masked.
    secrets: tuple[str, ...] = field(default=(), repr=False)


def run_began(info: ContainerInfo) -> datetime | None:
    """A moment that the log of the run of a running container is after, and that of its former runs before; None: it
    never ran before.

    Halfway from the former's end to its start, which are a tenth of a second apart at least: engines take down the last
    line of a run a moment after its end, and older ones note a start when the first line may be there already.
    """
    if info.started_at is None or info.finished_at is None:
        return None
    return info.finished_at + (info.started_at - info.finished_at) / 2


def secrets_in(env: Mapping[str, str], labels: Mapping[str, str]) -> tuple[str, ...]:
    """The values in a container's environment that its labels say are secrets."""
    return tuple(env[name] for name in labels.get(LABEL_SECRETS, "").split(",") if env.get(name))


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended.

    ``oom_killed``: a process of it was killed for want of memory. ``engine_stopped``: the engine restarted under it,
    the code says nothing. ``removed``: it was killed by somebody who removed it. ``signalled``: somebody had the engine
    send it a signal. ``gap``: while it was waited for, the engine was away; what else was read from the engine
    meanwhile may lack something, too. ``unseen``: the engine was restarted and had not seen this end; what the
    container wrote while no engine was there to take it is in no log.
    """

    container_id: str
    exit_code: int
    oom_killed: bool = False
    engine_stopped: bool = False
    removed: bool = False
    signalled: bool = False
    gap: bool = False
    unseen: bool = False


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something that happened to a container: the engine's action ("start", "die", "oom", "destroy"…)."""

    action: str
    container_id: str
    name: str
    labels: Mapping[str, str]
    time: datetime
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    name: str  # "docker"
    version: str
    id: str
    boot: str  # changes when the engine restarts
    root: str
    storage_driver: str
    oci_runtimes: tuple[str, ...] = ()  # the names of those that it can carry containers out with


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image that the engine has. ``digests``: ``name@sha256:…`` for each registry that it was pulled from."""

    id: str  # "sha256:…": of its configuration, which names its layers by their content
    tags: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    size_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    def has_content(self, digest: str) -> bool:
        """Whether ``digest`` is what a registry calls this content, or what the engine does."""
        return self.id == digest or any(each.endswith(f"@{digest}") for each in self.digests)


PullProgress = Callable[[int, int], None]  # bytes done, bytes of what is known by now


@dataclass(frozen=True, slots=True)
class NetworkGuard:
    """What containers of a network may reach beyond the internet: ``allow``, ranges like ``10.1.0.0/16``, and
    ``resolvers``, addresses of name servers (port 53) beside those of the machine."""

    allow: tuple[str, ...] = ()
    resolvers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecInfo:
    """A program that was run inside a container. ``exit_code`` is None until it has ended; ``pid`` is the host's."""

    container_id: str
    running: bool
    exit_code: int | None
    pid: int


class Runtime(Protocol):
    """A container engine. Every method may raise EngineUnavailable; NotFound where a name is unknown."""

    async def info(self) -> EngineInfo:
        """Ask the engine about itself; the way to learn whether it answers."""

    async def find_image(self, image: str) -> ImageInfo:
        """The image that the engine has by this name (or name@digest, or id). NotFound names it."""

    async def pull_image(self, image: str, *, on_progress: PullProgress | None = None) -> ImageInfo:
        """Fetch it from the registry in its name. NotFound says what was tried; TemporaryError (code
        ``registry_unavailable``) that it may work later. One pull for all who want it at the same time."""

    async def tag_image(self, image_id: str, name: str, tag: str) -> None:
        """Give an image that the engine has a further name; another image that had it loses it."""

    async def ensure_network(self, name: str, *, labels: Mapping[str, str]) -> None:
        """A bridge network without traffic between its containers. Idempotent."""

    async def guard_network(self, name: str, guard: NetworkGuard) -> None:
        """Keep containers of a network from the machine itself and from loopback, link-local and private addresses.

        By the machine's packet filter, so that it binds every image. Idempotent, and called again now and then: it puts
        back what is gone. NotFound without such a network; PolicyViolation if it can't be done here.
        """

    async def ensure_private_network(self, name: str, *, labels: Mapping[str, str], subnets: Sequence[str]) -> None:
        """A network whose containers reach one another and nothing else, on the first subnet that is free.

        Idempotent. Raises TemporaryError if none of the subnets is free."""

    async def connect(self, network: str, container: str, *, aliases: Sequence[str]) -> None:
        """Put a container on one more network, where others find it by its aliases. Idempotent."""

    async def remove_network(self, name: str) -> None:
        """Remove; one that is gone already is no error. Conflict if a container that runs is on it."""

    async def list_networks(self, *, labels: Mapping[str, str]) -> list[str]:
        """The names of the networks that have all these labels."""

    async def create(self, spec: ContainerSpec) -> str:
        """Create, not start; returns the id. Conflict if the name is taken."""

    async def start(self, container: str) -> None:
        """Start. Starting a running container does nothing; what is left of a start that the engine forgot is ended."""

    async def forgotten(self, container: str, *, boot: str = "") -> bool:
        """Whether a container (by id) that is told as never started has begun to run all the same, or may have.

        An engine that dies in the middle of a start forgets it. ``boot`` is what `EngineInfo.boot` was when the
        container was made: where nothing of it runs, the word of an engine that is the same still is trusted.
        """

    async def end_forgotten(self, container: str) -> None:
        """Kill what runs of a container (by id) of which the engine does not know that it runs."""

    async def stop(self, container: str, *, grace_s: float) -> None:
        """Stop signal, then kill after the grace. Stopping a stopped one does nothing."""

    async def restart(self, container: str, *, grace_s: float) -> None: ...

    async def kill(self, container: str, *, signal: str = "SIGKILL") -> None: ...

    async def remove(self, container: str, *, force: bool = False) -> None:
        """Remove; one that is already gone is no error. Conflict if it runs and not ``force``."""

    async def rename(self, container: str, name: str) -> None:
        """Another name. Conflict if it is taken."""

    async def inspect(self, container: str) -> ContainerInfo: ...

    async def list(self, *, labels: Mapping[str, str] | None = None, all: bool = True) -> list[ContainerInfo]:
        """Containers that have all these labels (an empty value: the label with any value)."""

    def attach(self, container: str) -> AbstractAsyncContextManager[AsyncIterator[tuple[StreamName, bytes]]]:
        """Read a created container's output from its first byte. Entered before start; ends when it exits.

        The reader must always drain: one that stops freezes the container.
        """

    def logs(
        self, container: str, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> AsyncGenerator[tuple[StreamName, bytes], None]:
        """The engine's own log from its beginning, byte-exact; of its last ``tail`` lines, and of what the engine took
        down at ``since`` or later."""

    async def exec_create(
        self,
        container: str,
        args: Sequence[str],
        *,
        env: Mapping[str, str] = MappingProxyType({}),
        workdir: str | None = None,
        user: str | None = None,
    ) -> str:
        """Prepare to run a program inside a running container, with no more rights than the container has;
        returns the id of the execution. Conflict if the container does not run."""

    def exec_start(self, execution: str) -> AbstractAsyncContextManager[AsyncIterator[tuple[StreamName, bytes]]]:
        """Run what was prepared, and read its output until it ends. Conflict if it was started before: what was
        asked for once is done once, whoever asks again."""

    async def exec_inspect(self, execution: str) -> ExecInfo:
        """How it is with it. NotFound if the engine does not know it (any more)."""

    async def exited(self, container: str, *, boot: str = "") -> Exit:
        """Wait until the container has run and does not run any more, known from the one event stream.

        ``boot`` is what `EngineInfo.boot` was when the container was started (empty: it is this one): an end
        found out only after the engine came back as another one is told as ``engine_stopped``.
        """

    def events(self) -> AsyncGenerator[EngineEvent, None]:
        """Container events from now on. Ends never; a gap (engine restart) yields action "resync"."""

    async def aclose(self) -> None: ...

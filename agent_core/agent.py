"""The agent: one process per node that dials the server, runs what it is given, and never lets go of a game.

`Agent.run` reads as its life: take the state directory, open the journal, bring up the parts, pick up what a
former agent left, serve until stopped. Stopping leaves every container running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import structlog
from stevedore.driver import DriverManager
from stevedore.exception import NoMatches

from agent_core import state as state_module
from agent_core.cleanup import Cleanup
from agent_core.commands import Commands
from agent_core.config import AgentConfig
from agent_core.containers import Containers
from agent_core.damage import open_journal
from agent_core.diskwatch import DiskWatch
from agent_core.engine import EngineWatch
from agent_core.environment import environment
from agent_core.identities import Identities
from agent_core.images import Images
from agent_core.journal import RESERVE_BYTES, Journal
from agent_core.liveness import Supervisor
from agent_core.netpool import NetPool
from agent_core.networks import keep_guarded
from agent_core.outbox import Outbox
from agent_core.plugins import PluginHost
from agent_core.policy import NodePolicy
from agent_core.ports import Ports
from agent_core.quota import VolumeWatch
from agent_core.rebuild import Rebuild
from agent_core.remote import RemoteContainers
from agent_core.removed_objects import RemovedObjects
from agent_core.runner import RunEngine
from agent_core.runtimes.base import LABEL_KIND, LABEL_NODE, ContainerInfo, EngineEvent, Runtime
from agent_core.services import Background, Removals, Services
from agent_core.session import Credentials, Session
from agent_core.spool import Spool
from agent_core.state import State
from agent_core.status import serve_status
from agent_core.telemetry.node import load, machine_facts
from agent_core.volumes import Volumes
from outrider import __version__
from outrider._plugin_discovery import installed
from outrider.errors import Conflict, EngineUnavailable, InvalidInput, OutriderError
from outrider.locking import take_lock
from outrider.reports import held_digest
from outrider.retry import OperationCounts
from outrider.tls import read_ca
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.v1 import types_pb2 as types
from outrider.wire import class_to_proto, dump_json

log = structlog.get_logger(__name__)

_LAST_REMOVALS_S = 5.0
_FIRST_LOOK_S = 2.0
_ENGINE_ANSWERS_S = 3.0
_NOTE_TIME_S = 30.0
_READY_WITHIN_S = 15.0
_EVENTS = {"start": "container.started", "die": "container.exited", "oom": "container.out_of_memory"}


class Agent:
    """One agent. ``runtime``: an engine to use in place of the configured driver; whoever gives it closes it."""

    def __init__(self, config: AgentConfig, *, runtime: Runtime | None = None) -> None:
        self.config = config
        self._given_runtime = runtime
        self._stopping = asyncio.Event()
        self._refusal: OutriderError | None = None
        self._services: Services
        self._runs: RunEngine
        self._session: Session
        self._remote: RemoteContainers
        self._commands: Commands
        self._rebuild: Rebuild
        self._supervisor: Supervisor
        self._loop: asyncio.AbstractEventLoop
        self.ready = asyncio.Event()
        """Set when runs are taken up again, and how engine and server are is known, be it good or bad."""
        self.connected = asyncio.Event()
        """Set when the server has answered a heartbeat for the first time: then the whole way there works."""

    async def run(self) -> None:
        """Serve until `stop`. Raises InvalidInput for a configuration that can't work, Conflict if another agent has
        the state directory, Unauthenticated if the server refuses a node that has nothing to take care of."""
        config = self.config
        self._loop = asyncio.get_running_loop()
        config.read_token()
        if config.ca_file is not None:
            read_ca(config.ca_file)
        policy = NodePolicy.load(config.policy_file)
        if config.port_range is not None:
            policy = policy.model_copy(update={"ports": policy.ports.model_copy(update={"range": config.port_range})})
        try:
            with _locked(config.state_dir):
                async with self._parts(policy) as services, serve_status(config.state_dir, self._describe):
                    # First, so that the time since a reboot of the machine counts from here on.
                    await services.state.note_time()
                    self._runs.resume()
                    await self._serve(services)
        except Exception as error:
            if self._refusal is not None and self._refusal.code == "journal_damaged":
                raise self._refusal from error
            raise
        if self._refusal is not None:
            raise self._refusal

    def stop(self) -> None:
        """End soon. Containers and runs go on; the next agent adopts them."""
        self._stopping.set()

    @asynccontextmanager
    async def _parts(self, policy: NodePolicy) -> AsyncIterator[Services]:
        """Everything that an agent has, in the order in which it depends on one another."""
        config = self.config
        plugins = await asyncio.to_thread(
            PluginHost.load_surviving,
            config.state_dir,
            config.plugins,
            config.disabled_plugins,
            limit_s=config.plugin_limit_s,
        )
        for report in plugins.plugins:
            if report.state == "error":
                log.warning("a plugin is not used", plugin=report.name, reason=report.error)
        runtime = self._given_runtime or load_runtime(config.runtime, config.engine_socket)
        journal, damage = open_journal(
            config.state_dir / "journal.db",
            state_module.migrations(),
            reserve_bytes=RESERVE_BYTES,
            used=_was_used(config.state_dir),
        )
        journal.on_damage = self._journal_broke
        state, outbox = State(journal), Outbox(journal)
        if damage is not None:
            told = {"reason": damage.reason, "kept": str(damage.aside or "")}
            await outbox.emit("journal.damaged", config.node_id, told)
        spool = Spool(config.state_dir / "spool", journal, max_bytes=config.spool_max_bytes)
        identities = self._make_identities(journal)
        ports = Ports(journal, policy.ports.range, address=policy.ports.interface, interfaces=policy.ports.interfaces)
        volumes = self._make_volumes(journal, identities, policy.disk_reserve_bytes)
        containers = Containers(runtime, journal, ports, volumes, policy, config.node_id)
        removals = Removals()
        netpool = NetPool(runtime, policy, config.node_id, journal, calm=removals.calm)
        background, operations = Background(), OperationCounts()
        credentials = Credentials(config.server, config.node_id, config.read_token, config.ca_file, config.server_name)
        self._session = Session(
            credentials,
            self,
            state,
            outbox,
            spool,
            labels=dict(config.labels),
            on_refused=self._refused,
            on_answered=self.connected.set,
            operations=operations,
            environment=lambda: environment(config.state_dir),
        )
        # What the agent has seen itself wins: steps and pipelines rely on it.
        facts = {**await asyncio.to_thread(plugins.node_facts), **machine_facts()}
        engine = EngineWatch(runtime, outbox, on_return=netpool.start)
        disk = DiskWatch(
            config.state_dir,
            config.state_dir / "volumes",
            reserve_bytes=policy.disk_reserve_bytes,
            more=lambda: Path(engine.info.root) if engine.info else None,
        )
        self._services = services = Services(
            config=config,
            state=state,
            outbox=outbox,
            spool=spool,
            runtime=runtime,
            engine=engine,
            disk=disk,
            plugins=plugins,
            policy=policy,
            volumes=volumes,
            identities=identities,
            netpool=netpool,
            containers=containers,
            images=Images(runtime, policy.images, operations),
            envs=self._session,
            background=background,
            removals=removals,
            operations=operations,
            facts=facts,
            live=self._session.send_progress,
        )
        self._runs = RunEngine(services)
        self._rebuild = Rebuild(services, self._runs)
        self._remote = RemoteContainers(containers)
        self._supervisor = Supervisor(runtime, containers, outbox.emit, engine.available)
        self._commands = Commands(
            state,
            self._runs,
            self._remote,
            background,
            cancel_grace_s=config.cancel_grace_s,
            send_result=self._session.send_result,
            stub=lambda: self._session.stub,
            age_s=self._session.age_s,
        )
        try:
            async with background:
                for number in (1, 2):
                    background.start(services.removals.run(), f"removals {number}")
                plugins.report_failures(outbox, background)
                yield services
        finally:
            plugins.on_failure = None
            await services.removals.drain(_LAST_REMOVALS_S)
            await self._remote.stop_streams()
            await containers.aclose()
            with contextlib.suppress(OutriderError, TimeoutError):
                async with asyncio.timeout(_LAST_REMOVALS_S):  # an engine that hangs must not keep the agent
                    await netpool.aclose()
            if self._given_runtime is None:
                await runtime.aclose()
            spool.close()
            journal.close()

    # What `agent_core.trial` has other ones of.

    def _make_identities(self, journal: Journal) -> Identities:
        return Identities(journal)

    def _make_volumes(self, journal: Journal, identities: Identities, reserve_bytes: int) -> Volumes:
        return Volumes(journal, self.config.state_dir / "volumes", identities, reserve_bytes=reserve_bytes)

    async def _serve(self, services: Services) -> None:
        cleanup = Cleanup(services, self._runs, self._rebuild.over)
        removed = RemovedObjects(services.volumes, self._session.removed_objects, lambda: self._runs.objects)
        log.info(
            "agent started", node=self.config.node_id, version=__version__, step_types=len(services.plugins.step_types)
        )
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work, name=name)
                for name, work in (
                    ("engine", services.engine.run()),
                    ("events", self._watch_events()),
                    ("cleanup", cleanup.run()),
                    ("removed objects", removed.run()),
                    ("disk", self._watch_disk(cleanup)),
                    ("volumes", VolumeWatch(services.volumes, services.outbox.emit).run()),
                    ("time", self._keep_time()),
                    ("liveness", self._supervise()),
                    ("session", self._link()),
                    ("networks", keep_guarded(services.runtime, services.policy)),
                    ("readiness", self._settle()),
                )
            ]
            await self._stopping.wait()
            log.info("agent stops", runs=len(self._runs.active))
            self._session.close()
            for task in tasks:
                task.cancel()

    async def _watch_disk(self, cleanup: Cleanup) -> None:
        services = self._services
        await services.disk.run(services.outbox.emit, cleanup.relieve, services.state.journal.keep_room)

    async def _supervise(self) -> None:
        await self._rebuild.over.wait()  # a lost journal does not know yet what is to be watched
        await self._supervisor.run()

    async def _keep_time(self) -> None:
        # What a reboot of the machine can make a timeout forget is at most this much.
        while True:
            await asyncio.sleep(_NOTE_TIME_S)
            if self._runs.active:
                await self._services.state.note_time()

    async def _link(self) -> None:
        # What the node says of its engine is true from the first word on; an engine that hangs delays it by little.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_S):
                await self._services.engine.asked.wait()
        await self._session.run()

    async def _settle(self) -> None:
        # An engine that hangs, or a server that swallows what it is sent, must not leave a service "activating".
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_WITHIN_S):
                await self._services.engine.asked.wait()
                await self._session.asked.wait()
        # A credential that was refused ends an idle agent: its start has failed, and is not to look otherwise.
        if not self._stopping.is_set():
            self.ready.set()

    def _journal_broke(self, reason: str) -> None:
        """In whatever thread that is found out. Going on would be to act on what can't be relied on."""
        self._refusal = OutriderError(
            f"the journal in {self.config.state_dir} is damaged: {reason}",
            code="journal_damaged",
            hint="start the agent again: it puts the file aside and rebuilds what it can; containers go on meanwhile",
        )
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent has ended already
            self._loop.call_soon_threadsafe(self.stop)

    def _refused(self, error: OutriderError) -> None:
        # A node that takes care of something stays: only its link waits for another credential.
        # (Events of its own start, that the engine is away, say, are nothing that anybody waits for.)
        if not self._runs.active and not self._services.outbox.read(("run_report", "write_back"), limit=1):
            self._refusal = error
            self.stop()

    async def _watch_events(self) -> None:
        while True:
            await self._services.engine.available()
            try:
                async with contextlib.aclosing(self._services.runtime.events()) as events:
                    async for event in events:
                        await self._tell(event)
            except EngineUnavailable as error:
                self._services.engine.doubt(error)
            await asyncio.sleep(0.2)

    async def _tell(self, event: EngineEvent) -> None:
        """What happens to managed containers is an event of the node's; steps have their reports."""
        self._supervisor.heard(event)
        if event.action == "resync":
            self._services.engine.look_again()
            return
        ours = event.labels.get(LABEL_NODE) == self.config.node_id and event.labels.get(LABEL_KIND) == "managed"
        if ours and event.action in _EVENTS:
            data = {} if event.exit_code is None else {"exit_code": event.exit_code}
            await self._services.outbox.emit(_EVENTS[event.action], event.name, data)

    def status_line(self) -> str:
        """How the agent is, in one line, for the service manager. Only once `ready` is set."""
        session, engine = self._session, self._services.engine
        link = "connected to" if session.connected else "not connected to"
        reason = "" if session.connected or not session.last_error else f" ({session.last_error})"
        motor = f"engine {engine.info.version}" if engine.ok and engine.info else f"engine missing ({engine.error})"
        count = len(self._runs.active)
        return f"{link} {self.config.server}{reason}; {motor}; {count} {'run' if count == 1 else 'runs'}"

    # What the session asks (session.Host).

    def step_types(self) -> list[types.StepTypeInfo]:
        """All step types of this node, with their schemas."""
        return [
            types.StepTypeInfo(
                name=each.name,
                plugin=each.plugin,
                distribution=each.distribution,
                version=each.version,
                description=each.description,
                params_schema_json=dump_json(each.params_schema),
                outputs_schema_json=dump_json(each.outputs_schema) if each.outputs_schema else b"",
                envs=each.envs,
                idempotent=each.idempotent,
            )
            for each in self._services.plugins.step_types.values()
        ]

    def plugins(self) -> list[types.Plugin]:
        """All plugins, also those that are not used, with the reason."""
        return [
            types.Plugin(
                name=each.name,
                distribution=each.distribution,
                version=each.version,
                ok=each.ok,
                error=each.error,
                step_types=each.step_types,
                state=each.state,
                fix=each.fix,
                notes=self._services.plugins.notes_of(each),
                contract=each.contract,
            )
            for each in self._services.plugins.plugins
        ]

    def facts(self) -> dict[str, Any]:
        """What expressions see as `node`."""
        return dict(self._services.facts)

    def held_runs(self) -> list[types.HeldRun]:
        """Every run in the journal."""
        return self._services.state.held()

    def brief(self) -> types.BriefState:
        """How the node is now, as far as that is known without asking the engine."""
        services = self._services
        brief = load(self.config.state_dir)
        brief.engine_ok, brief.engine_error = services.engine.ok, services.engine.error
        if services.engine.ok and services.engine.stuck:
            brief.engine_error = f"it hangs on {', '.join(sorted(services.engine.stuck))}"
        brief.runs.extend(self._runs.active)
        brief.operations.extend(
            types.OperationCount(
                operation=each.operation,
                error_class=class_to_proto(each.error_class),
                retries=each.retries,
                failures=each.failures,
            )
            for each in services.operations.all()
        )
        brief.outbox_depth = services.outbox.depth
        brief.log_bytes = services.spool.owed_bytes
        brief.state_digest = held_digest(self.held_runs())
        return brief

    async def count_containers(self) -> Mapping[str, int]:
        """How many the engine has, by state; none if it does not answer."""
        return Counter(info.state for info in await self._listed(self._services.runtime.list))

    async def _listed(self, ask: Callable[[], Awaitable[list[ContainerInfo]]]) -> list[ContainerInfo]:
        if self._services.engine.ok:
            # Neither a heartbeat nor a report waits for an engine that hangs.
            with contextlib.suppress(OutriderError, TimeoutError):
                async with asyncio.timeout(_ENGINE_ANSWERS_S):
                    return await ask()
        return []

    async def full_report(self) -> types.FullReport:
        """What the engine has of all that the node holds; the rest is looked up as it is sent."""
        containers = self._services.containers
        found = await self._listed(containers.list)
        counted: Counter[str] = Counter(info.state for info in found)
        described = [self._remote.describe(info) for info in found if containers.owner(info) != "foreign"]
        return types.FullReport(brief=types.BriefState(containers=counted), containers=described)

    async def handle(self, command: pb.Command) -> pb.CommandAck:
        """Take a command on."""
        return await self._commands.handle(command)

    async def retell(self, run_ids: Sequence[str]) -> None:
        """Report once more how these runs ended."""
        await self._runs.retell(run_ids)

    async def recover(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """Rebuild a lost journal."""
        await self._rebuild.recover(stub)

    async def stop_streams(self) -> None:
        """The connection is gone."""
        await self._remote.stop_streams()

    async def _describe(self) -> dict[str, Any]:
        """For `outrider agent status`."""
        services = self._services
        return {
            "node_id": self.config.node_id,
            "version": __version__,
            "pid": os.getpid(),
            "environment": sys.prefix,
            "server": {
                "address": self.config.server,
                "connected": self._session.connected,
                "error": self._session.last_error,
            },
            "engine": {
                "ok": services.engine.ok,
                "error": services.engine.error,
                "version": services.engine.info.version if services.engine.info else "",
                "oci_runtime": services.netpool.oci_runtime,
                "stuck": dict(services.engine.stuck),
            },
            "disk": services.disk.describe(),
            "journal": self._rebuild.describe() | {"blocked": services.state.journal.blocked},
            "runs": self._runs.describe(),
            "containers": dict(await self.count_containers()),
            "outbox_depth": services.outbox.depth,
            "spool_bytes": services.spool.size_bytes,
            "operations": [asdict(each) for each in services.operations.all()],
            "plugins": [
                {"name": each.name, "version": each.version, "state": each.state, "error": each.error}
                for each in services.plugins.plugins
            ],
            "hook_failures": [asdict(each) for each in services.plugins.failures.values()],
        }


def load_runtime(name: str, socket_path: Path | None = None) -> Runtime:
    """The container engine's driver called ``name``. Raises InvalidInput if none is installed."""
    given = {} if socket_path is None else {"socket_path": str(socket_path)}

    class Drivers(DriverManager[Any]):
        """stevedore's own list fails as a whole where a single distribution's metadata is damaged."""

        def list_entry_points(self) -> list[EntryPoint]:
            return [each.entry_point for each in installed(self.namespace)[0]]

    try:
        manager: Any = Drivers("outrider.runtimes", name, invoke_on_load=True, invoke_kwds=given)
    except NoMatches as error:
        raise InvalidInput(
            f"no driver for a container engine is called {name!r}", code="unknown_runtime", hint="docker is built in"
        ) from error
    return cast("Runtime", manager.driver)


def _was_used(state_dir: Path) -> bool:
    """Whether an agent has run on this directory: then its journal must be there."""
    return any(any((state_dir / name).glob("*")) for name in ("attempts", "spool", "volumes"))


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Hold the state directory for one agent; the kernel lets go of it when the process ends, however it ends."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(
            f"the state directory {state_dir} can't be used: {error.strerror}", code="state_dir_unusable"
        ) from error
    try:
        try:
            take_lock(descriptor)
        except OSError as error:
            raise Conflict(
                f"another agent runs on the state directory {state_dir}",
                code="agent_running",
                hint="one agent per node; give another state_dir for a second one",
            ) from error
        yield
    finally:
        os.close(descriptor)

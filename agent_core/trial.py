"""Steps tried on a machine without a server: the agent's own run engine, on directories that the caller names.

What carries the step out is what a node has: the same planner and policy, sandbox, network pool, control socket,
masking and outcome. Only three things are put in the place of others: volumes are directories that are there, their
owner is the step's user, and envs come from the caller. `outrider plugin try` and `outrider.testing` stand on this.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from agent_core.agent import Agent, load_runtime
from agent_core.config import AgentConfig
from agent_core.identities import FIRST_UID, Identities
from agent_core.journal import Journal
from agent_core.onestep import SET, StepRequest
from agent_core.plugins import PluginHost
from agent_core.policy import NodePolicy
from agent_core.runtimes.base import LABEL_NODE, Runtime
from agent_core.services import Services
from agent_core.state import Cancellation
from agent_core.stepfiles import StepDirectory
from agent_core.volumes import AllottedVolume, Scope, Volumes
from outrider.errors import ErrorClass, OutriderError
from outrider.steps import StepContext, StepOutcome, hookimpl
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import dump_json

_RESERVE_BYTES = 64 * 1024**2
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class StepResult:
    """How a tried step ended. ``progress`` and ``outputs_file`` are the bytes that the program itself wrote."""

    state: str  # "succeeded", "failed", "cancelled" or "unknown"
    exit_code: int | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    code: str = ""
    hint: str = ""
    error_class: ErrorClass | None = None
    progress: bytes = b""
    outputs_file: bytes = b""
    stdout: bytes = b""
    stderr: bytes = b""


@asynccontextmanager
async def trial(
    *, plugins: Sequence[str] | None = None, policy: NodePolicy | None = None, runtime: Runtime | None = None
) -> AsyncIterator[Trial]:
    """A place to try steps in; everything that it made is removed again when it is left, managed containers too.

    ``plugins``: names of installed step plugins, None for all; more can be registered with `Trial.plugins`. Raises
    EngineUnavailable if the engine does not answer.
    """
    policy = policy or NodePolicy()
    node_id = f"trial-{secrets.token_hex(6)}"
    # Networks of its own: an agent of this machine may have other rules for its. And nobody waits for the next step
    # here, so that namespaces are made when they are needed.
    networks = {
        name: each.model_copy(update={"warm": 0, "network": f"outrider-{node_id}-{name}"})
        for name, each in policy.networks.items()
    }
    reserve = min(policy.disk_reserve_bytes, _RESERVE_BYTES)
    policy = policy.model_copy(update={"warm_none": 0, "networks": networks, "disk_reserve_bytes": reserve})
    folder = Path(tempfile.mkdtemp(prefix="outrider-trial-"))
    config = AgentConfig(
        node_id=node_id,
        server="localhost:1",
        token=SecretStr("unused"),
        state_dir=folder,
        plugins=None if plugins is None else list(plugins),
    )
    engine = runtime or load_runtime(config.runtime, None)
    agent = _TrialAgent(config, runtime=engine)
    try:
        await engine.info()
        async with agent.engine_only(policy) as services:
            watch = asyncio.create_task(services.engine.run())
            try:
                yield Trial(agent, services)
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
    finally:
        with suppress(OutriderError):
            for info in await engine.list(labels={LABEL_NODE: node_id}):
                await engine.remove(info.id, force=True)
            for network in await engine.list_networks(labels={LABEL_NODE: node_id}):
                await engine.remove_network(network)
        if runtime is None:
            await engine.aclose()
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class Trial:
    """Carries steps out, several at a time if one likes. Made by `trial`."""

    def __init__(self, agent: _TrialAgent, services: Services) -> None:
        self._agent = agent
        self._services = services
        self._runs: dict[str, TrialRun] = {}
        services.live = self._progressed
        services.plugins.register(_Witness(self), name="trial", distribution="outrider", version="")

    @property
    def plugins(self) -> PluginHost:
        """The plugins of this trial, and what became of each."""
        return self._services.plugins

    async def start(
        self, request: StepRequest, on_progress: Callable[[types.Progress], None] | None = None
    ) -> TrialRun:
        """Begin with a step. What is wrong with it is in its result, as on a node."""
        run_id = secrets.token_hex(8)
        text = request.yaml().encode()
        self._agent.given[run_id] = request
        run = TrialRun(self._services, self._agent, run_id, request.step, on_progress)
        self._runs[run_id] = run
        command = pb.RunPipeline(
            run_id=run_id, lease_id=SET, pipeline_yaml=text, pipeline_sha256=hashlib.sha256(text).digest()
        )
        if request.object_ref:
            kind, _, name = request.object_ref.partition("/")
            command.object.ref.kind, command.object.ref.name = kind, name
            command.object.attributes_json = dump_json(dict(request.attributes))
        await self._agent.runs.accept(command, command_id=f"c-{run_id}", digest=b"")
        return run

    async def run(
        self, request: StepRequest, on_progress: Callable[[types.Progress], None] | None = None
    ) -> StepResult:
        """Carry a step out, to its end."""
        return await (await self.start(request, on_progress)).end()

    def _progressed(self, report: pb.RunReport) -> None:
        run = self._runs.get(report.run_id)
        if run is not None and report.steps:
            run.told(report.steps[0].progress)

    def ended(self, run_id: str, exit_code: int | None) -> None:
        """The attempt is over, and its directory is still there."""
        run = self._runs.get(run_id)
        if run is not None:
            directory = StepDirectory(self._services.attempts_dir / run_id / run.step / "1" / "outrider")
            run.exit_code, run.wrote = exit_code, (directory.raw("progress"), directory.raw("outputs"))


class TrialRun:
    """A step that was begun."""

    def __init__(
        self,
        services: Services,
        agent: _TrialAgent,
        run_id: str,
        step: str,
        on_progress: Callable[[types.Progress], None] | None,
    ) -> None:
        self._services = services
        self._agent = agent
        self._run_id = run_id
        self.step = step
        self._on_progress = on_progress
        self._read = {"stdout": 0, "stderr": 0}
        self.exit_code: int | None = None
        self.wrote = (b"", b"")  # progress and outputs
        self.progressed = asyncio.Event()
        """Set once the program has told how far it is."""

    @property
    def container(self) -> str:
        """The name of the step's container."""
        return f"outrider-{self._run_id}-{self.step}-1"

    @property
    def over(self) -> bool:
        """Whether the step has ended."""
        return self._run_id not in self._agent.runs.active

    def told(self, progress: types.Progress) -> None:
        """The program has told how far it is."""
        self.progressed.set()
        if self._on_progress is not None:
            self._on_progress(progress)

    def news(self) -> list[tuple[str, bytes]]:
        """What was logged since this was last asked, masked: pairs of the stream's name and bytes."""
        found = []
        for stream, offset in self._read.items():
            data = self._log(stream)[offset:]
            if data:
                self._read[stream] += len(data)
                found.append((stream, data))
        return found

    async def cancel(self, grace_s: float) -> None:
        """Stop signal, then kill after the grace, as the agent does it. The step is not over yet when this returns."""
        cancellation = Cancellation("it was cancelled", grace_s)
        await self._agent.runs.cancel(self._run_id, cancellation, command_id=f"x-{self._run_id}", digest=b"")

    async def kill(self) -> None:
        """End its container as a power cut would: without a word to it."""
        await self._services.runtime.kill(self.container)

    async def end(self) -> StepResult:
        """Wait for the end, however long it takes; the step's own timeout bounds it."""
        while not self.over:  # noqa: ASYNC110 - how a run ends is told to a server, and there is none
            await asyncio.sleep(_LOOK_S)
        state, status = types.RUN_STATE_UNSPECIFIED, types.StepStatus()
        failure = types.Failure()
        for item in self._services.outbox.read(("run_report",), limit=100_000):
            report = pb.RunReport.FromString(item.body)
            if report.run_id == self._run_id:
                state = report.state
                status = report.steps[0] if report.steps else status
                failure = report.failure if report.HasField("failure") else failure
        # The step's own sentence, where it has one: the run's is that of the step, or why it could not begin.
        failure = status.failure if status.HasField("failure") else failure
        return StepResult(
            state=types.RunState.Name(state).removeprefix("RUN_STATE_").lower(),
            exit_code=self.exit_code,
            outputs=json.loads(status.outputs_json or b"{}"),
            message=failure.message,
            code=failure.code,
            hint=failure.hint,
            error_class=_CLASSES.get(failure.error_class),
            progress=self.wrote[0],
            outputs_file=self.wrote[1],
            stdout=self._log("stdout"),
            stderr=self._log("stderr"),
        )

    def _log(self, stream: str) -> bytes:
        path = self._services.config.state_dir / "spool" / self._run_id / self.step / f"1.{stream}"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""


_CLASSES = {
    types.ERROR_CLASS_TEMPORARY: ErrorClass.TEMPORARY,
    types.ERROR_CLASS_PERMANENT: ErrorClass.PERMANENT,
    types.ERROR_CLASS_TIMEOUT: ErrorClass.TIMEOUT,
}


class _TrialAgent(Agent):
    """An agent that never dials: its run engine alone, with what the caller gave in place of what it would allot."""

    given: dict[str, StepRequest]

    def __init__(self, config: AgentConfig, *, runtime: Runtime) -> None:
        super().__init__(config, runtime=runtime)
        self.given = {}

    @property
    def runs(self) -> Any:
        return self._runs

    @asynccontextmanager
    async def engine_only(self, policy: NodePolicy) -> AsyncIterator[Services]:
        """The parts, started, until the context is left."""
        async with self._parts(policy) as services:
            services.envs = _GivenEnvs(self.given)
            yield services

    def _make_identities(self, journal: Journal) -> Identities:
        return _GivenIdentities(journal, self.given)

    def _make_volumes(self, journal: Journal, identities: Identities, reserve_bytes: int) -> Volumes:
        root = self.config.state_dir / "volumes"
        return _GivenVolumes(journal, root, identities, reserve_bytes=reserve_bytes, given=self.given)


class _GivenEnvs:
    def __init__(self, given: Mapping[str, StepRequest]) -> None:
        self._given = given

    async def get_envs(self, run_id: str, lease_id: str) -> tuple[dict[str, str], frozenset[str]]:
        request = self._given[run_id]
        values = {f"{SET}.{name}": value for name, value in {**request.envs, **request.secrets}.items()}
        return values, frozenset(f"{SET}.{name}" for name in request.secrets)


class _GivenIdentities(Identities):
    """The step runs as the owner of the directories that it was given."""

    def __init__(self, journal: Journal, given: Mapping[str, StepRequest]) -> None:
        super().__init__(journal)
        self._requests = given

    async def allot(self, owner: str) -> tuple[int, int]:
        kind, _, name = owner.partition(":")
        found = [each for run, each in self._requests.items() if name == (run if kind == "run" else each.object_ref)]
        return user_of(found[-1].volumes.values())


def user_of(volumes: Any) -> tuple[int, int]:
    """uid and gid of the step: those of the first directory that it may write, and never root's."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for volume in sorted(volumes, key=lambda each: not each.writable):
        owner = volume.directory.stat()
        if owner.st_uid != 0 and owner.st_gid != 0:
            return owner.st_uid, owner.st_gid
    return FIRST_UID, FIRST_UID


class _GivenVolumes(Volumes):
    """The directories that the caller named; nothing of them is ever removed."""

    def __init__(self, *parts: Any, reserve_bytes: int, given: Mapping[str, StepRequest]) -> None:
        super().__init__(*parts, reserve_bytes=reserve_bytes)
        self._requests = given

    async def allot(
        self, run_id: str, object_ref: str | None, name: str, scope: Scope, keep: bool, size_bytes: int | None
    ) -> AllottedVolume:
        directory = self._requests[run_id].volumes[name].directory
        return AllottedVolume(name=name, host_path=str(directory.resolve()), quota="none")

    async def use(self, container: str, host_paths: Sequence[str]) -> None:
        """Nothing to note: they are not the agent's to remove."""


class _Witness:
    """A plugin of the trial's own: it looks at what the program wrote before that is cleared away."""

    def __init__(self, place: Trial) -> None:
        self._place = place

    @hookimpl
    def outrider_after_step(self, context: StepContext, outcome: StepOutcome) -> None:
        self._place.ended(context.run_id, outcome.exit_code)

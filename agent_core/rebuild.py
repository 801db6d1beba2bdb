"""After the loss of the journal: what containers, directories and the server still know, and what nobody knows.

The new journal begins with a note that it is to be rebuilt, and until it is, nothing is taken on and nothing is
collected; what runs on the node goes on. It takes the engine (whose containers say by their labels which attempts they
are) and the server (which has every run that it ever sent, and what it was told of it):

==============================================  ==================================================================
a step is                                       then it
==============================================  ==================================================================
over, as the server was told                    stays so
there as a container, running or ended          is adopted; one that never started is made anew
there, and the engine hangs on it               is adopted, and waited for
not begun: its run's directory has none of it   waits its turn, as before
begun, and idempotent                           is tried again
begun, or nobody can tell                       is unknown, with the reason
==============================================  ==================================================================

Managed containers, their ports, volumes and user ids are read off the containers and the volumes' owners.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import structlog

from agent_core.container_spec import NEXT, PREVIOUS
from agent_core.containers import DEFAULT_GRACE_S
from agent_core.damage import REBUILD
from agent_core.identities import FIRST_UID, LAST_UID
from agent_core.replacing import ports_of
from agent_core.runner import RunEngine
from agent_core.runtimes.base import (
    LABEL_ATTEMPT,
    LABEL_BOOT,
    LABEL_LEASE,
    LABEL_OBJECT,
    LABEL_RUN,
    LABEL_SPEC,
    LABEL_STEP,
    LABEL_SUPERVISION,
    ContainerInfo,
)
from agent_core.services import Services
from agent_core.spool import STREAMS
from agent_core.state import TERMINAL_STEPS, AttemptRecord, Cancellation, Change, Phase
from agent_core.transitions import Transition
from outrider.errors import EngineUnavailable, NotFound, OutriderError, Unavailable
from outrider.pipeline import Pipeline, Step, graph, load_pipeline
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import node_service_pb2_grpc as pb_grpc
from outrider.v1 import types_pb2 as types
from outrider.wire import failure_of, from_rpc_error

log = structlog.get_logger(__name__)

_CALL_TIMEOUT_S = 30.0
_ENGINE_WAIT_S = 20.0
_INSPECT_WAIT_S = 5.0  # for each container: an engine may hang on one and answer for all others
_INSPECTED_AT_ONCE = 16
Attempts = Mapping[int, ContainerInfo]


@dataclass
class FoundStep:
    """What became of a step, as far as it can be known; ``attempts``: for the journal, the last one last."""

    status: types.StepStatus
    attempts: list[AttemptRecord] = field(default_factory=list)


class Rebuild:
    """`recover` does it, once there is a server to ask. ``over`` is set when there is nothing (more) to rebuild."""

    def __init__(self, services: Services, runs: RunEngine) -> None:
        self._services = services
        self._runs = runs
        rows = services.state.journal.query_now("SELECT value FROM meta WHERE key = ?", (REBUILD,))
        self._note: dict[str, Any] = json.loads(rows[0]["value"]) if rows else {}
        self.over = asyncio.Event()
        if not self.pending:
            self.over.set()

    @property
    def pending(self) -> bool:
        """Whether the journal lacks what was in the one before it."""
        return bool(self._note) and not self._note.get("rebuilt_at")

    def describe(self) -> dict[str, Any]:
        """For the local status: {} if this journal was never lost."""
        return dict(self._note)

    async def recover(self, stub: pb_grpc.NodeServiceAsyncStub) -> None:
        """Ask the server, look around, write down what is found and go on with it. Nothing if there is no need.

        Raises Unavailable or EngineUnavailable while the engine does not answer, and what the call raises.
        """
        if not self.pending:
            return
        try:
            async with asyncio.timeout(_ENGINE_WAIT_S):
                await self._services.engine.available()
                listed = await self._services.runtime.list()
        except TimeoutError as error:
            raise Unavailable(
                "the journal was lost, and to rebuild it the container engine is needed, which does not answer"
            ) from error
        containers = await self._own_containers(listed)
        steps = [info for info in containers if self._services.containers.owner(info) == "step"]
        seen = {(info.labels.get(LABEL_RUN, ""), info.labels.get(LABEL_LEASE, "")) for info in steps}
        request = pb.RecoverRunsRequest(seen=[pb.RunRef(run_id=run, lease_id=lease) for run, lease in sorted(seen)])
        try:
            answer = await stub.RecoverRuns(request, timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target=self._services.config.server) from error
        await self._take(answer, steps, containers)

    async def _take(
        self, answer: pb.RecoverRunsResponse, steps: list[ContainerInfo], containers: list[ContainerInfo]
    ) -> None:
        services, state = self._services, self._services.state
        changes, unknown = [], 0
        for recovered in answer.runs:
            found = await asyncio.to_thread(self._find, recovered, steps)
            unknown += sum(each.status.state == types.STEP_STATE_UNKNOWN for each in found)
            changes += self._run_changes(recovered, found)
            changes += await self._log_changes(recovered, found)
        run_ids = [each.command.run_id for each in answer.runs]
        changes += await asyncio.to_thread(self._what_is_given_out, containers, run_ids)
        claimed = {*run_ids, *answer.over}
        unclaimed = sorted({info.name for info in steps if info.labels.get(LABEL_RUN, "") not in claimed})
        note = self._note | {
            "rebuilt_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "runs": run_ids,
            "unknown_steps": unknown,
            "unclaimed_containers": unclaimed,
        }
        changes.append(services.outbox.event("journal.rebuilt", services.config.node_id, note))
        await state.commit(Transition.REBUILT, *changes, state.meta(REBUILD, json.dumps(note)))
        services.outbox.notify()
        self._note = note
        log.warning("the journal is rebuilt", runs=len(run_ids), unknown_steps=unknown, unclaimed=unclaimed)
        for info in steps:
            if info.labels.get(LABEL_RUN, "") in answer.over:
                log.info("removing a step's container of a run that is over", container=info.name)
                services.removals.add(services.runtime.remove(info.id, force=True))
        self._runs.resume()
        self.over.set()

    # Runs.

    async def _own_containers(self, listed: Iterable[ContainerInfo]) -> list[ContainerInfo]:
        """Everything of this agent, looked at closely. Steps of another agent's state directory are not."""
        services = self._services
        at_once = asyncio.Semaphore(_INSPECTED_AT_ONCE)

        async def look(info: ContainerInfo) -> ContainerInfo | None:
            async with at_once:
                return await self._look_at(info)

        own = [info for info in listed if services.containers.owner(info) in ("step", "managed")]
        return [
            info
            for info in await asyncio.gather(*(look(each) for each in own))
            if info and (services.containers.owner(info) == "managed" or _is_below(services.attempts_dir, info))
        ]

    async def _look_at(self, info: ContainerInfo) -> ContainerInfo | None:
        """What can be known of a container that was listed; None if it is gone by now. Raises EngineUnavailable."""
        try:
            async with asyncio.timeout(_INSPECT_WAIT_S):
                return await self._services.runtime.inspect(info.id)
        except NotFound:
            return None
        except EngineUnavailable:
            raise
        except (OutriderError, TimeoutError) as error:
            log.warning("a container can't be looked at", container=info.name, error=str(error) or "no answer in time")
        # It is there, and a list does not say whether it was ever started: so it perhaps was, and is adopted as if.
        return replace(info, started_at=info.started_at or info.created_at or datetime.now(UTC))

    def _find(self, recovered: pb.RecoverRunsResponse.Recovered, steps: Iterable[ContainerInfo]) -> list[FoundStep]:
        command = recovered.command
        pipeline = load_pipeline(command.pipeline_yaml)
        containers: dict[str, dict[int, ContainerInfo]] = {}
        for info in steps:
            if info.labels.get(LABEL_RUN) == command.run_id and info.labels.get(LABEL_LEASE) == command.lease_id:
                number = info.labels.get(LABEL_ATTEMPT, "")
                if number.isdecimal():
                    containers.setdefault(info.labels.get(LABEL_STEP, ""), {})[int(number)] = info
        directory = self._services.attempts_dir / command.run_id
        return find_steps(pipeline, recovered.steps, containers, _begun(directory), self._is_idempotent)

    def _is_idempotent(self, step: Step) -> bool:
        if step.idempotent is not None:
            return step.idempotent
        known = self._services.plugins.step_types.get(step.uses)
        return known is not None and known.idempotent

    def _run_changes(self, recovered: pb.RecoverRunsResponse.Recovered, found: list[FoundStep]) -> list[Change]:
        services, state, command = self._services, self._services.state, recovered.command
        changes = [state.accept_run(command, [each.status for each in found])]
        begun = any(each.status.attempt for each in found)
        run_state = types.RUN_STATE_RUNNING if begun else types.RUN_STATE_DISPATCHED
        if begun:
            changes.append(state.run_state(command.run_id, run_state, started_at=time.time()))
        for each in found:
            changes += [state.attempt_found(command.run_id, each.status.name, attempt) for attempt in each.attempts]
        if recovered.HasField("cancel"):
            cancellation = Cancellation.of(recovered.cancel, default_grace_s=services.config.cancel_grace_s)
            changes.append(state.cancel_run(command.run_id, cancellation))
        report = pb.RunReport(
            run_id=command.run_id, lease_id=command.lease_id, state=run_state, steps=[each.status for each in found]
        )
        return [*changes, services.outbox.run_report(report)]

    async def _log_changes(self, recovered: pb.RecoverRunsResponse.Recovered, found: list[FoundStep]) -> list[Change]:
        """Logs that lie in the spool and that nobody will write on: their ends, as the server was told of them."""
        spool, run_id = self._services.spool, recovered.command.run_id
        changes = []
        for each in found:
            status = each.status
            if status.state not in TERMINAL_STEPS or not spool.has_file(run_id, status.name, status.attempt):
                continue
            files = await spool.open(run_id, status.name, status.attempt)
            told = {"stdout": status.stdout_bytes, "stderr": status.stderr_bytes}
            for stream in STREAMS:
                missing = told[stream] - files[stream].accepted
                known = status.state != types.STEP_STATE_UNKNOWN and missing >= 0
                changes.append(spool.finished(files[stream], gap=missing if known else -1))
        return changes

    # What the node has given out.

    def _what_is_given_out(self, containers: Iterable[ContainerInfo], run_ids: Iterable[str]) -> list[Change]:
        root = self._services.config.state_dir / "volumes"
        changes = []
        for path in _volume_directories(root, run_ids):
            changes += _volume_changes(root, path)
        for info in containers:
            if self._services.containers.owner(info) == "managed":
                changes += _managed_changes(root, info)
        return changes


def _is_below(directory: Path, info: ContainerInfo) -> bool:
    """Whether the step's /outrider lies there."""
    return any(
        Path(mount.source).resolve().is_relative_to(directory.resolve())
        for mount in info.mounts
        if mount.target == "/outrider"
    )


def find_steps(
    pipeline: Pipeline,
    told: Iterable[types.StepStatus],
    containers: Mapping[str, Attempts],
    begun: Mapping[str, int] | None,
    is_idempotent: Callable[[Step], bool],
) -> list[FoundStep]:
    """What became of each step. ``told``: what the server knows; ``containers``: those that are there, by step and
    attempt; ``begun``: the last attempt that has, or had, a directory, by step (None: the run's own is not there)."""
    known = {status.name: status for status in told}
    needs = graph(pipeline)
    found = []
    for step in pipeline.steps:
        status = types.StepStatus(name=step.name, uses=step.uses, state=types.STEP_STATE_PENDING)
        if step.name in known:
            status.CopyFrom(known[step.name])
        if not status.needs:
            status.needs.extend(needs[step.name])
        found.append(_find_step(step, status, containers.get(step.name, {}), begun, is_idempotent))
    return found


def _find_step(
    step: Step,
    status: types.StepStatus,
    containers: Attempts,
    begun: Mapping[str, int] | None,
    is_idempotent: Callable[[Step], bool],
) -> FoundStep:
    attempts = [_attempt(number, info) for number, info in sorted(containers.items())]
    if status.state in TERMINAL_STEPS and status.state != types.STEP_STATE_UNKNOWN:
        return FoundStep(status, [_over(each) for each in attempts])  # so that what is left of them is removed
    last = max(containers, default=0)
    tried = max(status.attempt, (begun or {}).get(step.name, 0))
    if last and last >= tried:
        status.state, status.attempt, status.reason = types.STEP_STATE_RUNNING, last, ""
        for gone in ("failure", "finished_at", "settlement"):
            status.ClearField(gone)
        return FoundStep(status, [*(_over(each) for each in attempts[:-1]), attempts[-1]])
    if begun is not None and not tried:
        status.state, status.reason = types.STEP_STATE_PENDING, ""
        return FoundStep(status)
    if is_idempotent(step):
        if tried:
            status.state, status.attempt, status.reason = types.STEP_STATE_WAITING, tried, "retry"
            attempts = [each for each in attempts if each.attempt != tried] + [_lost(tried)]
        else:
            status.state = types.STEP_STATE_PENDING
        return FoundStep(status, [_over(each) for each in attempts])
    message = f"the agent's journal was lost, and whether step {step.name} was carried out can't be known"
    status.state, status.reason = types.STEP_STATE_UNKNOWN, message
    status.failure.CopyFrom(failure_of(OutriderError(message, code="journal_lost", hint="look, and resolve it")))
    status.finished_at.GetCurrentTime()
    return FoundStep(status, [_over(each) for each in attempts])


def _attempt(number: int, info: ContainerInfo) -> AttemptRecord:
    phase: Phase = "started" if info.started_at is not None else "intended"
    return AttemptRecord(number, info.name, phase, "", 0.0, info.labels.get(LABEL_BOOT, ""))


def _over(attempt: AttemptRecord) -> AttemptRecord:
    return replace(attempt, phase="done")


def _lost(number: int) -> AttemptRecord:
    return AttemptRecord(number, "", "done", "", 0.0, "")


def _begun(directory: Path) -> dict[str, int] | None:
    """The steps that were begun, and the greatest number of their attempts.

    A run's directory is made before its first step, a step's before its first container, and both stay until the run
    is over: where the one is there and the other is not, the step has not begun. (They are not synced by themselves;
    the intent, which is, comes after them, and journalling filesystems keep that order.)
    """
    if not directory.is_dir():
        return None
    return {
        step.name: max((int(each.name) for each in step.iterdir() if each.name.isdecimal()), default=1)
        for step in directory.iterdir()
    }


def _volume_directories(root: Path, run_ids: Iterable[str]) -> list[Path]:
    # Those of runs that nobody knows any more are left to the clean-up, which goes by their age.
    patterns = (*(f"run/{run_id}/*" for run_id in run_ids), "object/*/*/*", "node/*")
    return [path for pattern in patterns for path in root.glob(pattern) if path.is_dir() and not path.is_symlink()]


def _volume_changes(root: Path, path: Path) -> list[Change]:
    """A volume, kept until somebody says otherwise: whether it was to be kept is not known any more."""
    relative = path.relative_to(root).as_posix()
    scope, *owner, name = relative.split("/")
    volume = (scope, "/".join(owner), name, relative)
    sql = "INSERT OR IGNORE INTO volumes (scope, owner, name, path, keep) VALUES (?, ?, ?, ?, 1)"
    changes = [_statement(sql, volume)]
    uid = path.stat().st_uid
    if scope != "node" and FIRST_UID <= uid <= LAST_UID:
        identity = (f"{scope}:{'/'.join(owner)}", uid)
        changes.append(_statement("INSERT OR IGNORE INTO identities (owner, uid) VALUES (?, ?)", identity))
    return changes


def _managed_changes(root: Path, info: ContainerInfo) -> list[Change]:
    labels = info.labels
    attempt = labels.get(LABEL_ATTEMPT, "")
    row = (
        info.name,
        labels.get(LABEL_SPEC, ""),
        # One that was to take another's place, or to leave its own: what becomes of it is settled once this is over.
        "starting" if info.name.endswith(NEXT) else "aside" if info.name.endswith(PREVIOUS) else "ready",
        labels.get(LABEL_RUN, ""),
        labels.get(LABEL_STEP, ""),
        int(attempt) if attempt.isdecimal() else 0,
        labels.get(LABEL_OBJECT) or None,
        DEFAULT_GRACE_S,
        labels.get(LABEL_SUPERVISION, "{}"),
    )
    sql = (
        "INSERT OR IGNORE INTO managed (name, digest, state, run_id, step, attempt, object_ref, grace_s, supervision)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    changes = [_statement(sql, row)]
    sql = "INSERT OR IGNORE INTO port_leases (port, protocol, owner, name) VALUES (?, ?, ?, ?)"
    for name, port, protocol in ports_of(info):
        changes.append(_statement(sql, (port, protocol, info.name, name)))
    sql = "INSERT OR IGNORE INTO volume_uses (path, container) VALUES (?, ?)"
    for mount in info.mounts:
        source = Path(mount.source)
        if source.is_relative_to(root.resolve()):
            changes.append(_statement(sql, (source.relative_to(root.resolve()).as_posix(), info.name)))
    return changes


def _statement(sql: str, row: Sequence[Any]) -> Change:
    return lambda db: db.execute(sql, row)

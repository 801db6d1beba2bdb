"""The run engine: takes runs on, keeps each going in a task of its own, picks them up again after a restart."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Iterable

import structlog

from agent_core.execution import RunExecution
from agent_core.services import Services
from agent_core.state import Cancellation, RunRecord, damaged_record
from agent_core.transitions import Transition
from outrider.errors import Conflict, InvalidInput, OutriderError, PermanentError
from outrider.pipeline import Pipeline, graph, load_pipeline
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import failure_of

_RUN_ID = re.compile(r"[a-z0-9]{1,64}")

log = structlog.get_logger(__name__)


class RunEngine:
    """All runs of this node that are not terminal."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._active: dict[str, RunExecution] = {}

    @property
    def active(self) -> list[str]:
        """Ids of the runs that are not terminal."""
        return list(self._active)

    @property
    def objects(self) -> set[str]:
        """The objects (``kind/name``) that they are for."""
        return {run.object_ref for run in self._active.values() if run.object_ref}

    def describe(self) -> list[dict[str, object]]:
        """The active runs for the local status: their steps and what each waits for."""
        return [
            {
                "run_id": run.run_id,
                "state": types.RunState.Name(run.state).removeprefix("RUN_STATE_").lower(),
                "steps": {
                    name: types.StepState.Name(each.state).removeprefix("STEP_STATE_").lower()
                    + (f": {each.reason}" if each.reason else "")
                    for name, each in run.statuses.items()
                },
            }
            for run in self._active.values()
        ]

    async def accept(self, run: pb.RunPipeline, *, command_id: str, digest: bytes) -> None:
        """Take a run on. When this returns it is on the disk; the same run again changes nothing.

        Raises InvalidInput if the pipeline is not what was announced or can't be read, Conflict if the run is held
        under another lease.
        """
        if not _RUN_ID.fullmatch(run.run_id):
            # It becomes part of paths and of containers' names.
            raise InvalidInput(f"{run.run_id[:64]!r} is not the id of a run", code="bad_run_id")
        state = self._services.state
        lease = state.lease_of(run.run_id)
        if lease is not None:
            if lease != run.lease_id:
                raise Conflict(f"run {run.run_id} is held under another lease", code="lease_mismatch")
            await state.commit(Transition.COMMAND_RECEIVED, state.command_received(command_id, digest))
            await self.retell([run.run_id])  # where it is over, its end is what the server has lost
            return
        if hashlib.sha256(run.pipeline_yaml).digest() != run.pipeline_sha256:
            raise InvalidInput(f"the pipeline of run {run.run_id} is not the one announced", code="digest_mismatch")
        self._services.disk.check(f"take on run {run.run_id}")
        pipeline = load_pipeline(run.pipeline_yaml)
        statuses = first_statuses(pipeline, run)
        report = pb.RunReport(
            run_id=run.run_id, lease_id=run.lease_id, state=types.RUN_STATE_DISPATCHED, steps=statuses
        )
        await state.commit(
            Transition.RUN_ACCEPTED,
            state.command_received(command_id, digest),
            state.accept_run(run, statuses),
            self._services.outbox.run_report(report),
        )
        self._services.outbox.notify()
        record = state.find(run.run_id)
        assert record is not None
        log.info("run accepted", run=run.run_id, pipeline=pipeline.name, steps=len(statuses))
        self._start(record)

    async def cancel(self, run_id: str, cancellation: Cancellation, *, command_id: str, digest: bytes) -> None:
        """Stop a run, durably; one that is terminal or not known is left as it is."""
        state = self._services.state
        await state.commit(
            Transition.RUN_CANCELLED,
            state.command_received(command_id, digest),
            state.cancel_run(run_id, cancellation),
        )
        run = self._active.get(run_id)
        if run is not None:
            log.info("run cancelled", run=run_id, reason=cancellation.reason)
            run.cancel(cancellation)

    async def retell(self, run_ids: Iterable[str]) -> None:
        """Report once more how these runs ended. Of those that are not known any more nothing can be said."""
        services = self._services
        reports = services.state.ends(run_ids)
        if reports:
            log.info("runs are reported once more", runs=[report.run_id for report in reports])
            await services.state.commit(Transition.RUN_RETOLD, *(services.outbox.run_report(each) for each in reports))
            services.outbox.notify()

    def resume(self) -> None:
        """Go on with the runs that the journal has; their containers may have ended long ago, or still run."""
        records, unreadable = self._services.state.unfinished()
        for held, error in unreadable:
            log.error("a run's record in the journal can't be read", run=held.run_id, error=str(error))
            abandoning = self._abandon(held.run_id, held.lease_id, damaged_record(error))
            self._services.background.start(abandoning, f"run {held.run_id}")
        for record in records:
            log.info("run resumed", run=record.command.run_id, attempts=len(record.attempts))
            self._start(record)

    def _start(self, record: RunRecord) -> None:
        run = RunExecution(self._services, record)
        self._active[run.run_id] = run
        self._services.background.start(self._drive(run), f"run {run.run_id}")

    async def _drive(self, run: RunExecution) -> None:
        try:
            await run.run()
        except Exception as error:  # a defect of ours must not leave a run without an end
            log.exception("a run failed in the agent itself", run=run.run_id)
            await self._give_up(run, error)
        self._active.pop(run.run_id, None)
        self._services.netpool.release(run.run_id)
        try:
            await self._services.volumes.release_run(run.run_id)
        except OutriderError as error:
            log.warning("a run's volumes can't be removed now", run=run.run_id, error=str(error))
        # Each attempt's goes with its container. The run's goes behind them, with what a former agent died before the
        # removal of: until then it says which steps were begun.
        directory = self._services.attempts_dir / run.run_id
        self._services.removals.add(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))

    async def _give_up(self, run: RunExecution, error: Exception) -> None:
        self._services.operations.failed("run", PermanentError(str(error), code="internal"))
        await self._abandon(run.run_id, run.lease_id, error)

    async def _abandon(self, run_id: str, lease_id: str, error: Exception) -> None:
        state, failure = self._services.state, failure_of(error)
        report = pb.RunReport(run_id=run_id, lease_id=lease_id, state=types.RUN_STATE_UNKNOWN, failure=failure)
        report.finished_at.GetCurrentTime()
        await state.commit(
            Transition.RUN_GIVEN_UP,
            *self._services.spool.abandon(run_id),
            *state.give_up(run_id, failure),
            self._services.outbox.run_report(report),
        )
        self._services.outbox.notify()


def first_statuses(pipeline: Pipeline, run: pb.RunPipeline) -> list[types.StepStatus]:
    """The steps as the run begins with them: those that it takes over from another run are over already.

    Raises InvalidInput if it takes over what is no finished step of this pipeline.
    """
    needs = graph(pipeline)
    taken_over = {status.name: status for status in run.finished}
    wrong = [
        name for name, status in taken_over.items() if name not in needs or status.state != types.STEP_STATE_SUCCEEDED
    ]
    if wrong:
        raise InvalidInput(f"run {run.run_id} can't take over step {wrong[0]!r}", code="bad_finished_step")
    return [
        taken_over.get(step.name)
        or types.StepStatus(name=step.name, uses=step.uses, state=types.STEP_STATE_PENDING, needs=needs[step.name])
        for step in pipeline.steps
    ]

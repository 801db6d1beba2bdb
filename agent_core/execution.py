"""One run: its graph of steps from acceptance to its terminal state.

What is decided is journalled together with the report of it. Everything that is needed to go on after a
restart is in the journal, but for the envs, which live in memory alone and are asked for again.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import structlog

from agent_core.attempt import Attempt
from agent_core.identities import owner_of
from agent_core.planning import PlannedStep, Planner
from agent_core.services import Services
from agent_core.state import TERMINAL_STEPS, Cancellation, Change, RunRecord
from agent_core.stepping import StepRunner
from agent_core.transitions import Transition
from agent_core.volumes import AllottedVolume
from outrider.errors import NotFound, OperationTimeout, OutriderError, PermanentError
from outrider.expressions import evaluate_condition, references, render
from outrider.pipeline import (
    Pipeline,
    Step,
    ancestors,
    env_references,
    graph,
    load_pipeline,
    plain_envs,
)
from outrider.steps import ObjectContext
from outrider.v1 import node_service_pb2 as pb
from outrider.v1 import types_pb2 as types
from outrider.wire import dump_json, failure_of, load_json_object, seconds, timestamp

log = structlog.get_logger(__name__)

Envs = tuple[dict[str, str], frozenset[str]]  # values by name; the names of the secret ones

OUTCOMES = {
    types.STEP_STATE_SUCCEEDED: "succeeded",
    types.STEP_STATE_FAILED: "failed",
    types.STEP_STATE_SKIPPED: "skipped",
    types.STEP_STATE_CANCELLED: "cancelled",
    types.STEP_STATE_UNKNOWN: "unknown",
}
# Images that are here already answer at once. What does not exist is told before anything starts, if it is
# known by then; a long pull goes on beside the first steps.
_IMAGES_SETTLE_S = 2.0


class RunExecution:
    """Drives one run. `run` returns when it is terminal; cancelling it leaves the containers to the next agent."""

    def __init__(self, services: Services, record: RunRecord) -> None:
        self.services = services
        self.command = record.command
        self.run_id = record.command.run_id
        self.lease_id = record.command.lease_id
        self.record = record
        self.statuses = {name: each.status for name, each in record.steps.items()}
        self.state: types.RunState.ValueType = record.state
        self.cancellation = record.cancel
        self.volumes: dict[str, AllottedVolume] = {}
        self.plans: dict[str, PlannedStep] = {}
        self.secrets: tuple[str, ...] = ()
        self.secrets_known = False
        self.uid = self.gid = -1
        self.pipeline: Pipeline
        self.planner: Planner
        ref = record.command.object.ref
        self.object_ref = f"{ref.kind}/{ref.name}" if record.command.HasField("object") else None
        self._context: dict[str, Any] = {}
        self._done: dict[str, asyncio.Event] = {}
        self._attempts: dict[str, Attempt] = {}
        self._cancelled = asyncio.Event()
        self._timed_out = False
        self._envs: asyncio.Task[Envs | OutriderError] | None = None
        self._started_at = record.started_at

    # What others may do with a run.

    def cancel(self, cancellation: Cancellation) -> None:
        """Stop it: grace, then kill. What is journalled by the caller; idempotent."""
        self.cancellation = self.cancellation or cancellation
        self._cancelled.set()
        for name, attempt in self._attempts.items():
            if not self._is_cleanup(self.pipeline.step(name)):
                attempt.stop("timeout" if self._timed_out else "cancelled", cancellation.grace_s)

    async def run(self) -> None:
        """Until it is terminal."""
        try:
            await self._prepare()
        except OutriderError as error:
            await self._finish(error)
            return
        timer = self._start_timer()
        if self.cancellation is not None:
            self._cancelled.set()
        try:
            async with asyncio.TaskGroup() as group:
                if any("." in each for each in env_references(self.pipeline)):
                    self._envs = group.create_task(self._ask_for_envs())
                for step in self.pipeline.steps:
                    group.create_task(self._step(step))
                for done in self._done.values():
                    await done.wait()
                if self._envs is not None:
                    self._envs.cancel()
        finally:
            if timer is not None:
                timer.cancel()
        await self._finish(None)

    # Preparation: nothing has been started yet when any of this fails.

    async def _prepare(self) -> None:
        command = self.command
        self.pipeline = load_pipeline(command.pipeline_yaml)
        self._done = {step.name: asyncio.Event() for step in self.pipeline.steps}
        object_ = None
        context: dict[str, Any] = {
            "args": load_json_object(command.args_json, "args"),
            "node": {**self.services.facts, "id": self.services.config.node_id},
            "run": {"id": self.run_id, "pipeline": self.pipeline.name, "sequence": command.sequence},
        }
        if command.HasField("object"):
            ref = command.object.ref
            attributes = load_json_object(command.object.attributes_json, "attributes")
            object_ = ObjectContext(ref.kind, ref.name, attributes)
            version = command.object.version
            context["object"] = {"kind": ref.kind, "name": ref.name, "attributes": attributes, "version": version}
        services = self.services
        await asyncio.to_thread((services.attempts_dir / self.run_id).mkdir, parents=True, exist_ok=True)
        self.planner = Planner(self.pipeline, self.run_id, services.plugins, services.policy, services.facts, object_)
        self.planner.check()
        self.uid, self.gid = await services.identities.allot(owner_of(self.run_id, self.object_ref))
        for name, volume in self.pipeline.volumes.items():
            self.volumes[name] = await services.volumes.allot(
                self.run_id, self.object_ref, name, volume.scope, volume.keep, volume.size_bytes
            )
        context["volumes"] = {name: {"host_path": each.host_path} for name, each in self.volumes.items()}
        self._context = context
        await self._plan_ahead()
        await self._pull_ahead()

    async def _plan_ahead(self) -> None:
        """Plan all steps whose parameters are known by now; what is wrong with a step that surely runs is told now."""
        for step in self.pipeline.steps:
            record = self.record.steps.get(step.name)
            if record is not None and record.status.state in TERMINAL_STEPS:
                continue
            if record is not None and record.plan is not None:
                self.plans[step.name] = self.planner.recall(step, record.plan, record.params or {})
            elif not any(each == "steps" or each.startswith("steps.") for each in references(step.with_)):
                try:
                    # A plugin's code may take its time; the agent must not.
                    self.plans[step.name] = await asyncio.to_thread(self.planner.plan, step, self.context())
                except OutriderError:
                    if step.if_ is None:
                        raise

    async def _pull_ahead(self) -> None:
        fresh = [step for step in self.pipeline.steps if step.name in self.plans and not self.record.attempts]
        images = {self.plans[step.name].plan.image: step for step in fresh if step.if_ is None}

        async def ensure(image: str) -> OutriderError | None:
            try:
                await self.services.images.ensure(image, run=self.run_id)
            except OutriderError as error:
                return error
            return None

        results: dict[str, OutriderError | None] = {}

        async def ensure_all() -> None:
            async def one(image: str) -> None:
                results[image] = await ensure(image)

            async with asyncio.TaskGroup() as group:
                for image in images:
                    group.create_task(one(image))

        pulling = self.services.background.start(ensure_all(), f"images of {self.run_id}")
        await asyncio.wait({pulling}, timeout=_IMAGES_SETTLE_S)
        for image, error in results.items():
            if isinstance(error, PermanentError):
                raise PermanentError(
                    f"step {images[image].name}: {error.message}", code=error.code, hint=error.hint
                ) from error

    def _start_timer(self) -> asyncio.TimerHandle | None:
        limit_s = seconds(self.command.timeout)
        if limit_s <= 0:
            return None
        spent_s = self.record.spent_s + self.services.state.clock.since(self.record.boot_id, self.record.boot_clock)
        left = limit_s - spent_s

        def over() -> None:
            self._timed_out = True
            self.cancel(Cancellation("the run's timeout is over", self.services.config.cancel_grace_s))

        return asyncio.get_running_loop().call_later(max(0.0, left), over)

    async def _ask_for_envs(self) -> Envs | OutriderError:
        try:
            return await self.services.envs.get_envs(self.run_id, self.lease_id)
        except OutriderError as error:
            return error  # for the steps that need them; the others go on

    # Steps.

    async def _step(self, step: Step) -> None:
        for need in graph(self.pipeline)[step.name]:
            await self._done[need].wait()
        status = self.statuses[step.name]
        try:
            if status.state not in TERMINAL_STEPS and await self._is_to_run(step, status):
                await StepRunner(self, step, status).run()
        except OutriderError as error:
            await self.fail(status, error)
        except Exception as error:  # a defect of ours must end the step, not hang the run
            log.exception("a step failed in the agent itself", run=self.run_id, step=step.name)
            await self.fail(status, PermanentError(f"step {step.name} failed in the agent: {error}", code="internal"))
        self._done[step.name].set()

    async def _is_to_run(self, step: Step, status: types.StepStatus) -> bool:
        if step.name in self.record.attempts:
            return True  # it was decided before the agent was restarted
        before = ancestors(self.pipeline)[step.name]
        outcomes = [OUTCOMES[self.statuses[each].state] for each in before]
        if self._cancelled.is_set() and not self._is_cleanup(step):
            reason = "the run's timeout is over" if self._timed_out else "the run was cancelled"
            await self.end(status, types.STEP_STATE_CANCELLED, reason=reason)
            return False
        if evaluate_condition(step.if_, self.context(), outcomes):
            return True
        unknown = [name for name in before if self.statuses[name].state == types.STEP_STATE_UNKNOWN]
        failed = [name for name in before if self.statuses[name].state == types.STEP_STATE_FAILED]
        if unknown:
            reason = f"what became of step {unknown[0]} is not known"
        elif failed:
            reason = f"step {failed[0]} failed"
        else:
            reason = "its condition is false"
        await self.end(status, types.STEP_STATE_SKIPPED, reason=reason)
        return False

    @staticmethod
    def _is_cleanup(step: Step) -> bool:
        """Steps that are to run whatever happened also run when the run is cancelled."""
        return step.if_ is not None and "always()" in step.if_.replace(" ", "")

    def context(self) -> dict[str, Any]:
        """What expressions see now."""
        steps: dict[str, Any] = {}
        for name, status in self.statuses.items():
            if status.state in OUTCOMES:
                steps[name] = {"outcome": OUTCOMES[status.state]}
                if status.state == types.STEP_STATE_SUCCEEDED:
                    steps[name]["outputs"] = load_json_object(status.outputs_json, "outputs")
        return {**self._context, "steps": steps}

    def stopping(self, step: Step) -> bool:
        """Whether no new attempt of this step may begin."""
        return self._cancelled.is_set() and not self._is_cleanup(step)

    async def wait_unless_cancelled(self, step: Step, wait_s: float) -> None:
        """Sleep, but not into a cancellation."""
        if self._is_cleanup(step):
            await asyncio.sleep(wait_s)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._cancelled.wait()

    def running(self, step: str, attempt: Attempt | None) -> None:
        """The attempt that a cancellation has to reach; None: there is none any more."""
        if attempt is None:
            self._attempts.pop(step, None)
            return
        self._attempts[step] = attempt
        if self.stopping(self.pipeline.step(step)):
            assert self.cancellation is not None
            attempt.stop("timeout" if self._timed_out else "cancelled", self.cancellation.grace_s)

    async def step_env(
        self, step: Step, status: types.StepStatus, *, within_s: float | None = None, secrets: bool = False
    ) -> dict[str, str]:
        """The values allotted to ``step``. Waits for the server as long as the step's timeout (or ``within_s``) lets
        it; ``secrets``: also where none is allotted, because the secrets of the run are needed."""
        values: dict[str, str] = {}
        asked_at = self.services.state.clock.now()
        wanted = secrets or any("." in each for each in step.envs.values())
        if self._envs is not None and (self._envs.done() or wanted):
            if not self._envs.done():
                # On the way most of the time: only what takes a while is worth telling.
                await asyncio.wait({self._envs}, timeout=0.5)
            if not self._envs.done():
                # An attempt that goes on has its own beginning in the journal.
                ready = [self.services.state.step_ready(self.run_id, step.name, asked_at)] if within_s is None else []
                await self.waiting(status, "envs", *ready)
            if within_s is None:
                within_s = self._left_s(step, asked_at)
            try:
                values, secret_names = await self._with_deadline(step, within_s)
            except PermanentError:
                if wanted:
                    raise
            else:
                self.secrets = tuple(sorted({values[name] for name in secret_names if values.get(name)}))
                self.secrets_known = True
        values = {**plain_envs(self.pipeline), **values}
        missing = [reference for reference in step.envs.values() if reference not in values]
        if missing:
            raise NotFound(f"step {step.name}: the server has no env {', '.join(missing)}", code="env_not_found")
        return {name: values[reference] for name, reference in step.envs.items()}

    def _left_s(self, step: Step, asked_at: float) -> float:
        """What is left of the time that ``step`` may wait; former agents have had their part of it."""
        clock, record = self.services.state.clock, self.record.steps.get(step.name)
        if record is None or record.ready_boot_id is None:
            waited_s = clock.now() - asked_at
        else:
            waited_s = record.ready_spent_s + clock.since(record.ready_boot_id, record.ready_clock)
        return max(0.0, (step.timeout_s or self.services.config.step_timeout_s) - waited_s)

    async def _with_deadline(self, step: Step, within_s: float) -> Envs:
        assert self._envs is not None
        stop = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({self._envs, stop}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if self._envs.done():
            answer = self._envs.result()
            if isinstance(answer, OutriderError):
                raise answer
            return answer
        if self.stopping(step):
            raise OutriderError(f"step {step.name} was cancelled", code="cancelled")
        raise OperationTimeout(f"step {step.name} did not get its envs within its timeout", code="step_timeout")

    # What is told and journalled.

    async def commit(self, transition: Transition, status: types.StepStatus, *changes: Change) -> None:
        """The status of a step and what belongs to it, in one transaction with its report."""
        state, run = self.services.state, []
        if self.state == types.RUN_STATE_DISPATCHED and status.state not in TERMINAL_STEPS:
            self.state = types.RUN_STATE_RUNNING
            self._started_at = time.time()
            run = [state.run_state(self.run_id, self.state, started_at=self._started_at)]
        report = self._report(status)
        await state.commit(
            transition, *run, state.step_status(self.run_id, status), *changes, self.services.outbox.run_report(report)
        )
        self.services.outbox.notify()

    async def waiting(self, status: types.StepStatus, reason: str, *changes: Change) -> None:
        """The step is ready to start and waits for ``reason``; "": not any more."""
        status.state = types.STEP_STATE_WAITING if reason else types.STEP_STATE_RUNNING
        status.reason = reason
        await self.commit(Transition.STEP_WAITING, status, *changes)

    async def end(
        self, status: types.StepStatus, state: types.StepState.ValueType, *changes: Change, reason: str = ""
    ) -> None:
        """The step is terminal."""
        status.state, status.reason = state, reason
        status.finished_at.GetCurrentTime()
        await self.commit(Transition.ATTEMPT_SETTLED if changes else Transition.STEP_ENDED, status, *changes)

    async def fail(self, status: types.StepStatus, error: OutriderError) -> None:
        """The step is terminal, and this is why."""
        status.failure.CopyFrom(failure_of(error))
        state = types.STEP_STATE_CANCELLED if error.code == "cancelled" else types.STEP_STATE_FAILED
        await self.end(status, state)

    def _report(self, *steps: types.StepStatus) -> pb.RunReport:
        return pb.RunReport(
            run_id=self.run_id,
            lease_id=self.lease_id,
            state=self.state,
            steps=steps,
            started_at=timestamp(self._started_at),
        )

    def progress(self, status: types.StepStatus) -> None:
        """Tell how far a step is; kept by nobody."""
        self.services.live(self._report(status))

    # The end.

    async def _finish(self, refused: OutriderError | None) -> None:
        services, state = self.services, self.services.state
        changes: list[Change] = []
        open_steps = [each for each in self.statuses.values() if each.state not in TERMINAL_STEPS]
        for status in open_steps:  # only of a run that was refused before any step
            status.state, status.reason = types.STEP_STATE_SKIPPED, "the run could not begin"
            changes.append(state.step_status(self.run_id, status))
        if refused is None:
            changes += self._write_back()
        report = self._report(*open_steps)
        report.state, step_failure = self._outcome(refused)
        if refused is not None:
            report.failure.CopyFrom(failure_of(refused))
        elif step_failure is not None:
            report.failure.CopyFrom(step_failure)
        report.finished_at.GetCurrentTime()
        self.state = report.state
        changes += [
            state.run_state(self.run_id, report.state, failure=report.failure, finished_at=time.time()),
            services.outbox.run_report(report),
        ]
        await state.commit(Transition.RUN_FINISHED, *changes)
        services.outbox.notify(urgent=True)
        log.info("run finished", run=self.run_id, state=types.RunState.Name(report.state), error=report.failure.message)

    def _outcome(self, refused: OutriderError | None) -> tuple[types.RunState.ValueType, types.Failure | None]:
        by_state: dict[int, list[types.StepStatus]] = {}
        for status in self.statuses.values():
            by_state.setdefault(status.state, []).append(status)
        if self._timed_out and not by_state.keys().isdisjoint({types.STEP_STATE_CANCELLED, types.STEP_STATE_FAILED}):
            error = OperationTimeout("the run did not end within its timeout", code="run_timeout")
            return types.RUN_STATE_FAILED, failure_of(error)
        if types.STEP_STATE_CANCELLED in by_state:
            reason = self.cancellation.reason if self.cancellation else ""
            message = f"the run was cancelled: {reason}" if reason else "the run was cancelled"
            return types.RUN_STATE_CANCELLED, failure_of(OutriderError(message, code="cancelled"))
        if refused is not None or types.STEP_STATE_FAILED in by_state:
            failed = by_state.get(types.STEP_STATE_FAILED)
            return types.RUN_STATE_FAILED, failed[0].failure if failed else None
        if types.STEP_STATE_UNKNOWN in by_state:
            return types.RUN_STATE_UNKNOWN, by_state[types.STEP_STATE_UNKNOWN][0].failure
        return types.RUN_STATE_SUCCEEDED, None

    def _write_back(self) -> list[Change]:
        """What the run learned, in failed runs too. An attribute whose steps did not get so far is left out."""
        context = self.context()
        outcomes = [OUTCOMES[each.state] for each in self.statuses.values()]
        request = pb.WriteBackRequest(
            request_id=f"{self.run_id}:{self.lease_id}", run=pb.RunRef(run_id=self.run_id, lease_id=self.lease_id)
        )
        for item in self.pipeline.writeback:
            try:
                if not evaluate_condition(item.if_, context, outcomes, implied_success=False):
                    continue
                value = render(item.value, context)
            except OutriderError as error:
                log.info(
                    "an attribute is not written back", run=self.run_id, attribute=item.attribute, error=str(error)
                )
                continue
            request.attributes.add(name=item.attribute, value_json=dump_json(value))
        return [self.services.outbox.write_back(request)] if request.attributes else []

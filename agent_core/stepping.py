"""One step of a run: its attempts, one after the other, until it is terminal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from agent_core.attempt import Attempt
from agent_core.orders import AttemptOrder, AttemptResult
from agent_core.planning import PlannedStep
from agent_core.state import AttemptRecord
from agent_core.stepfiles import ProgressLine
from agent_core.transitions import Transition
from outrider.errors import ErrorClass, OutriderError, PermanentError
from outrider.pipeline import Step
from outrider.retry import RetryPolicy
from outrider.steps import StepOutcome
from outrider.v1 import types_pb2 as types
from outrider.wire import dump_json, failure_of

if TYPE_CHECKING:
    from agent_core.execution import RunExecution

log = structlog.get_logger(__name__)

_ENGINE_STOPS = 5  # tries that an engine's restarts may cost an idempotent step, beside its own retries
_KEPT_ERRORS = 10


class StepRunner:
    """Brings one step to its end."""

    def __init__(self, run: RunExecution, step: Step, status: types.StepStatus) -> None:
        self._run = run
        self._services = run.services
        self._step = step
        self._status = status
        self._step_type = run.planner.step_type(step)
        self._idempotent = self._step_type.idempotent if step.idempotent is None else step.idempotent
        self._engine_stops = 0

    async def run(self) -> None:
        """Until the step is terminal, whatever became of it."""
        run, step, status = self._run, self._step, self._status
        former = run.record.attempts.get(step.name)
        adopted = former if former is not None and former.phase != "done" else None
        number = 1 if former is None else former.attempt + (adopted is None)
        retries = RetryPolicy(first_wait_s=step.retry.first_wait_s, max_retries=step.retry.max)
        planned = run.plans.get(step.name)
        if planned is None:
            planned = await asyncio.to_thread(run.planner.plan, step, run.context())
        while True:
            if adopted is None and run.stopping(step):
                raise OutriderError(f"step {step.name} was cancelled", code="cancelled")
            result, attempt = await self._attempt(number, planned, adopted)
            adopted = None
            tried_again = self._is_to_be_tried_again(number, result)
            await self._settle(number, result, tried_again)
            self._services.removals.add(attempt.discard())
            if not tried_again:
                return
            wait_s = retries.wait_s(number)
            log.info("step is tried again", run=run.run_id, step=step.name, attempt=number + 1, wait_s=round(wait_s, 2))
            await run.wait_unless_cancelled(step, wait_s)
            number += 1
            status.ClearField("progress")

    async def _attempt(
        self, number: int, planned: PlannedStep, adopted: AttemptRecord | None
    ) -> tuple[AttemptResult, Attempt]:
        run, step, services = self._run, self._step, self._services
        timeout_s = step.timeout_s or services.config.step_timeout_s
        asked_at = services.state.clock.now()
        env: dict[str, str] = {}
        secrets: tuple[str, ...] = ()
        unavailable: OutriderError | None = None
        if adopted is None:
            env, secrets = await run.step_env(step, self._status), run.secrets
        else:
            timeout_s = max(
                0.0, timeout_s - adopted.spent_s - services.state.clock.since(adopted.boot_id, adopted.boot_clock)
            )
            try:
                env = await run.step_env(step, self._status, within_s=timeout_s, secrets=adopted.masked)
                secrets = run.secrets if adopted.masked else ()
            except OutriderError as error:
                # Its container is stopped in order, or seen to its end, all the same.
                unavailable = error
            if self._status.reason:
                await run.waiting(self._status, "")
            timeout_s -= services.state.clock.now() - asked_at
        order = AttemptOrder(
            run_id=run.run_id,
            lease_id=run.lease_id,
            step=step.name,
            number=number,
            plan=planned.plan,
            plan_sha256=planned.sha256,
            inputs=planned.inputs,
            env=env,
            secrets=secrets,
            masked=run.secrets_known if adopted is None else adopted.masked,
            unavailable=unavailable,
            volumes={name: (run.volumes[name], each.path, each.writable) for name, each in step.volumes.items()},
            uid=run.uid,
            gid=run.gid,
            resources=planned.resources,
            object_ref=run.object_ref,
            timeout_s=max(0.0, timeout_s),
            engine_boot=adopted.engine_boot if adopted is not None else "",
        )

        async def begin() -> None:
            await self._begin(order, planned)

        async def waiting(reason: str) -> None:
            await run.waiting(self._status, reason)

        attempt = Attempt(services, order, begin=begin, on_waiting=waiting, on_progress=self._progress)
        if adopted is None and services.plugins.listens("outrider_before_step"):
            await asyncio.to_thread(services.plugins.before_step, step.uses, planned.context, planned.plan)
        run.running(step.name, attempt)
        try:
            result = await attempt.run(adopted)
        finally:
            run.running(step.name, None)
        if result.error is None and result.outputs and unavailable is not None:
            result.error, result.outputs = unavailable, {}  # whether a secret is among them can't be known
        if result.error is None:
            try:
                result.outputs = await asyncio.to_thread(run.planner.outputs, step, result.outputs, run.secrets, env)
            except OutriderError as error:
                result.error, result.outputs = error, {}
        await self._hooks(planned, result)
        return result, attempt

    async def _begin(self, order: AttemptOrder, planned: PlannedStep) -> None:
        """The intent, on the disk before anything is created."""
        status, state = self._status, self._services.state
        status.state, status.attempt, status.reason = types.STEP_STATE_RUNNING, order.number, ""
        status.image = order.plan.image
        status.ClearField("failure")
        if not status.HasField("started_at"):
            status.started_at.GetCurrentTime()
        boot = self._services.engine.boot
        await self._run.commit(
            Transition.ATTEMPT_INTENDED,
            status,
            state.step_plan(order.run_id, order.step, planned.plan_json, planned.params_json),
            state.attempt_intent(order.run_id, order.step, order.number, order.container, boot, masked=order.masked),
        )

    async def _hooks(self, planned: PlannedStep, result: AttemptResult) -> None:
        plugins, uses = self._services.plugins, self._step.uses
        error = result.error
        if error is not None and result.exit_code not in (None, 0) and not result.cancelled and not result.uncertain:
            assert result.exit_code is not None
            word = await asyncio.to_thread(plugins.classify, uses, result.exit_code, error.message)
            if word is not None and word is not error.error_class:
                kind = {ErrorClass.PERMANENT: PermanentError}.get(word, OutriderError)
                result.error = kind(error.message, code=error.code, hint=error.hint)
                result.error.error_class = word
        if not plugins.listens("outrider_after_step"):
            return
        outcome = StepOutcome(
            exit_code=result.exit_code,
            succeeded=result.error is None,
            error_class=result.error.error_class if result.error else None,
            message=result.error.message if result.error else "",
            outputs=result.outputs,
        )
        await asyncio.to_thread(plugins.after_step, uses, planned.context, outcome)

    def _is_to_be_tried_again(self, number: int, result: AttemptResult) -> bool:
        if result.error is None or result.cancelled or self._run.stopping(self._step):
            return False
        if result.uncertain:
            self._engine_stops += 1
            return self._idempotent and self._engine_stops <= _ENGINE_STOPS
        kind = result.error.error_class
        again = kind is ErrorClass.TEMPORARY or (kind is ErrorClass.TIMEOUT and self._idempotent)
        return again and number - self._engine_stops <= self._step.retry.max

    async def _settle(self, number: int, result: AttemptResult, tried_again: bool) -> None:
        """The result, on the disk and on its way to the server, in one transaction with the end of its log."""
        run, status = self._run, self._status
        done = self._services.state.attempt_phase(run.run_id, self._step.name, number, "done")
        if result.exit_code is not None:
            status.exit_code = result.exit_code
        status.stdout_bytes, status.stderr_bytes = result.log_bytes
        if result.error is not None:
            status.failure.CopyFrom(failure_of(result.error))
            self._note(number, result, tried_again)
        if tried_again:
            status.state, status.reason = types.STEP_STATE_WAITING, "retry"
            await run.commit(Transition.ATTEMPT_RETRIED, status, done, *result.changes)
            return
        if result.error is None:
            status.ClearField("failure")
            status.outputs_json = dump_json(result.outputs)
            state = types.STEP_STATE_SUCCEEDED
        elif result.cancelled:
            state = types.STEP_STATE_CANCELLED
        elif result.uncertain:
            state = types.STEP_STATE_UNKNOWN
        else:
            state = types.STEP_STATE_FAILED
        reason = result.error.message if result.uncertain and result.error else ""
        await run.end(status, state, done, *result.changes, reason=reason)

    def _note(self, number: int, result: AttemptResult, tried_again: bool) -> None:
        """Keep how this attempt failed: the next one puts its own failure in place of this."""
        assert result.error is not None
        if result.cancelled:
            return
        error = self._status.errors.add(attempt=number, tried_again=tried_again, exit_code=result.exit_code or 0)
        error.failure.CopyFrom(self._status.failure)
        error.time.GetCurrentTime()
        del self._status.errors[:-_KEPT_ERRORS]
        counts = self._services.operations
        (counts.retried if tried_again else counts.failed)("step", result.error)

    def _progress(self, line: ProgressLine) -> None:
        self._status.progress.done, self._status.progress.total = line.done, line.total
        self._status.progress.unit, self._status.progress.message = line.unit, line.message
        self._run.progress(self._status)

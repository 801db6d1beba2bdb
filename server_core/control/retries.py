"""What operators decide about runs that did not end well: settling what is unknown, and trying again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from sqlalchemy import Connection

from outrider import wire
from outrider._schema_errors import schema_problems
from outrider.errors import Conflict, InvalidInput
from outrider.pipeline import Pipeline, Step
from outrider.v1 import control_service_pb2 as pb
from outrider.v1 import types_pb2
from server_core import checks, resuming
from server_core.access import current_caller
from server_core.bus.base import EVENTS, run_topic
from server_core.control.common import Context, request_digest
from server_core.control.runs import Runs, new_run_id
from server_core.store import audit, draining, events, nodes, objects, runs, settling
from server_core.store.commits import Commit
from server_core.store.tokens import Caller

MAX_OUTPUTS_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Retry:
    """What a retry is made with, checked before the transaction that makes it."""

    pipeline: Pipeline
    idempotent: frozenset[str]  # step types that may be carried out twice
    caller: Caller
    key: str
    digest: bytes
    reason: str
    from_step: str = ""
    refuse_if_busy: bool = False


class Retries(Runs):
    async def ResolveRun(self, request: pb.ResolveRunRequest, context: Context) -> types_pb2.Run:
        """Settle steps whose outcome is unknown. As VERDICT_RETRY, the run is retried once no step is unknown."""
        caller, digest = current_caller(), request_digest("ResolveRun", request)
        earlier = await self._answered(request, digest, types_pb2.Run)
        if earlier is not None:
            self._tell(earlier)
            return earlier
        run = await self._s.db.read(lambda c: runs.get(c, request.run_id))
        settlement = _settlement(request, caller)
        outputs = await self._outputs(request, run)
        asked = types_pb2.Settlement.VERDICT_RETRY
        retry = None
        if settlement.verdict == asked or any(step.settlement.verdict == asked for step in run.steps):
            key = f"{request.request_id}:retry"
            retry = await self._prepare(run, caller, key, digest, settlement.reason, allow_offline=True)

        def work(connection: Connection) -> types_pb2.Run:
            run = runs.get(connection, request.run_id)
            named = settling.resolve(connection, run, request.steps, settlement, outputs)
            data = {"steps": named, "as": settling.word(settlement.verdict)}
            audit.add(connection, caller, "resolve", "runs", run.run_id, reason=settlement.reason, data=data)
            told = data | {"by": caller.name, "reason": settlement.reason}
            events.add(connection, "run.resolved", run.run_id, node_id=run.node_id, data=told)
            run = runs.get(connection, run.run_id)
            if settling.wants_retry(run):
                if retry is None:
                    raise Conflict(
                        f"run {run.run_id} was changed by somebody else just now", hint="look, and try again"
                    )
                self._retry(connection, run, retry)
                run = runs.get(connection, run.run_id)
            return run

        run = await self._once("ResolveRun", Commit.RUN_RESOLVE, request, types_pb2.Run, work)
        self._tell(run)
        return run

    async def RetryRun(self, request: pb.RetryRunRequest, context: Context) -> types_pb2.Run:
        """A new run that takes over what the old one has finished."""
        caller, digest = current_caller(), request_digest("RetryRun", request)
        earlier = await self._answered(request, digest, types_pb2.Run)
        if earlier is not None:
            self._tell(earlier)
            return earlier
        run = await self._s.db.read(lambda c: runs.get(c, request.run_id))
        retry = await self._prepare(
            run,
            caller,
            request.request_id,
            digest,
            request.reason[: audit.MAX_REASON],
            from_step=request.from_step,
            refuse_if_busy=request.refuse_if_busy,
            allow_offline=request.allow_offline,
        )

        def work(connection: Connection) -> types_pb2.Run:
            return self._retry(connection, runs.get(connection, run.run_id), retry)

        made = await self._once("RetryRun", Commit.RUN_RETRY, request, types_pb2.Run, work)
        self._s.bus.publish(run_topic(run.run_id))
        self._tell(made)
        return self._shown(made)

    async def _prepare(
        self,
        run: types_pb2.Run,
        caller: Caller,
        key: str,
        digest: bytes,
        reason: str,
        *,
        from_step: str = "",
        refuse_if_busy: bool = False,
        allow_offline: bool,
    ) -> _Retry:
        """Everything about a retry that can be checked without the transaction: the node may have changed since."""
        node = await self._s.db.read(lambda c: nodes.get(c, run.node_id))
        if not (allow_offline or self._s.fleet.is_online(node.node_id)):
            raise self._s.fleet.offline_error(node.node_id)
        row = await self._s.db.read(lambda c: runs.row_of(c, run.run_id))
        assert row is not None
        pipeline = await asyncio.to_thread(checks.load, row.pipeline_yaml, b"")
        problems, _ = await self._problems(pipeline, run.node_id, None, json.loads(row.args_json))
        checks.refuse(f"run {run.run_id} can't be retried", problems)
        idempotent = frozenset(each.name for each in node.step_types if each.idempotent)
        return _Retry(pipeline, idempotent, caller, key, digest, reason, from_step, refuse_if_busy)

    def _retry(self, connection: Connection, run: types_pb2.Run, retry: _Retry) -> types_pb2.Run:
        """Accept the run that goes on from ``run``, in the caller's transaction."""
        _refuse_unfit(run)
        draining.refuse(connection, run.node_id)
        found = objects.get(connection, run.object) if run.HasField("object") else None
        if found is not None and retry.refuse_if_busy:
            self._refuse_busy(connection, run.object)

        def idempotent(step: Step) -> bool:
            return step.uses in retry.idempotent if step.idempotent is None else step.idempotent

        statuses = {status.name: status for status in run.steps}
        resumption = resuming.plan(retry.pipeline, run.run_id, statuses, idempotent, retry.from_step)
        taken_over = {status.name: status for status in resumption.taken_over}
        row = runs.row_of(connection, run.run_id)
        assert row is not None
        made = runs.accept(
            connection,
            runs.NewRun(
                run_id=new_run_id(),
                lease_id=settling.new_lease(),
                caller=retry.caller.key,
                key=retry.key,
                request_digest=retry.digest,
                pipeline=row.pipeline,
                pipeline_yaml=row.pipeline_yaml,
                pipeline_sha256=row.pipeline_sha256,
                node_id=row.node_id,
                object=None if row.object is None else types_pb2.Object.FromString(row.object),
                args=json.loads(row.args_json),
                env_names=json.loads(row.env_names_json),
                timeout_us=row.timeout_us,
                steps=[taken_over.get(each.name, each) for each in checks.first_statuses(retry.pipeline)],
                retry_of=row.run_id,
                finished=resumption.taken_over,
            ),
        )
        data = {"retry": made.run_id, "taken_over": list(taken_over), "again": resumption.again}
        audit.add(connection, retry.caller, "retry", "runs", run.run_id, reason=retry.reason, data=data)
        events.add(connection, "run.retried", run.run_id, node_id=run.node_id, data=data)
        accepted = {"pipeline": made.pipeline, "retry_of": run.run_id}
        events.add(connection, "run.accepted", made.run_id, node_id=run.node_id, data=accepted)
        return made

    async def _outputs(self, request: pb.ResolveRunRequest, run: types_pb2.Run) -> bytes:
        """What an operator says that a step gave, if the step type allows it. Raises InvalidInput."""
        if not request.outputs_json:
            return b""
        given = wire.load_json_object(request.outputs_json, "outputs")
        if request.verdict != types_pb2.Settlement.VERDICT_SUCCEEDED or len(request.steps) != 1:
            raise InvalidInput("outputs are those of the one step that is settled as succeeded", code="bad_outputs")
        outputs = wire.dump_json(given)
        if len(outputs) > MAX_OUTPUTS_BYTES:
            raise InvalidInput(
                f"the outputs have {len(outputs)} bytes; {MAX_OUTPUTS_BYTES} are allowed", code="too_large"
            )
        node = await self._s.db.read(lambda c: nodes.find(c, run.node_id))
        uses = next((step.uses for step in run.steps if step.name == request.steps[0]), "")
        known = {} if node is None else checks.step_types(node)
        if uses in known:
            problems = schema_problems(known[uses].outputs_schema, given, "outputs", f"step type {uses}")
            checks.refuse(f"these can't be the outputs of step {request.steps[0]}", problems)
        return outputs

    def _tell(self, run: types_pb2.Run) -> None:
        self._s.bus.publish(run_topic(run.run_id))
        self._s.bus.publish(EVENTS)
        self._s.dispatcher.kick_soon(run.node_id)


def _settlement(request: pb.ResolveRunRequest, caller: Caller) -> types_pb2.Settlement:
    if request.verdict not in types_pb2.Settlement.Verdict.values() or not request.verdict:
        raise InvalidInput(
            "it isn't said as what the steps are settled", code="bad_verdict", hint="as succeeded, failed or retry"
        )
    reason = request.reason.strip()
    if not reason or len(reason) > audit.MAX_REASON:
        raise InvalidInput(
            f"settling needs a reason of at most {audit.MAX_REASON} characters: it is what others will go by",
            code="reason_missing",
        )
    return types_pb2.Settlement(verdict=request.verdict, by=caller.name, reason=reason)


def _refuse_unfit(run: types_pb2.Run) -> None:
    """Raise Conflict unless ``run`` may be gone on from."""
    if not runs.is_over(run.state):
        raise Conflict(
            f"run {run.run_id} is not over",
            code="run_active",
            hint=f"wait for its end, or cancel it with `outrider runs cancel {run.run_id}`",
        )
    if run.retried_by:
        raise Conflict(
            f"run {run.run_id} was retried already, by run {run.retried_by}",
            code="already_retried",
            hint="if that one did not succeed either, retry that one: it may have come further",
        )
    settled = any(step.HasField("settlement") for step in run.steps)
    if run.state == types_pb2.RUN_STATE_SUCCEEDED and not settled:
        raise Conflict(
            f"run {run.run_id} succeeded, so there is nothing to go on with",
            code="run_succeeded",
            hint="`outrider run` executes the pipeline anew",
        )

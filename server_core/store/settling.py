"""An operator's word about steps whose outcome nobody knows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, update

from outrider._suggest import did_you_mean, listing
from outrider.errors import Conflict, NotFound
from outrider.pipeline import all_before
from outrider.v1 import types_pb2
from server_core.store import runs, schema
from server_core.store.common import now_us

SUCCEEDED, FAILED = types_pb2.STEP_STATE_SUCCEEDED, types_pb2.STEP_STATE_FAILED
CANCELLED, SKIPPED = types_pb2.STEP_STATE_CANCELLED, types_pb2.STEP_STATE_SKIPPED
UNKNOWN = types_pb2.STEP_STATE_UNKNOWN
_AS = {
    types_pb2.Settlement.VERDICT_SUCCEEDED: "succeeded",
    types_pb2.Settlement.VERDICT_FAILED: "failed",
    types_pb2.Settlement.VERDICT_RETRY: "retry",
}


def word(verdict: int) -> str:
    """The verdict as people write it."""
    return _AS[verdict]  # type: ignore[index]  # a number off the wire; checked before it comes here


def resolve(
    connection: Connection,
    run: types_pb2.Run,
    steps: Sequence[str],
    settlement: types_pb2.Settlement,
    outputs_json: bytes = b"",
) -> list[str]:
    """Settle ``steps`` of ``run`` (all whose outcome is unknown, if none is named); returns their names.

    The run is taken from its node: it gets another lease, so that a late report of the former one is refused. Once no
    step is unknown, the run's own state follows from its steps. Raises Conflict if the run isn't over or a step isn't
    unknown, NotFound if there is no such step.
    """
    if not runs.is_over(run.state):
        raise Conflict(
            f"run {run.run_id} is not over; what its steps come to is not settled before",
            code="run_active",
            hint=f"wait for its end, or cancel it with `outrider runs cancel {run.run_id}`",
        )
    statuses = {status.name: status for status in run.steps}
    unknown = [name for name, status in statuses.items() if status.state == UNKNOWN]
    named = list(dict.fromkeys(steps)) or unknown
    for name in named:
        _check(run, statuses, unknown, name)
    if not named and run.state != types_pb2.RUN_STATE_UNKNOWN:
        raise Conflict(f"run {run.run_id} has no step whose outcome is unknown", code="nothing_unknown")
    for name in named:
        _settle_step(connection, run, statuses[name], settlement, outputs_json)
    values: dict[str, object] = {"lease_id": new_lease()}
    if not any(status.state == UNKNOWN for status in statuses.values()) and run.state == types_pb2.RUN_STATE_UNKNOWN:
        values |= _state_of(run, statuses, settlement)
    connection.execute(update(schema.runs).where(schema.runs.c.run_id == run.run_id).values(**values))
    return named


def new_lease() -> str:
    """An id for an assignment of a run to its node."""
    return "l" + secrets.token_hex(12)


def wants_retry(run: types_pb2.Run) -> bool:
    """Whether no step is unknown any more, and one of them was settled to be tried again."""
    retry = types_pb2.Settlement.VERDICT_RETRY
    return all(step.state != UNKNOWN for step in run.steps) and any(
        step.settlement.verdict == retry for step in run.steps
    )


def _check(run: types_pb2.Run, statuses: Mapping[str, types_pb2.StepStatus], unknown: Sequence[str], name: str) -> None:
    if name not in statuses:
        hint = did_you_mean(name, statuses, otherwise=f"its steps are {listing(statuses)}")
        raise NotFound(f"run {run.run_id} has no step {name!r}", code="unknown_step", hint=hint)
    if name not in unknown:
        state = types_pb2.StepState.Name(statuses[name].state).removeprefix("STEP_STATE_").lower()
        hint = f"unknown are {listing(unknown)}" if unknown else "none of this run's steps is unknown"
        raise Conflict(
            f"step {name} of run {run.run_id} is {state}: only what is unknown can be settled",
            code="not_unknown",
            hint=hint,
        )


def _settle_step(
    connection: Connection,
    run: types_pb2.Run,
    status: types_pb2.StepStatus,
    settlement: types_pb2.Settlement,
    outputs_json: bytes,
) -> None:
    status.settlement.CopyFrom(settlement)
    status.settlement.time.FromMicroseconds(now_us())
    status.reason = ""
    if settlement.verdict == types_pb2.Settlement.VERDICT_SUCCEEDED:
        status.state = SUCCEEDED
        status.ClearField("failure")
        status.outputs_json = outputs_json or b"{}"
    else:
        again = ", to be tried again" if settlement.verdict == types_pb2.Settlement.VERDICT_RETRY else ""
        status.state = FAILED
        status.failure.CopyFrom(
            types_pb2.Failure(
                error_class=types_pb2.ERROR_CLASS_PERMANENT,
                code="settled_as_failed",
                message=f"step {status.name} was settled as failed{again} by {settlement.by}: {settlement.reason}",
            )
        )
    if not status.HasField("finished_at"):
        status.finished_at.CopyFrom(status.settlement.time)
    runs.save_step(connection, run.run_id, status)


def _state_of(
    run: types_pb2.Run, statuses: Mapping[str, types_pb2.StepStatus], settlement: types_pb2.Settlement
) -> dict[str, object]:
    """State and failure of a run whose steps are all known now."""
    failed = [status for status in statuses.values() if status.state == FAILED]
    if failed:
        return {"state": types_pb2.RUN_STATE_FAILED, "failure": failed[0].failure.SerializeToString()}
    if any(status.state == CANCELLED for status in statuses.values()):
        return {"state": types_pb2.RUN_STATE_CANCELLED, "failure": None}
    if not settlement_holds(settlement, statuses):
        failure = types_pb2.Failure(
            error_class=types_pb2.ERROR_CLASS_PERMANENT,
            code="settled_as_failed",
            message=f"the run was settled as failed by {settlement.by}: {settlement.reason}",
        )
        return {"state": types_pb2.RUN_STATE_FAILED, "failure": failure.SerializeToString()}
    left = _left_out(statuses)
    if not left:
        return {"state": types_pb2.RUN_STATE_SUCCEEDED, "failure": None}
    failure = types_pb2.Failure(
        error_class=types_pb2.ERROR_CLASS_PERMANENT,
        code="not_completed",
        message=f"{_steps(left)} not carried out, because what became of a step before was not known then",
        hint=f"go on with `outrider runs retry {run.run_id}`",
    )
    return {"state": types_pb2.RUN_STATE_FAILED, "failure": failure.SerializeToString()}


def settlement_holds(settlement: types_pb2.Settlement, statuses: Mapping[str, types_pb2.StepStatus]) -> bool:
    """Whether the verdict is on steps. A run can be unknown without any of them being so: then it is on the run."""
    on_steps = any(status.HasField("settlement") for status in statuses.values())
    return on_steps or settlement.verdict == types_pb2.Settlement.VERDICT_SUCCEEDED


def _left_out(statuses: Mapping[str, types_pb2.StepStatus]) -> list[str]:
    """Steps that were skipped while a step before them, settled since, was unknown."""
    before = all_before({name: tuple(status.needs) for name, status in statuses.items()})
    settled = {name for name, status in statuses.items() if status.HasField("settlement")}
    return [
        name for name, status in statuses.items() if status.state == SKIPPED and not before[name].isdisjoint(settled)
    ]


def _steps(names: Sequence[str]) -> str:
    return f"step {names[0]} was" if len(names) == 1 else f"steps {', '.join(names)} were"

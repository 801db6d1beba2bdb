"""Runs and their steps. A run's row lives as long as anybody may still ask for it or report about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from outrider.errors import Conflict, InvalidInput, NotFound
from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import schema
from server_core.store.common import dump, micros, next_number, now_us, stamp

RunRow = Row[tuple[Any, ...]]

QUEUED = types_pb2.RUN_STATE_QUEUED
DISPATCHED = types_pb2.RUN_STATE_DISPATCHED
RUNNING = types_pb2.RUN_STATE_RUNNING
CANCELLED = types_pb2.RUN_STATE_CANCELLED
FAILED = types_pb2.RUN_STATE_FAILED
UNKNOWN = types_pb2.RUN_STATE_UNKNOWN

ACTIVE = (QUEUED, DISPATCHED, RUNNING)
SETTLED = (types_pb2.RUN_STATE_SUCCEEDED, FAILED, CANCELLED)
"""States that nothing changes any more. What is UNKNOWN may still be told by a late report."""

_STEP_SETTLED = (
    types_pb2.STEP_STATE_SUCCEEDED,
    types_pb2.STEP_STATE_FAILED,
    types_pb2.STEP_STATE_SKIPPED,
    types_pb2.STEP_STATE_CANCELLED,
)
_RUNS = schema.runs.c
_STEPS = schema.steps.c


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that was checked and may be accepted."""

    run_id: str
    lease_id: str
    caller: str
    key: str
    request_digest: bytes
    pipeline: str
    pipeline_yaml: bytes
    pipeline_sha256: bytes
    node_id: str
    object: types_pb2.Object | None
    args: Mapping[str, Any]
    env_names: Sequence[str]
    timeout_us: int
    steps: Sequence[types_pb2.StepStatus]
    retry_of: str | None = None
    finished: Sequence[types_pb2.StepStatus] = ()  # those of ``steps`` that are taken over from it


@dataclass(frozen=True, slots=True)
class Applied:
    """What a report changed. ``refused`` says why it, or a part of it, was not recorded; it is acknowledged all the
    same. ``foreign``: the sender has no say in this run."""

    finished: bool = False
    refused: str = ""
    foreign: bool = False


def is_over(state: int) -> bool:
    return state not in ACTIVE


def accept(connection: Connection, new: NewRun) -> types_pb2.Run:
    """Store the run and its steps. Raises Conflict if the caller's key stands for another request."""
    ref = new.object.ref if new.object is not None else types_pb2.ObjectRef()
    connection.execute(
        insert(schema.runs).values(
            run_id=new.run_id,
            sequence=next_number(connection, "run_sequence"),
            caller=new.caller,
            key=new.key,
            request_digest=new.request_digest,
            pipeline=new.pipeline,
            pipeline_yaml=new.pipeline_yaml,
            pipeline_sha256=new.pipeline_sha256,
            node_id=new.node_id,
            object_kind=ref.kind,
            object_name=ref.name,
            object=None if new.object is None else new.object.SerializeToString(deterministic=True),
            args_json=dump(dict(new.args)),
            env_names_json=dump(list(new.env_names)),
            timeout_us=new.timeout_us,
            lease_id=new.lease_id,
            state=QUEUED,
            reason="",
            writeback_json="{}",
            sent=False,
            cancel_requested=False,
            cancel_reason="",
            cancel_grace_us=0,
            created_at=now_us(),
            retry_of=new.retry_of,
            finished_steps=_finished_steps(new.finished),
        )
    )
    connection.execute(
        insert(schema.steps),
        [
            {
                "run_id": new.run_id,
                "position": position,
                "name": step.name,
                "state": step.state,
                "attempt": step.attempt,
                "status": step.SerializeToString(),
            }
            for position, step in enumerate(new.steps)
        ],
    )
    return get(connection, new.run_id)


def by_key(connection: Connection, caller: str, key: str, digest: bytes) -> types_pb2.Run | None:
    """The run that this very request made before. Raises Conflict if the key was used for another request."""
    row = connection.execute(select(schema.runs).where(_RUNS.caller == caller, _RUNS.key == key)).first()
    if row is None:
        return None
    if row.request_digest != digest:
        raise Conflict(
            f"the key {key!r} was used for another request, which made run {row.run_id}",
            code="key_reused",
            hint="a key stands for one request; use a new one",
        )
    return _run(connection, row)


def row_of(connection: Connection, run_id: str) -> RunRow | None:
    return connection.execute(select(schema.runs).where(_RUNS.run_id == run_id)).first()


def is_carried_out_by(connection: Connection, node_id: str, report: node_service_pb2.RunReport) -> bool:
    """Whether the run of ``report`` is this node's under this lease, and not over."""
    query = select(_RUNS.state).where(
        _RUNS.run_id == report.run_id, _RUNS.node_id == node_id, _RUNS.lease_id == report.lease_id
    )
    state = connection.execute(query).scalar()
    return state is not None and not is_over(state)


def get(connection: Connection, run_id: str) -> types_pb2.Run:
    """The run with this id, or the one whose id begins so. Raises NotFound, or InvalidInput if several begin so."""
    if not run_id:
        raise InvalidInput("a run id is needed", code="run_id_missing")
    row = row_of(connection, run_id)
    if row is None:
        found = connection.execute(
            select(schema.runs).where(_RUNS.run_id.startswith(run_id, autoescape=True)).limit(2)
        ).all()
        if len(found) > 1:
            raise InvalidInput(f"several runs begin with {run_id!r}", code="run_id_ambiguous", hint="give more of it")
        if not found:
            raise NotFound(
                f"there is no run {run_id!r}",
                code="unknown_run",
                hint="`outrider runs list` shows those that there are",
            )
        row = found[0]
    return _run(connection, row)


def listed(
    connection: Connection,
    *,
    node_id: str = "",
    ref: types_pb2.ObjectRef | None = None,
    states: Iterable[int] = (),
    limit: int = 100,
) -> list[types_pb2.Run]:
    """Runs, newest first."""
    query = select(schema.runs).order_by(_RUNS.sequence.desc()).limit(limit)
    if node_id:
        query = query.where(_RUNS.node_id == node_id)
    if ref is not None and ref.kind:
        query = query.where(_RUNS.object_kind == ref.kind)
    if ref is not None and ref.name:
        query = query.where(_RUNS.object_name == ref.name)
    wanted = list(states)
    if wanted:
        query = query.where(_RUNS.state.in_(wanted))
    return [_run(connection, row) for row in connection.execute(query).all()]


def active_on(connection: Connection, node_id: str) -> Sequence[RunRow]:
    """Rows of a node's runs that are not over, oldest first."""
    return connection.execute(
        select(schema.runs).where(_RUNS.node_id == node_id, _RUNS.state.in_(ACTIVE)).order_by(_RUNS.sequence)
    ).all()


def active_of(connection: Connection, ref: types_pb2.ObjectRef) -> Sequence[RunRow]:
    """Rows of an object's runs that are not over, oldest first: the first of them has its turn."""
    return connection.execute(
        select(schema.runs)
        .where(_RUNS.object_kind == ref.kind, _RUNS.object_name == ref.name, _RUNS.state.in_(ACTIVE))
        .order_by(_RUNS.sequence)
    ).all()


def mark_acknowledged(connection: Connection, run_id: str, node_id: str) -> bool:
    """The node has journalled the run."""
    return bool(
        connection.execute(
            update(schema.runs)
            .where(_RUNS.run_id == run_id, _RUNS.node_id == node_id, _RUNS.state == QUEUED)
            .values(state=DISPATCHED, reason="")
        ).rowcount
    )


def request_cancel(connection: Connection, run_id: str, reason: str, grace_us: int) -> bool:
    """Make the wish durable. A run that its node can't have is cancelled by that. False if it is over already.

    The first request counts: the command's digest must be the same each time it is sent.
    """
    row = row_of(connection, run_id)
    if row is None or is_over(row.state):
        return False
    if not row.cancel_requested:
        connection.execute(
            update(schema.runs)
            .where(_RUNS.run_id == run_id)
            .values(cancel_requested=True, cancel_reason=reason, cancel_grace_us=grace_us)
        )
    if row.state == QUEUED and not row.sent:
        settle(connection, run_id, CANCELLED, None)
    return True


def settle(connection: Connection, run_id: str, state: int, failure: types_pb2.Failure | None) -> bool:
    """End a run by the server's own decision; its open steps end with it. False if it is over already."""
    changed = connection.execute(
        update(schema.runs)
        .where(_RUNS.run_id == run_id, _RUNS.state.in_(ACTIVE))
        .values(
            state=state,
            failure=None if failure is None else failure.SerializeToString(),
            finished_at=now_us(),
            reason="",
        )
    ).rowcount
    if not changed:
        return False
    # Of an unknown run nobody knows how far it came after its last report: a step that had not begun then may have.
    open_steps = types_pb2.STEP_STATE_CANCELLED
    if state in (FAILED, UNKNOWN):
        open_steps = types_pb2.STEP_STATE_SKIPPED if state == FAILED else types_pb2.STEP_STATE_UNKNOWN
    _end_open_steps(connection, run_id, open_steps)
    return True


def apply_report(connection: Connection, node_id: str, report: node_service_pb2.RunReport) -> Applied:
    """Record what a node says of a run, by compare-and-set on its lease and the attempts of its steps; replays and
    stragglers change nothing."""
    row = row_of(connection, report.run_id)
    if row is None:
        return Applied(refused="there is no such run", foreign=True)
    if row.node_id != node_id or row.lease_id != report.lease_id:
        return Applied(refused="it has another lease", foreign=True)
    if row.state in SETTLED:
        differs = report.state in SETTLED and report.state != row.state
        return Applied(refused=f"the run is over: {_word(types_pb2.RunState, row.state)}" if differs else "")
    if _is_stale(row, report):
        return Applied()
    refusals = [_merge_step(connection, report.run_id, status) for status in report.steps]
    if report.state == UNKNOWN:
        _end_open_steps(connection, report.run_id, types_pb2.STEP_STATE_UNKNOWN)
    values: dict[str, Any] = {}
    if report.outbox_id:
        values |= {"outbox_id": report.outbox_id, "outbox_sequence": report.sequence}
    # States only go forward; the numbers are in that order. UNKNOWN may turn out to be anything.
    if report.state > row.state or row.state == UNKNOWN:
        values["state"] = report.state
    if report.HasField("failure"):
        values["failure"] = report.failure.SerializeToString()
    if row.started_at is None and (started := micros(report.started_at)):
        values["started_at"] = started
    if is_over(report.state) and report.state:
        values["finished_at"] = micros(report.finished_at) or now_us()
    elif row.state == UNKNOWN:
        values |= {"finished_at": None, "failure": None}
    if values:
        connection.execute(update(schema.runs).where(_RUNS.run_id == report.run_id).values(reason="", **values))
    state = values.get("state", row.state)
    return Applied(finished=is_over(state) and not is_over(row.state), refused="; ".join(filter(None, refusals)))


def _is_stale(row: RunRow, report: node_service_pb2.RunReport) -> bool:
    """Whether a later report is recorded already: where acknowledgements were lost, earlier ones come again, too."""
    if not report.outbox_id or report.outbox_id != row.outbox_id or report.sequence > row.outbox_sequence:
        return False
    # A node whose disk was set back to a former state numbers from there again. What went on in between may be
    # missed for that, but not an end, or nobody would ever hear of it.
    tells_an_end = report.state in (*SETTLED, UNKNOWN) and report.state != row.state
    return not tells_an_end


def retried_by(connection: Connection, run_id: str) -> str | None:
    """The last run that goes on from this one."""
    query = select(_RUNS.run_id).where(_RUNS.retry_of == run_id).order_by(_RUNS.sequence.desc()).limit(1)
    return connection.execute(query).scalar()


def merge_writeback(connection: Connection, run_id: str, values: Mapping[str, Any]) -> None:
    row = row_of(connection, run_id)
    if row is not None:
        text = dump(json.loads(row.writeback_json) | dict(values))
        connection.execute(update(schema.runs).where(_RUNS.run_id == run_id).values(writeback_json=text))


def pipeline_command(row: RunRow) -> node_service_pb2.RunPipeline:
    """The command's body; the same for the same run each time, because its digest must be."""
    body = node_service_pb2.RunPipeline(
        run_id=row.run_id,
        lease_id=row.lease_id,
        pipeline_yaml=row.pipeline_yaml,
        pipeline_sha256=row.pipeline_sha256,
        args_json=row.args_json.encode(),
        env_names=json.loads(row.env_names_json),
        sequence=row.sequence,
    )
    if row.object is not None:
        body.object.ParseFromString(row.object)
    if row.timeout_us:
        body.timeout.FromMicroseconds(row.timeout_us)
    if row.finished_steps is not None:
        body.MergeFromString(row.finished_steps)
    return body


def cancel_command(row: RunRow) -> node_service_pb2.CancelRun:
    body = node_service_pb2.CancelRun(run_id=row.run_id, reason=row.cancel_reason)
    if row.cancel_grace_us:
        body.grace.FromMicroseconds(row.cancel_grace_us)
    return body


def _merge_step(connection: Connection, run_id: str, status: types_pb2.StepStatus) -> str:
    """Record ``status``, unless it is of the past. Returns why not, if it contradicts what is recorded."""
    known = connection.execute(
        select(_STEPS.state, _STEPS.attempt, _STEPS.status).where(_STEPS.run_id == run_id, _STEPS.name == status.name)
    ).first()
    if known is None or status.attempt < known.attempt:
        return ""
    told = f"told to be {_word(types_pb2.StepState, status.state)}"
    if status.attempt > known.attempt and known.state == types_pb2.STEP_STATE_SUCCEEDED:
        return f"step {status.name} succeeded in attempt {known.attempt}, and is {told} in attempt {status.attempt}"
    if status.attempt == known.attempt and known.state in _STEP_SETTLED:
        # The first word counts, also where a second one agrees with it.
        if status.state not in _STEP_SETTLED or status.state == known.state:
            return ""
        recorded = _word(types_pb2.StepState, known.state)
        return f"attempt {known.attempt} of step {status.name} is {recorded}, and is {told}"
    stored = types_pb2.StepStatus.FromString(known.status)
    # What never changes within a run is the server's; agents leave it out of their differences.
    status.uses = status.uses or stored.uses
    if not status.needs:
        status.needs.extend(stored.needs)
    save_step(connection, run_id, status)
    return ""


def _end_open_steps(connection: Connection, run_id: str, state: types_pb2.StepState.ValueType) -> None:
    for step in connection.execute(select(schema.steps).where(_STEPS.run_id == run_id)).all():
        if step.state in _STEP_SETTLED:
            continue
        status = types_pb2.StepStatus.FromString(step.status)
        status.state = state
        save_step(connection, run_id, status)


def _word(enum: Any, state: int) -> str:
    """A state as people write it. ``enum``: RunState or StepState, whose wrappers have no type in common."""
    return str(enum.Name(state)).partition("_STATE_")[2].lower()


def _finished_steps(finished: Sequence[types_pb2.StepStatus]) -> bytes | None:
    if not finished:
        return None
    return node_service_pb2.RunPipeline(finished=finished).SerializeToString(deterministic=True)


def save_step(connection: Connection, run_id: str, status: types_pb2.StepStatus) -> None:
    connection.execute(
        update(schema.steps)
        .where(_STEPS.run_id == run_id, _STEPS.name == status.name)
        .values(state=status.state, attempt=status.attempt, status=status.SerializeToString())
    )


def _run(connection: Connection, row: RunRow) -> types_pb2.Run:
    run = types_pb2.Run(
        run_id=row.run_id,
        key=row.key,
        pipeline=row.pipeline,
        node_id=row.node_id,
        state=row.state,
        args_json=row.args_json.encode(),
        lease_id=row.lease_id,
        created_at=stamp(row.created_at),
        started_at=stamp(row.started_at),
        finished_at=stamp(row.finished_at),
        created_by=row.caller.partition(":")[2],
        cancel_requested=row.cancel_requested,
        sequence=row.sequence,
        writeback_json=row.writeback_json.encode(),
        reason=row.reason,
        pipeline_sha256=row.pipeline_sha256,
        retry_of=row.retry_of or "",
        retried_by=retried_by(connection, row.run_id) or "",
    )
    if row.object is not None:
        snapshot = types_pb2.Object.FromString(row.object)
        run.object.CopyFrom(snapshot.ref)
        run.object_version = snapshot.version
    if row.failure is not None:
        run.failure.ParseFromString(row.failure)
    steps = connection.execute(
        select(_STEPS.status).where(_STEPS.run_id == row.run_id).order_by(_STEPS.position)
    ).scalars()
    run.steps.extend(types_pb2.StepStatus.FromString(status) for status in steps)
    return run

"""State synchronisation: what the node holds beside what the store says, each difference settled and recorded.

=====================================  ===================================================================
difference                             what is done
=====================================  ===================================================================
sent, not confirmed; the node has it   confirmed
sent, not confirmed; it has it not     sent again, or cancelled if that was asked for meanwhile
finished while away                    its report is awaited; asked for, in case it was acknowledged by a server that
                                       was lost since
cancelled while away                   told to stop
over on the server, held by the node   told to stop; what it has reported of it is refused or adds nothing
unknown on the server, held by it      goes on, unless another run has the object by now: then told to stop
held by the node, not known here       reported as an event; what runs is left alone, a game may hang on it
known here, not held by the node       asked about; unknown, after a grace in which its last report may still come
=====================================  ===================================================================

Each is an event (``run.reconciled``, ``run.unrecognised``), once for as long as it lasts, however often the node
comes back meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection

from outrider.reports import held_digest
from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import events, runs, turns
from server_core.store.runs import RunRow

_UNRECOGNISED = "unknown to the server"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing on which node and server disagree: the run, what it is, and what is done about it."""

    run_id: str
    what: str
    done: str


@dataclass
class Settlement:
    """What is left to do once the comparison is stored."""

    missing: list[str] = field(default_factory=list)
    """Runs that the node should have and has not: unknown after a grace."""
    cancelled: list[str] = field(default_factory=list)
    """Runs that were ended here, because they never reached the node."""
    stop: list[str] = field(default_factory=list)
    """Runs that the node is to stop, although nobody asked for their cancellation."""
    retell: list[str] = field(default_factory=list)
    """Runs whose end the node is asked to report once more."""
    differences: set[Difference] = field(default_factory=set)
    believed: bytes = b""
    """Digest of what the store holds of this node's runs afterwards; see `outrider.reports.held_digest`."""


def compare(
    connection: Connection,
    node_id: str,
    held: Iterable[types_pb2.HeldRun],
    *,
    sent: Collection[str],
    recorded: Collection[Difference],
) -> Settlement:
    """Settle in this transaction what can be settled. ``sent``: runs that went down the present channel, so that the
    report may be older than they are; ``recorded``: differences that were told of before."""
    holds = {run.run_id: run for run in held}
    result = Settlement()
    for row in runs.active_on(connection, node_id):
        run = holds.get(row.run_id)
        if run is not None and run.lease_id == row.lease_id:
            _both(connection, row, run, result)
        elif run is None:
            _not_held(connection, row, row.run_id in sent, result)
    for run in holds.values():
        found = runs.row_of(connection, run.run_id)
        if found is None or found.node_id != node_id:
            _unrecognised(connection, node_id, run, result, recorded)
        elif found.state in runs.SETTLED or (found.state == runs.UNKNOWN and found.lease_id != run.lease_id):
            # Whatever the lease: a run of which an operator has settled a step has another one since.
            if not runs.is_over(run.state):
                result.stop.append(run.run_id)
                result.differences.add(Difference(run.run_id, f"over here, {_word(run.state)} there", "told to stop"))
        elif found.lease_id != run.lease_id:
            _unrecognised(connection, node_id, run, result, recorded)
        elif found.state == runs.UNKNOWN and not runs.is_over(run.state):
            _unknown(connection, found, run, result)
    for difference in result.differences.difference(recorded):
        if difference.what != _UNRECOGNISED:
            data = {"difference": difference.what, "action": difference.done}
            events.add(connection, "run.reconciled", difference.run_id, node_id=node_id, data=data)
    result.believed = believed(connection, node_id)
    return result


def believed(connection: Connection, node_id: str) -> bytes:
    """Digest of the runs that the store says the node holds and has not ended."""
    return held_digest(
        types_pb2.HeldRun(run_id=row.run_id, lease_id=row.lease_id, state=row.state)
        for row in runs.active_on(connection, node_id)
        if row.state != runs.QUEUED
    )


def _both(connection: Connection, row: RunRow, run: types_pb2.HeldRun, result: Settlement) -> None:
    if row.state == runs.QUEUED and runs.mark_acknowledged(connection, row.run_id, row.node_id):
        result.differences.add(Difference(row.run_id, "sent, not confirmed", "confirmed"))
    if runs.is_over(run.state):
        what = f"{_word(run.state)} while away"
        result.differences.add(Difference(row.run_id, what, "its report is awaited"))
        result.retell.append(row.run_id)
    elif row.cancel_requested:
        result.differences.add(Difference(row.run_id, "cancelled while away", "told to stop"))


def _not_held(connection: Connection, row: RunRow, on_its_way: bool, result: Settlement) -> None:
    if row.state != runs.QUEUED:
        result.missing.append(row.run_id)
        result.retell.append(row.run_id)
        result.differences.add(Difference(row.run_id, "unknown to the node", "its last report is awaited"))
    elif on_its_way or not row.sent:
        return
    elif not row.cancel_requested:
        result.differences.add(Difference(row.run_id, "sent, not confirmed", "sent again"))
    elif runs.settle(connection, row.run_id, runs.CANCELLED, None):
        result.cancelled.append(row.run_id)
        result.differences.add(Difference(row.run_id, "cancelled before it was confirmed", "cancelled"))


def _unrecognised(
    connection: Connection,
    node_id: str,
    run: types_pb2.HeldRun,
    result: Settlement,
    recorded: Collection[Difference],
) -> None:
    difference = Difference(run.run_id, _UNRECOGNISED, f"left alone ({run.lease_id})")
    result.differences.add(difference)
    if difference not in recorded:
        data = {"lease_id": run.lease_id, "state": types_pb2.RunState.Name(run.state)}
        events.add(connection, "run.unrecognised", run.run_id, node_id=node_id, data=data)


def _unknown(connection: Connection, row: RunRow, run: types_pb2.HeldRun, result: Settlement) -> None:
    blocker = turns.under_way(connection, row)
    if blocker is not None:
        result.stop.append(row.run_id)
        what = f"unknown here, {_word(run.state)} there, and {blocker} has the object"
        result.differences.add(Difference(row.run_id, what, "told to stop"))
        return
    report = node_service_pb2.RunReport(run_id=run.run_id, lease_id=run.lease_id, state=run.state)
    runs.apply_report(connection, row.node_id, report)
    result.differences.add(Difference(row.run_id, f"unknown here, {_word(run.state)} there", "goes on"))


def _word(state: int) -> str:
    return types_pb2.RunState.Name(state).removeprefix("RUN_STATE_").lower()  # type: ignore[arg-type]  # a number

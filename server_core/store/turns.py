"""Whose turn it is: which queued run may go to its node now, and what the others wait for."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, select, update

from server_core.store import draining, schema
from server_core.store.runs import ACTIVE, QUEUED, RunRow, row_of

_RUNS = schema.runs.c


@dataclass(frozen=True, slots=True)
class Turn:
    """``send``: the run is to be sent, and that is stored. Else ``told`` says whether what it waits for is news."""

    send: bool
    told: bool = False


def claim(connection: Connection, run_id: str) -> Turn:
    """Before its command goes out: from now on the node may have the run.

    One transaction decides and writes it down, so that two runs of an object can't both have their turn, and a node
    gets none once its drain is stored. A run that was sent before is sent again whatever holds others back: its node
    may have it.
    """
    row = row_of(connection, run_id)
    if row is None or row.state != QUEUED or (row.cancel_requested and not row.sent):
        return Turn(False)
    reason = waits_for(connection, row)
    values = {"reason": reason} if reason else {"sent": True, "reason": ""}
    told = row.reason != reason
    if told or not row.sent:
        connection.execute(update(schema.runs).where(_RUNS.run_id == run_id).values(**values))
    return Turn(not reason, told)


def waits_for(connection: Connection, row: RunRow) -> str:
    """The sentence that says why a queued run has to wait; "" if it hasn't."""
    if row.sent:
        return ""
    blocker = blocker_of(connection, row)
    if blocker is not None:
        return f"waits for run {blocker} of {row.object_kind}/{row.object_name}"
    drain = draining.of(connection, row.node_id)
    return f"node {row.node_id} is being drained{drain.why}" if drain is not None else ""


def blocker_of(connection: Connection, row: RunRow) -> str | None:
    """The run of the same object that has to end before this one may start: the oldest, and any that a node has."""
    return _oldest_other(connection, row, (_RUNS.sequence < row.sequence) | _RUNS.sent)


def under_way(connection: Connection, row: RunRow) -> str | None:
    """Another run of the same object that its node has, or may have."""
    return _oldest_other(connection, row, _RUNS.sent)


def _oldest_other(connection: Connection, row: RunRow, condition: ColumnElement[bool]) -> str | None:
    """The oldest other run of the same object that is not over and meets ``condition``."""
    if not row.object_kind:
        return None
    return connection.execute(
        select(_RUNS.run_id)
        .where(
            _RUNS.object_kind == row.object_kind,
            _RUNS.object_name == row.object_name,
            _RUNS.state.in_(ACTIVE),
            _RUNS.run_id != row.run_id,
            condition,
        )
        .order_by(_RUNS.sequence)
        .limit(1)
    ).scalar()

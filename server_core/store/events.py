"""Events: numbered by the server in the order in which it stored them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, or_, select

from outrider.v1 import control_service_pb2, types_pb2
from server_core.store import schema
from server_core.store.common import dump, micros, now_us, stamp

OWN = frozenset(
    {
        "run.accepted", "run.resolved", "run.retried", "run.finished", "run.cancel_requested", "run.unrecognised",
        "run.report_refused", "run.reconciled",
        "node.draining", "node.drained", "node.drain_ended",
        "node.online", "node.offline", "node.added", "node.removed", "node.role_changed",
        "node_role.changed", "node_role.removed",
        "object.changed", "object.removed", "env.changed", "env.removed",
        "store.retired", "store.restored",
    }
)  # fmt: skip
"""What only the server itself says: from a node it would be a forgery."""


def add(connection: Connection, type_: str, subject: str, *, node_id: str = "", data: Any = None) -> None:
    """An event of the server's own."""
    connection.execute(
        insert(schema.events).values(
            node_id=node_id,
            node_sequence=0,
            type=type_,
            subject=subject,
            time=now_us(),
            data_json=dump({} if data is None else data),
        )
    )


def add_reported(connection: Connection, node_id: str, events: Iterable[types_pb2.Event]) -> int:
    """Events of a node; those that were stored before, and those that are the server's to tell, are
    passed over. Returns the greatest of their numbers."""
    greatest = 0
    table = schema.events.c
    for event in events:
        greatest = max(greatest, event.sequence)
        if event.type in OWN:
            continue
        time = micros(event.time) or 0
        known = select(table.sequence).where(
            table.node_id == node_id, table.node_sequence == event.sequence, table.time == time, table.node_sequence > 0
        )
        if event.sequence > 0 and connection.execute(known).first() is not None:
            continue
        connection.execute(
            insert(schema.events).values(
                node_id=node_id,
                node_sequence=event.sequence,
                type=event.type[:128],
                subject=event.subject[:512],
                time=time or now_us(),
                data_json=event.data_json.decode("utf-8", "replace") or "{}",
            )
        )
    return greatest


def last_number(connection: Connection) -> int:
    return connection.execute(select(func.max(schema.events.c.sequence))).scalar() or 0


def after(
    connection: Connection, number: int, filter_: control_service_pb2.EventFilter, limit: int
) -> Sequence[types_pb2.Event]:
    """The next events with a greater number that pass the filter, oldest first."""
    table = schema.events.c
    query = select(schema.events).where(table.sequence > number).order_by(table.sequence).limit(limit)
    if filter_.types:
        query = query.where(or_(*(table.type.startswith(prefix, autoescape=True) for prefix in filter_.types)))
    if filter_.node_id:
        query = query.where(table.node_id == filter_.node_id)
    if filter_.subject:
        query = query.where(table.subject == filter_.subject)
    return [
        types_pb2.Event(
            sequence=row.sequence,
            node_id=row.node_id,
            type=row.type,
            subject=row.subject,
            time=stamp(row.time),
            data_json=row.data_json.encode(),
        )
        for row in connection.execute(query)
    ]

"""Retention: what goes after a time, so that the store does not grow for ever.

Events and the logs of runs that are over go; runs, objects and the audit log never do. The text of a log gives way
to a gap that says how many bytes were there, so whoever reads it later is told, and a late repetition by the node
is still known as one.

Ages are those of the server's own clock: nodes' clocks are not trusted, and an event of a node is as old as the
server's own events around it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, insert, or_, select

from server_core.store import schema
from server_core.store.runs import ACTIVE

EVENTS_AT_ONCE = 2000
"""Rows that one transaction removes: others must not wait long for the writer."""
RUNS_AT_ONCE = 200

_EVENTS = schema.events.c
_LOGS = schema.run_logs.c
_RUNS = schema.runs.c


@dataclass(frozen=True, slots=True)
class RetiredLog:
    """What one run's log gave back."""

    run_id: str
    bytes: int


def last_event_to_retire(connection: Connection, before_us: int, keep: int) -> int:
    """The greatest number of the events that go: older than ``before_us``, or beyond the newest ``keep``.

    0 for either means that it does not matter.
    """
    greatest = 0
    if before_us:
        own = select(func.max(_EVENTS.sequence)).where(_EVENTS.node_sequence == 0, _EVENTS.time < before_us)
        greatest = connection.execute(own).scalar() or 0
    if keep:
        beyond = select(_EVENTS.sequence).order_by(_EVENTS.sequence.desc()).offset(keep).limit(1)
        greatest = max(greatest, connection.execute(beyond).scalar() or 0)
    return greatest


def retire_events(connection: Connection, up_to: int) -> int:
    """Remove some of the events up to that number, the oldest first; returns how many, 0 when none is left."""
    oldest = select(_EVENTS.sequence).where(_EVENTS.sequence <= up_to).order_by(_EVENTS.sequence).limit(EVENTS_AT_ONCE)
    return connection.execute(delete(schema.events).where(_EVENTS.sequence.in_(oldest))).rowcount


def runs_with_old_logs(connection: Connection, before_us: int) -> list[str]:
    """Some runs that were over before that time and still have their logs, the oldest first."""
    return _with_logs(connection, and_(_RUNS.created_at < before_us, _ended_before(before_us)))


def runs_with_oldest_logs(connection: Connection) -> list[str]:
    """Some runs that are over and still have their logs, the oldest first."""
    return _with_logs(connection, None)


def retire_log(connection: Connection, run_id: str) -> RetiredLog:
    """Put a gap in the place of each of the run's logs."""
    freed = 0
    streams = connection.execute(
        select(
            _LOGS.step, _LOGS.attempt, _LOGS.stream, func.max(_LOGS.end), func.sum(func.length(_LOGS.data)),
            func.max(_LOGS.time), func.min(_LOGS.gap),
        )
        .where(_LOGS.run_id == run_id)
        .group_by(_LOGS.step, _LOGS.attempt, _LOGS.stream)
        .order_by(func.min(_LOGS.id))
    ).all()  # fmt: skip
    connection.execute(delete(schema.run_logs).where(_LOGS.run_id == run_id))
    for step, attempt, stream, end, size, time_us, least_gap in streams:
        freed += size or 0
        connection.execute(
            insert(schema.run_logs).values(
                run_id=run_id,
                step=step,
                attempt=attempt,
                stream=stream,
                offset=0,
                end=end,
                # That nobody knows how much was missing stays true.
                gap=-1 if least_gap == -1 or not end else end,
                zstd=False,
                data=b"",
                time=time_us,
            )
        )
    return RetiredLog(run_id, freed)


def used_bytes(connection: Connection) -> int:
    """What the store holds; free pages of its file, which are used again, do not count."""
    pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar() or 0)
    free = int(connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0)
    return (pages - free) * int(connection.exec_driver_sql("PRAGMA page_size").scalar() or 0)


def _ended_before(before_us: int) -> ColumnElement[bool]:
    return or_(_RUNS.finished_at.is_(None), _RUNS.finished_at < before_us)


def _with_logs(connection: Connection, condition: ColumnElement[bool] | None) -> list[str]:
    text = exists().where(_LOGS.run_id == _RUNS.run_id, _LOGS.gap == 0)
    query = select(_RUNS.run_id).where(_RUNS.state.not_in(ACTIVE), text)
    if condition is not None:
        query = query.where(condition)
    return list(connection.execute(query.order_by(_RUNS.sequence).limit(RUNS_AT_ONCE)).scalars())

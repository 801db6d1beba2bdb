"""What is stored of nodes that are drained: since when, why, until when. Whether one *is* drained is computed
(`server_core.drains`), and noted here once it was true."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from sqlalchemy import Connection, select, update

from outrider.errors import Conflict
from outrider.v1 import types_pb2
from server_core.store import nodes, schema
from server_core.store.common import dump, now_us, stamp
from server_core.store.runs import ACTIVE

_NODES = schema.nodes.c


@dataclass(frozen=True, slots=True)
class Draining:
    """A node's drain as it is stored. Times are microseconds of the wall clock, for people and for restarts of the
    server; within one server's life the deadline runs on the monotonic clock."""

    reason: str
    by: str
    since_us: int
    deadline_us: int | None = None
    drained_us: int | None = None

    def describe(self) -> types_pb2.Drain:
        return types_pb2.Drain(
            reason=self.reason, by=self.by, since=stamp(self.since_us), deadline=stamp(self.deadline_us)
        )

    @property
    def why(self) -> str:
        return f" ({self.reason})" if self.reason else ""


def of(connection: Connection, node_id: str) -> Draining | None:
    """The node's drain; None if it takes runs, or does not exist."""
    text = connection.execute(select(_NODES.drain_json).where(_NODES.node_id == node_id)).scalar()
    return None if text is None else Draining(**json.loads(text))


def all_of(connection: Connection) -> dict[str, Draining]:
    rows = connection.execute(select(_NODES.node_id, _NODES.drain_json).where(_NODES.drain_json.is_not(None)))
    return {row.node_id: Draining(**json.loads(row.drain_json)) for row in rows}


def begin(connection: Connection, node_id: str, reason: str, by: str, deadline_us: int | None) -> bool:
    """Let the node take no new runs. False if that was so before: then the new reason and deadline count, and what
    was drained stays so."""
    nodes.get(connection, node_id)
    former = of(connection, node_id)
    if former is None:
        _save(connection, node_id, Draining(reason, by, now_us(), deadline_us))
    else:
        _save(connection, node_id, replace(former, reason=reason, by=by, deadline_us=deadline_us))
    return former is None


def end(connection: Connection, node_id: str) -> bool:
    """Let it take runs again. False if it did."""
    nodes.get(connection, node_id)
    was = of(connection, node_id) is not None
    _save(connection, node_id, None)
    return was


def mark_drained(connection: Connection, node_id: str) -> bool:
    """It was seen to be empty. False if that was known, if it is no longer drained, or if it has a run again."""
    draining = of(connection, node_id)
    if draining is None or draining.drained_us is not None or runs_on(connection, node_id):
        return False
    _save(connection, node_id, replace(draining, drained_us=now_us()))
    return True


def runs_on(connection: Connection, node_id: str) -> Sequence[str]:
    """Runs that are not over and that the node has or may have, oldest first. Those that only wait for it are not
    among them."""
    table = schema.runs.c
    return (
        connection.execute(
            select(table.run_id)
            .where(table.node_id == node_id, table.state.in_(ACTIVE), table.sent)
            .order_by(table.sequence)
        )
        .scalars()
        .all()
    )


def refuse(connection: Connection, node_id: str) -> None:
    """Raise Conflict if the node takes no new runs."""
    draining = of(connection, node_id)
    if draining is not None:
        raise Conflict(
            f"node {node_id} takes no new runs, because it is being drained{draining.why}",
            code="node_draining",
            hint=f"choose another one, or let it take runs again with `outrider node drain {node_id} --undo`",
        )


def _save(connection: Connection, node_id: str, draining: Draining | None) -> None:
    text = None if draining is None else dump(asdict(draining))
    connection.execute(update(schema.nodes).where(_NODES.node_id == node_id).values(drain_json=text))

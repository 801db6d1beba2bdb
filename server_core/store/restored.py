"""What makes a store that was restored safe to serve: nothing that somebody still holds may be taken for new.

Between the backup and the loss of the server sessions began, runs and events were numbered and objects changed.
The restored store has forgotten all that, and would give the same numbers out again, for something else.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection, select, text, update

from outrider.v1 import types_pb2
from server_core.store import events, runs, schema
from server_core.store.common import get_meta, now_us, set_meta
from server_core.store.objects import distrust_removals

NUMBERS_STEP = 1_000_000_000
"""Epochs, run sequences, and the numbers of events and log chunks grow by it: more than anybody counted since."""
VERSIONS_STEP = 1_000_000
"""Versions of objects, env sets, nodes and their roles, which people see, grow by it."""
COMMANDS_KNOWN_FOR = timedelta(days=6)
"""Nodes know a command again for a week. What is older must not be sent: it could run a second time."""


def make_safe(connection: Connection, made_at: datetime) -> list[str]:
    """Raise every number that others may hold, end every session, and settle what is too old to be sent.

    Returns the runs that became unknown.
    """
    nodes, objects, env_sets = schema.nodes, schema.objects, schema.env_sets
    connection.execute(
        update(nodes).values(epoch=nodes.c.epoch + NUMBERS_STEP, session_id="", version=nodes.c.version + VERSIONS_STEP)
    )
    connection.execute(
        update(objects).values(
            version=objects.c.version + VERSIONS_STEP, status_version=objects.c.status_version + VERSIONS_STEP
        )
    )
    connection.execute(update(env_sets).values(version=env_sets.c.version + VERSIONS_STEP))
    distrust_removals(connection)
    roles = schema.node_roles
    connection.execute(update(roles).values(version=roles.c.version + VERSIONS_STEP))
    set_meta(connection, "run_sequence", str(int(get_meta(connection, "run_sequence") or 0) + NUMBERS_STEP))
    for table in (schema.events.name, schema.run_logs.name):
        raise_autoincrement(connection, table)
    unknown = _settle_too_old(connection, made_at)
    data = {"backup_made_at": made_at.isoformat(), "runs_unknown": len(unknown)}
    events.add(connection, "store.restored", "store", data=data)
    return unknown


def raise_autoincrement(connection: Connection, table: str) -> None:
    """Let SQLite number the table's next rows from further up."""
    last = connection.execute(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), {"name": table}).scalar()
    values = {"name": table, "seq": (last or 0) + NUMBERS_STEP}
    if last is None:
        connection.execute(text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :seq)"), values)
    else:
        connection.execute(text("UPDATE sqlite_sequence SET seq = :seq WHERE name = :name"), values)


def _settle_too_old(connection: Connection, made_at: datetime) -> list[str]:
    if now_us() - round(made_at.timestamp() * 1e6) < round(COMMANDS_KNOWN_FOR.total_seconds() * 1e6):
        return []
    failure = types_pb2.Failure(
        error_class=types_pb2.ERROR_CLASS_PERMANENT,
        code="backup_too_old",
        message=f"the server was restored from a backup of {made_at:%Y-%m-%d}, and whether the run was done since "
        "can't be known",
        hint="look at the node, then settle it or run it anew",
    )
    queued = connection.execute(select(schema.runs.c.run_id).where(schema.runs.c.state == runs.QUEUED)).scalars().all()
    for run_id in queued:
        runs.settle(connection, run_id, runs.UNKNOWN, failure)
    return list(queued)

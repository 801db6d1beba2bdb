"""The audit log: what operators decided, in rows that are chained by hash.

A row belongs to the transaction of what it tells of: neither exists without the other. Rows are never changed and
never removed. The hash of a row covers the row before it, so that nothing can be edited, taken out or put in
unnoticed; `verify` says where the chain breaks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from outrider.v1 import control_service_pb2
from server_core.store import schema
from server_core.store.common import dump, get_meta, next_number, now_us, stamp
from server_core.store.tokens import Caller

_COUNTER = "audit_number"
_FIRST = bytes(32)  # stands for the row before the first one
_AUDIT = schema.audit.c
MAX_REASON = 512


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the log is as it was written; ``first_bad`` is 0 and ``problem`` empty if it is."""

    rows: int
    head: bytes
    first_bad: int = 0
    problem: str = ""


def add(
    connection: Connection,
    caller: Caller,
    verb: str,
    resource: str,
    subject: str,
    *,
    reason: str = "",
    data: Any = None,
) -> None:
    """Note that ``caller`` did ``verb`` to ``subject``, one of ``resource`` (words of the permission table)."""
    former = connection.execute(select(_AUDIT.hash).order_by(_AUDIT.number.desc()).limit(1)).scalar()
    number = next_number(connection, _COUNTER)
    row = {
        "number": number,
        "time": now_us(),
        "actor": caller.key,
        "verb": verb,
        "resource": resource,
        "subject": subject,
        "reason": reason[:MAX_REASON],
        "data_json": dump({} if data is None else data),
    }
    connection.execute(insert(schema.audit).values(**row, hash=_hash(former or _FIRST, row.values())))


def listed(
    connection: Connection, *, subject: str = "", actor: str = "", verb: str = "", before: int = 0, limit: int = 100
) -> Sequence[control_service_pb2.AuditEntry]:
    """Rows that fit, newest first."""
    query = select(schema.audit).order_by(_AUDIT.number.desc()).limit(limit)
    for column, value in ((_AUDIT.subject, subject), (_AUDIT.actor, actor), (_AUDIT.verb, verb)):
        if value:
            query = query.where(column == value)
    if before:
        query = query.where(_AUDIT.number < before)
    return [_entry(row) for row in connection.execute(query)]


def verify(connection: Connection) -> Verdict:
    """Recompute the chain from the first row."""
    former, rows = _FIRST, 0
    for row in connection.execute(select(schema.audit).order_by(_AUDIT.number)):
        rows += 1
        if row.number != rows:
            return Verdict(rows - 1, former, rows, f"row {rows} is missing")
        if row.hash != _hash(former, tuple(row)[:-1]):
            return Verdict(rows - 1, former, rows, f"row {rows} is not as it was written, or the one before it")
        former = row.hash
    last = int(get_meta(connection, _COUNTER) or 0)
    if last != rows:
        return Verdict(rows, former, rows + 1, f"rows {rows + 1} to {last} are missing at the end")
    return Verdict(rows, former)


def _hash(former: bytes, values: Any) -> bytes:
    return hashlib.sha256(
        former + json.dumps(list(values), ensure_ascii=False, separators=(",", ":")).encode()
    ).digest()


def _entry(row: Row[tuple[Any, ...]]) -> control_service_pb2.AuditEntry:
    return control_service_pb2.AuditEntry(
        number=row.number,
        time=stamp(row.time),
        actor=row.actor,
        verb=row.verb,
        resource=row.resource,
        subject=row.subject,
        reason=row.reason,
        data_json=row.data_json.encode(),
        hash=row.hash,
    )

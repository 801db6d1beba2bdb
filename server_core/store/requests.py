"""Answers of changing calls, by caller and request id: repeated, a call gets the same answer.

They are sealed, because an answer may hold a token that is shown once, and kept for a week.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from outrider.errors import Conflict
from server_core.store import schema
from server_core.store.common import now_us

KEPT_DAYS = 7


def answer_of(connection: Connection, caller: str, request_id: str, digest: bytes) -> bytes | None:
    """The sealed answer that this very request got. Raises Conflict if the id was used for another request."""
    table = schema.requests.c
    row = connection.execute(
        select(table.digest, table.sealed).where(table.caller == caller, table.request_id == request_id)
    ).first()
    if row is None:
        return None
    if row.digest != digest:
        raise Conflict(
            f"the request id {request_id} was used for another request",
            code="request_id_reused",
            hint="every new request needs a new id",
        )
    return bytes(row.sealed)


def keep(connection: Connection, caller: str, request_id: str, digest: bytes, sealed: bytes) -> None:
    connection.execute(
        insert(schema.requests).values(
            caller=caller, request_id=request_id, digest=digest, sealed=sealed, created_at=now_us()
        )
    )


def forget_old(connection: Connection, before_us: int) -> int:
    """Forget the answers that were given before then; returns how many."""
    return connection.execute(delete(schema.requests).where(schema.requests.c.created_at < before_us)).rowcount

"""Who may call: operators and nodes, by the digests of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select

from server_core.store import schema
from server_core.store.common import now_us

OPERATOR = "operator"
NODE = "node"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose token it is: ``kind`` is "operator" or "node", ``name`` the operator's name or the node's id."""

    kind: str
    name: str
    role: str
    token_digest: bytes

    @property
    def key(self) -> str:
        """The caller as it stands beside its runs and requests."""
        return f"{self.kind}:{self.name}"


def add(connection: Connection, caller: Caller) -> None:
    connection.execute(
        insert(schema.tokens).values(
            hash=caller.token_digest, kind=caller.kind, name=caller.name, role=caller.role, created_at=now_us()
        )
    )


def find(connection: Connection, token_digest: bytes) -> Caller | None:
    row = connection.execute(select(schema.tokens).where(schema.tokens.c.hash == token_digest)).first()
    return None if row is None else Caller(row.kind, row.name, row.role, row.hash)


def remove(connection: Connection, kind: str, name: str) -> None:
    connection.execute(delete(schema.tokens).where(schema.tokens.c.kind == kind, schema.tokens.c.name == name))


def count(connection: Connection, kind: str) -> int:
    return connection.execute(
        select(func.count()).select_from(schema.tokens).where(schema.tokens.c.kind == kind)
    ).scalar_one()

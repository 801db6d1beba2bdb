"""Roles of nodes: what they have, and the lock that their environments are made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from outrider.errors import Conflict, NotFound
from outrider.roles import Role
from outrider.v1 import types_pb2
from server_core.store import schema
from server_core.store.common import dump, now_us, refuse_stale, stamp
from server_core.store.nodes import listing

_T = schema.node_roles


def put(connection: Connection, role: Role, lock: str, expected_version: int | None) -> types_pb2.NodeRole:
    """Make the role, or replace it; the version grows if that is a change."""
    found = find(connection, role.name)
    refuse_stale(f"node role {role.name}", 0 if found is None else found.version, expected_version)
    values: dict[str, Any] = {
        "spec_json": dump(role.model_dump()),
        "lock": lock,
        "lock_sha256": hashlib.sha256(lock.encode()).digest(),
    }
    if found is None:
        connection.execute(insert(_T).values(name=role.name, version=1, updated_at=now_us(), **values))
    elif (dump(spec(found).model_dump()), found.lock.decode()) != (values["spec_json"], lock):
        values |= {"version": found.version + 1, "updated_at": now_us()}
        connection.execute(update(_T).where(_T.c.name == role.name).values(**values))
    return get(connection, role.name)


def find(connection: Connection, name: str) -> types_pb2.NodeRole | None:
    """The role with its lock; None if there is none of that name."""
    row = connection.execute(select(_T).where(_T.c.name == name)).first()
    return None if row is None else _role(row)


def get(connection: Connection, name: str) -> types_pb2.NodeRole:
    """The role with its lock and its nodes. Raises NotFound, which lists the roles that there are."""
    role = find(connection, name)
    if role is None:
        raise NotFound(f"there is no node role {name!r}", code="unknown_node_role", hint=known(connection))
    role.nodes.extend(nodes_of(connection, name))
    return role


def known(connection: Connection) -> str:
    """A hint that lists the roles."""
    return listing("the node roles are", connection.execute(select(_T.c.name).order_by(_T.c.name).limit(21)).scalars())


def nodes_of(connection: Connection, name: str) -> list[str]:
    table = schema.nodes.c
    return list(connection.execute(select(table.node_id).where(table.role == name).order_by(table.node_id)).scalars())


def listed(connection: Connection) -> list[types_pb2.NodeRole]:
    """All roles with their locks and nodes."""
    roles = [_role(row) for row in connection.execute(select(_T).order_by(_T.c.name))]
    for role in roles:
        role.nodes.extend(nodes_of(connection, role.name))
    return roles


def remove(connection: Connection, name: str) -> None:
    """Raises Conflict as long as a node has it."""
    role = get(connection, name)
    if role.nodes:
        raise Conflict(
            f"node role {name} is that of {len(role.nodes)} nodes, {role.nodes[0]} for instance",
            code="node_role_in_use",
            hint="give them another one first: outrider node role assign NODE ROLE",
        )
    connection.execute(delete(_T).where(_T.c.name == name))


def spec(role: types_pb2.NodeRole) -> Role:
    """What the message says, as it was checked when it was set."""
    return Role(
        name=role.name,
        description=role.description,
        agent=role.agent,
        plugins={each.distribution: each.versions for each in role.plugins},
    )


def _role(row: Row[tuple[object, ...]]) -> types_pb2.NodeRole:
    fields = json.loads(row.spec_json)
    return types_pb2.NodeRole(
        name=row.name,
        description=fields["description"],
        agent=fields["agent"],
        plugins=[
            types_pb2.RolePlugin(distribution=name, versions=versions) for name, versions in fields["plugins"].items()
        ],
        lock=row.lock.encode(),
        lock_sha256=row.lock_sha256,
        version=row.version,
        updated_at=stamp(row.updated_at),
    )

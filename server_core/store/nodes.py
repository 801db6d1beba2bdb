"""Nodes: their record, what their agents reported, and when they were last seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from outrider.errors import Conflict, NotFound
from outrider.v1 import node_service_pb2, types_pb2
from server_core.store import schema
from server_core.store.common import dump, now_us, refuse_stale

_LISTED = 20


@dataclass(frozen=True, slots=True)
class Session:
    session_id: str
    epoch: int
    resumed: bool


@dataclass(frozen=True, slots=True)
class Sighting:
    """What is known of a node's presence at a moment."""

    node_id: str
    last_seen_us: int
    brief: bytes | None


def add(connection: Connection, node_id: str, labels: Mapping[str, str], role: str) -> None:
    if find(connection, node_id) is not None:
        raise Conflict(
            f"node {node_id} exists already", code="already_exists", hint="remove it first to give it a new token"
        )
    connection.execute(
        insert(schema.nodes).values(
            node_id=node_id,
            labels_json=dump(dict(labels)),
            role=role,
            version=1,
            epoch=0,
            session_id="",
            agent_version="",
            facts_json="{}",
            described=b"",
            address="",
            created_at=now_us(),
        )
    )


def remove(connection: Connection, node_id: str) -> None:
    get(connection, node_id)
    connection.execute(delete(schema.nodes).where(schema.nodes.c.node_id == node_id))


def find(connection: Connection, node_id: str) -> types_pb2.Node | None:
    row = connection.execute(select(schema.nodes).where(schema.nodes.c.node_id == node_id)).first()
    return None if row is None else _node(row)


def get(connection: Connection, node_id: str) -> types_pb2.Node:
    """The node. Raises NotFound, which lists the nodes that there are."""
    node = find(connection, node_id)
    if node is None:
        raise unknown(connection, node_id)
    return node


def unknown(connection: Connection, node_id: str) -> NotFound:
    names = connection.execute(
        select(schema.nodes.c.node_id).order_by(schema.nodes.c.node_id).limit(_LISTED + 1)
    ).scalars()
    return NotFound(f"there is no node {node_id!r}", code="unknown_node", hint=listing("the nodes are", names))


def listing(lead: str, names: Iterable[str]) -> str:
    """ "the nodes are a, b and c…" for a hint, or that there are none."""
    known = list(names)
    if not known:
        return "there are none yet"
    return f"{lead} {', '.join(known[:_LISTED])}" + (", …" if len(known) > _LISTED else "")


def listed(connection: Connection) -> list[types_pb2.Node]:
    """All nodes, with step types and plugins."""
    return [_node(row) for row in connection.execute(select(schema.nodes).order_by(schema.nodes.c.node_id))]


def assign(connection: Connection, node_id: str, role: str, expected_version: int | None) -> types_pb2.Node:
    """Give the node another role; the version grows if that is a change."""
    node = get(connection, node_id)
    refuse_stale(f"node {node_id}", node.version, expected_version)
    if node.role == role:
        return node
    connection.execute(
        update(schema.nodes).where(schema.nodes.c.node_id == node_id).values(role=role, version=node.version + 1)
    )
    return get(connection, node_id)


def count(connection: Connection) -> int:
    return int(connection.execute(select(func.count()).select_from(schema.nodes)).scalar() or 0)


def begin_session(
    connection: Connection,
    node_id: str,
    request: node_service_pb2.RegisterRequest,
    new_session_id: str,
    address: str,
) -> Session:
    """Keep what the agent says of itself, and resume its last session if it is the newest; else begin one.

    The epoch grows with every new session, and a resume keeps it.
    """
    row = connection.execute(select(schema.nodes).where(schema.nodes.c.node_id == node_id)).first()
    if row is None:
        raise unknown(connection, node_id)
    resumed = bool(request.last_session_id) and request.last_session_id == row.session_id
    session = Session(row.session_id, row.epoch, True) if resumed else Session(new_session_id, row.epoch + 1, False)
    described = types_pb2.Node(step_types=request.step_types, plugins=request.plugins)
    connection.execute(
        update(schema.nodes)
        .where(schema.nodes.c.node_id == node_id)
        .values(
            session_id=session.session_id,
            epoch=session.epoch,
            agent_version=request.agent_version,
            labels_json=dump(json.loads(row.labels_json) | dict(request.labels)),
            facts_json=request.facts_json.decode() or "{}",
            described=described.SerializeToString(),
            environment=request.environment.SerializeToString() if request.HasField("environment") else None,
            address=address,
            last_seen=now_us(),
        )
    )
    return session


def current_session(connection: Connection, node_id: str) -> tuple[str, int]:
    """Session id and epoch of the newest session; ("", 0) where there is none."""
    row = connection.execute(
        select(schema.nodes.c.session_id, schema.nodes.c.epoch).where(schema.nodes.c.node_id == node_id)
    ).first()
    return ("", 0) if row is None else (row.session_id, row.epoch)


def save_sightings(connection: Connection, sightings: Iterable[Sighting]) -> None:
    for sighting in sightings:
        connection.execute(
            update(schema.nodes)
            .where(schema.nodes.c.node_id == sighting.node_id)
            .values(last_seen=sighting.last_seen_us, **({"brief": sighting.brief} if sighting.brief else {}))
        )


def _node(row: Row[tuple[object, ...]]) -> types_pb2.Node:
    node = types_pb2.Node.FromString(row.described)
    node.node_id = row.node_id
    node.labels.update(json.loads(row.labels_json))
    node.role = row.role
    node.agent_version = row.agent_version
    node.facts_json = row.facts_json.encode()
    node.epoch = row.epoch
    node.version = row.version
    if row.environment is not None:
        node.environment.ParseFromString(row.environment)
    node.address = row.address
    node.created_at.FromMicroseconds(row.created_at)
    if row.last_seen is not None:
        node.last_seen.FromMicroseconds(row.last_seen)
    if row.brief:
        node.brief.ParseFromString(row.brief)
    return node

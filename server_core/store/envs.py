"""Env sets: names in the clear, values sealed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import Connection, delete, insert, select, update

from outrider.errors import NotFound
from outrider.v1 import control_service_pb2
from server_core.store import schema
from server_core.store.common import now_us, refuse_stale, stamp
from server_core.store.nodes import listing


def put(
    connection: Connection,
    name: str,
    sealed: Mapping[str, bytes],
    remove_names: Iterable[str],
    expected_version: int | None,
) -> control_service_pb2.EnvSet:
    """Merge sealed values into a set, making it if need be."""
    row = connection.execute(select(schema.env_sets).where(schema.env_sets.c.name == name)).first()
    refuse_stale(f"env set {name}", 0 if row is None else row.version, expected_version)
    if row is None:
        connection.execute(insert(schema.env_sets).values(name=name, version=1, updated_at=now_us()))
    else:
        connection.execute(
            update(schema.env_sets)
            .where(schema.env_sets.c.name == name)
            .values(version=row.version + 1, updated_at=now_us())
        )
    table = schema.env_values
    for variable in {*remove_names, *sealed}:
        connection.execute(delete(table).where(table.c.set_name == name, table.c.name == variable))
    for variable, value in sealed.items():
        connection.execute(insert(table).values(set_name=name, name=variable, sealed=value))
    return get(connection, name)


def get(connection: Connection, name: str) -> control_service_pb2.EnvSet:
    """The set, without values. Raises NotFound, which lists the sets that there are."""
    row = connection.execute(select(schema.env_sets).where(schema.env_sets.c.name == name)).first()
    if row is None:
        raise NotFound(f"there is no env set {name!r}", code="unknown_env_set", hint=known_sets(connection))
    return control_service_pb2.EnvSet(
        name=name, names=names_of(connection, name), version=row.version, updated_at=stamp(row.updated_at)
    )


def known_sets(connection: Connection) -> str:
    names = connection.execute(select(schema.env_sets.c.name).order_by(schema.env_sets.c.name).limit(21)).scalars()
    return listing("the env sets are", names)


def names_of(connection: Connection, name: str) -> list[str] | None:
    """The variables of a set; None if there is no such set."""
    if connection.execute(select(schema.env_sets.c.name).where(schema.env_sets.c.name == name)).first() is None:
        return None
    table = schema.env_values.c
    return list(connection.execute(select(table.name).where(table.set_name == name).order_by(table.name)).scalars())


def listed(connection: Connection) -> list[control_service_pb2.EnvSet]:
    names = connection.execute(select(schema.env_sets.c.name).order_by(schema.env_sets.c.name)).scalars().all()
    return [get(connection, name) for name in names]


def remove(connection: Connection, name: str) -> None:
    get(connection, name)
    connection.execute(delete(schema.env_values).where(schema.env_values.c.set_name == name))
    connection.execute(delete(schema.env_sets).where(schema.env_sets.c.name == name))


def sealed_value(connection: Connection, set_name: str, name: str) -> bytes | None:
    table = schema.env_values.c
    value = connection.execute(select(table.sealed).where(table.set_name == set_name, table.name == name)).scalar()
    return None if value is None else bytes(value)

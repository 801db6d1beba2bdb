"""Objects: attributes set by the platform, status written back by runs, each with a version of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from outrider.errors import InvalidInput, NotFound
from outrider.v1 import types_pb2
from server_core.store import schema
from server_core.store.common import dump, get_meta, now_us, refuse_stale, set_meta, stamp
from server_core.store.nodes import listing

MAX_ATTRIBUTES_BYTES = 256 * 1024
_MAX_VALUE_BYTES = 64 * 1024
_REMOVALS_SINCE = "object_removals_since"  # in `meta`: the number in the audit log after which removals count


def spoken(ref: types_pb2.ObjectRef) -> str:
    return f"{ref.kind}/{ref.name}"


def find(connection: Connection, ref: types_pb2.ObjectRef) -> types_pb2.Object | None:
    table = schema.objects.c
    row = connection.execute(select(schema.objects).where(table.kind == ref.kind, table.name == ref.name)).first()
    return None if row is None else _object(connection, row)


def get(connection: Connection, ref: types_pb2.ObjectRef) -> types_pb2.Object:
    """The object. Raises NotFound, which lists those of its kind."""
    found = find(connection, ref)
    if found is None:
        table = schema.objects.c
        names = connection.execute(
            select(table.kind, table.name).where(table.kind == ref.kind).order_by(table.name).limit(21)
        )
        others = [f"{row.kind}/{row.name}" for row in names]
        raise NotFound(
            f"there is no object {spoken(ref)}",
            code="unknown_object",
            hint=listing(f"the objects of kind {ref.kind} are", others)
            if others
            else f"there are none of kind {ref.kind}; set one with `outrider object set {spoken(ref)} …`",
        )
    return found


def listed(connection: Connection, kind: str) -> list[types_pb2.Object]:
    query = select(schema.objects).order_by(schema.objects.c.kind, schema.objects.c.name)
    if kind:
        query = query.where(schema.objects.c.kind == kind)
    return [_object(connection, row) for row in connection.execute(query).all()]


def put(
    connection: Connection,
    ref: types_pb2.ObjectRef,
    attributes: Mapping[str, Any],
    *,
    replace: bool,
    expected_version: int | None,
) -> types_pb2.Object:
    """Merge ``attributes`` into the object's (None removes one), or replace them all; make the object if need be."""
    table = schema.objects.c
    where = (table.kind == ref.kind, table.name == ref.name)
    row = connection.execute(select(schema.objects).where(*where)).first()
    refuse_stale(f"object {spoken(ref)}", 0 if row is None else row.version, expected_version)
    kept = {} if row is None or replace else json.loads(row.attributes_json)
    merged = {name: value for name, value in {**kept, **attributes}.items() if value is not None}
    text = dump(merged)
    if len(text) > MAX_ATTRIBUTES_BYTES:
        raise InvalidInput(
            f"the attributes of {spoken(ref)} would have {len(text)} bytes; {MAX_ATTRIBUTES_BYTES} are allowed",
            code="too_large",
        )
    now = now_us()
    if row is None:
        connection.execute(
            insert(schema.objects).values(
                kind=ref.kind,
                name=ref.name,
                attributes_json=text,
                version=1,
                status_version=0,
                created_at=now,
                updated_at=now,
            )
        )
    elif text != row.attributes_json:
        connection.execute(
            update(schema.objects).where(*where).values(attributes_json=text, version=row.version + 1, updated_at=now)
        )
    return get(connection, ref)


def remove(connection: Connection, ref: types_pb2.ObjectRef) -> None:
    get(connection, ref)
    for table in (schema.object_status, schema.objects):
        connection.execute(delete(table).where(table.c.kind == ref.kind, table.c.name == ref.name))


def was_removed(connection: Connection, ref: types_pb2.ObjectRef) -> bool:
    """Whether somebody removed the object, and it is not there again. Not merely: whether it is not there.

    What a store has never heard of, or forgot, may be there under a name that somebody's files rely on. That it was
    removed stands in the audit log, for ever; what was removed before a backup may have been made again after it, so
    rows from before a restore don't count.
    """
    if find(connection, ref) is not None:
        return False
    row = schema.audit.c
    since = int(get_meta(connection, _REMOVALS_SINCE) or 0)
    query = select(row.number).where(row.subject == spoken(ref), row.resource == "objects", row.verb == "delete")
    return connection.execute(query.where(row.number > since).limit(1)).first() is not None


def distrust_removals(connection: Connection) -> None:
    """Let no removal that is known by now count for `was_removed` any more."""
    last = connection.execute(select(func.max(schema.audit.c.number))).scalar()
    set_meta(connection, _REMOVALS_SINCE, str(last or 0))


def write_back(
    connection: Connection, target: types_pb2.Object, run_id: str, run_sequence: int, values: Mapping[str, Any]
) -> int:
    """Put what a run learned onto the status of ``target``, its object as it was when the run was accepted.

    Returns the status' version, 0 where that object is gone; another that has its name now is another object.
    Ordered by run sequence: what a later run wrote stays.
    """
    table, ref = schema.objects.c, target.ref
    where = (
        table.kind == ref.kind,
        table.name == ref.name,
        table.created_at == target.created_at.ToMicroseconds(),
    )
    version = connection.execute(select(table.status_version).where(*where)).scalar()
    if version is None:
        return 0
    status = schema.object_status
    changed = False
    for name, value in values.items():
        text = dump(value)
        if len(text) > _MAX_VALUE_BYTES:
            raise InvalidInput(
                f"the value written back to attribute {name} has {len(text)} bytes; {_MAX_VALUE_BYTES} are allowed",
                code="too_large",
            )
        key = (status.c.kind == ref.kind, status.c.name == ref.name, status.c.attribute == name)
        row = connection.execute(select(status).where(*key)).first()
        if row is not None and (
            row.run_sequence > run_sequence or (row.run_sequence == run_sequence and row.value_json == text)
        ):
            continue
        written = {"value_json": text, "run_id": run_id, "run_sequence": run_sequence, "written_at": now_us()}
        if row is None:
            connection.execute(insert(status).values(kind=ref.kind, name=ref.name, attribute=name, **written))
        else:
            connection.execute(update(status).where(*key).values(**written))
        changed = True
    if changed:
        connection.execute(update(schema.objects).where(*where).values(status_version=version + 1, updated_at=now_us()))
    return int(version) + changed


def _object(connection: Connection, row: Row[tuple[object, ...]]) -> types_pb2.Object:
    found = types_pb2.Object(
        ref=types_pb2.ObjectRef(kind=row.kind, name=row.name),
        attributes_json=row.attributes_json.encode(),
        version=row.version,
        status_version=row.status_version,
        created_at=stamp(row.created_at),
        updated_at=stamp(row.updated_at),
    )
    status = schema.object_status
    values: dict[str, Any] = {}
    for item in connection.execute(
        select(status).where(status.c.kind == row.kind, status.c.name == row.name).order_by(status.c.attribute)
    ):
        values[item.attribute] = json.loads(item.value_json)
        found.status.add(
            name=item.attribute,
            value_json=item.value_json.encode(),
            run_id=item.run_id,
            written_at=stamp(item.written_at),
        )
    found.status_json = dump(values).encode()
    return found

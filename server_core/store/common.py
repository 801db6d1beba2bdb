"""What all statement modules share."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import Connection, insert, select, update

from outrider.errors import Conflict
from server_core.store import schema


def now_us() -> int:
    """The wall clock in microseconds since 1970; for people only."""
    return time.time_ns() // 1000


def monotonic_us() -> int:
    """A clock that nobody sets, in microseconds; it tells how long something takes, and nothing else."""
    return round(time.monotonic() * 1e6)


def stamp(time_us: int | None) -> Timestamp | None:
    """A time column as a Timestamp; None stays None."""
    if time_us is None:
        return None
    message = Timestamp()
    message.FromMicroseconds(time_us)
    return message


def micros(message: Timestamp) -> int | None:
    """A Timestamp as a time column; None where it is not set."""
    return message.ToMicroseconds() if message.seconds or message.nanos else None


def spoken(time_us: int | None) -> str:
    """A time as it stands in a sentence, in UTC."""
    if time_us is None:
        return "never"
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def get_meta(connection: Connection, key: str) -> str | None:
    value = connection.execute(select(schema.meta.c.value).where(schema.meta.c.key == key)).scalar()
    return None if value is None else str(value)


def set_meta(connection: Connection, key: str, value: str) -> None:
    changed = connection.execute(update(schema.meta).where(schema.meta.c.key == key).values(value=value))
    if changed.rowcount == 0:
        connection.execute(insert(schema.meta).values(key=key, value=value))


def next_number(connection: Connection, key: str) -> int:
    """The next of a series that never goes back, also when what had the last number was removed."""
    number = int(get_meta(connection, key) or 0) + 1
    set_meta(connection, key, str(number))
    return number


def refuse_stale(what: str, version: int, expected: int | None) -> None:
    """Raise Conflict unless ``what`` has the version that the caller knew; None: the caller does not care."""
    if expected is None or expected == version:
        return
    if expected == 0:
        raise Conflict(f"{what} exists already, with version {version}", code="version_conflict")
    have = f"has version {version}" if version else "does not exist"
    raise Conflict(f"{what} {have}, not {expected}", code="version_conflict", hint="read it again, then change it")

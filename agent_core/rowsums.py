"""Checksums of the journal's rows, so that a bit that flips within a value is not taken for another value.

SQLite keeps none. Here a table that has the column ``row_sum`` gets one of every row, from triggers which the writer's
connection alone has: whoever else changes a row is found out, too. A row that was found to be damaged stays so when it
is changed. A row without a sum is of an older journal.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Mapping

COLUMN = "row_sum"
_FUNCTION = "outrider_row_sum"
_BAD = "x''"


def row_sum(*values: object) -> bytes:
    """Of the values of a row's other columns, in the table's order: CRC-32, which sees any few bits that flip."""
    short = [(len(value), zlib.crc32(value)) if isinstance(value, bytes) else value for value in values]
    return zlib.crc32(repr(short).encode()).to_bytes(4, "big")


def check(row: sqlite3.Row) -> None:
    """Raise ValueError unless the row, of which all columns were selected, is as it was written."""
    values = dict(zip(row.keys(), row, strict=True))
    expected = values.pop(COLUMN)
    # Text counts as its bytes: where one of them has flipped it may be no text any more.
    found = (value.encode() if isinstance(value, str) else value for value in values.values())
    if expected is not None and expected != row_sum(*found):
        raise ValueError("a row of it is damaged: its checksum is another")


def prepare(db: sqlite3.Connection) -> None:
    """To be done first on the writer's connection."""
    db.create_function(_FUNCTION, -1, row_sum, deterministic=True)


def guard(db: sqlite3.Connection) -> None:
    """Have every row that is written from now on summed up, and those that have no sum yet."""
    for table, columns in _guarded(db).items():
        old, new = _sum_of(columns, "old."), _sum_of(columns, "new.")
        kept = f"CASE WHEN coalesce(old.{COLUMN}, {old}) = {old} THEN {new} ELSE {_BAD} END"
        # Of these columns alone: the trigger's own change is none of them.
        update = f"UPDATE OF {', '.join(columns)}"
        for name, event, value in (("inserted", "INSERT", new), ("updated", update, kept)):
            db.execute(
                f"CREATE TEMP TRIGGER {table}_{name} AFTER {event} ON main.{table} BEGIN"  # noqa: S608 - our own names
                f" UPDATE {table} SET {COLUMN} = {value} WHERE rowid = new.rowid; END"
            )
        db.execute(f"UPDATE {table} SET {COLUMN} = {_sum_of(columns)} WHERE {COLUMN} IS NULL")  # noqa: S608


def forgetting(db: sqlite3.Connection) -> str:
    """The statements of a migration that let go of the sums of all rows that are whole: it may change the columns."""
    return "".join(
        f"UPDATE {table} SET {COLUMN} = NULL WHERE {COLUMN} = {_sum_of(columns)};"  # noqa: S608
        for table, columns in _guarded(db).items()
    )


def _sum_of(columns: Mapping[str, str], prefix: str = "") -> str:
    values = (f"CAST({prefix}{name} AS BLOB)" if kind == "TEXT" else prefix + name for name, kind in columns.items())
    return f"{_FUNCTION}({', '.join(values)})"


def _guarded(db: sqlite3.Connection) -> dict[str, dict[str, str]]:
    """The other columns, with their types, of each table that has one for its sum."""
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {table: {row[1]: row[2] for row in db.execute(f"PRAGMA table_info({table})")} for table in tables}
    guarded = {table: columns for table, columns in found.items() if COLUMN in columns}
    for columns in guarded.values():
        del columns[COLUMN]
    return guarded

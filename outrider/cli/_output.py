"""What commands print: tables to read, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_COLOURS = {
    "succeeded": "green", "online": "green", "running": "cyan", "ok": "green", "healthy": "green",
    "failed": "red", "offline": "red", "error": "red", "unhealthy": "red", "dead": "red",
    "cancelled": "yellow", "unknown": "yellow", "waiting": "yellow", "queued": "yellow", "restarting": "yellow",
}  # fmt: skip


def output_option(command: F) -> F:
    """Add ``-o table|json``; the command gets ``as_json: bool``."""

    def parse(_ctx: click.Context, _param: click.Parameter, value: str) -> bool:
        return value == "json"

    return click.option(
        "-o",
        "--output",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=parse,
        help="How to print the result.",
    )(command)


def emit_json(data: Any) -> None:
    """Print a value, or a message, as JSON."""
    click.echo(json.dumps(plain(data), indent=2, ensure_ascii=False))


def emit_json_line(data: Any) -> None:
    """Print a value, or a message, as one line of JSON: an item of a stream."""
    click.echo(json.dumps(plain(data), ensure_ascii=False))


def note(text: str) -> None:
    """Say something that is not the result, on stderr."""
    click.echo(clean(text), err=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Print rows under headers, in columns. Without any row, ``empty`` is said on stderr."""
    cells = [[_text(cell) for cell in row] for row in rows]
    if not cells:
        note(empty)
        return
    widths = [max(map(_width, column)) for column in zip(headers, *cells, strict=True)]
    titles = [click.style(title, bold=True) if _coloured() else title for title in headers]
    _row(zip(titles, headers, widths, strict=True))
    for row in cells:
        _row(zip(map(paint, row), row, widths, strict=True))


def fields(rows: Iterable[tuple[str, Any]]) -> None:
    """Print name and value a line, values aligned; those that are empty are left out."""
    shown = [(name, _text(value)) for name, value in rows if value not in (None, "", (), [], {})]
    width = max((len(name) for name, _ in shown), default=0) + 1
    for name, value in shown:
        click.echo(f"{name + ':':<{width}}  {paint(value)}")


def paint(text: str) -> str:
    """The text in the colour of the state that it names, if stdout is a terminal."""
    colour = _COLOURS.get(text.partition(" ")[0])
    return click.style(text, fg=colour) if colour and _coloured() else text


def clean(text: str) -> str:
    """The text without control characters: what a node or an image says must not steer the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" if c not in "\t\n\r" else " " for c in text)


def plain(data: Any) -> Any:
    """A message as JSON values.

    Fields keep their names; ``*_json`` fields come decoded and without that ending, times as RFC 3339, enums as
    short lower-case words, unset messages and unspecified enums as null, other bytes as hexadecimal digits.
    """
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(item) for item in data]
    if isinstance(data, bytes):
        return data.hex()
    if hasattr(data, "DESCRIPTOR"):
        return _message(data)
    return data


def decoded(data: bytes) -> Any:
    """The value of a ``*_json`` field; None if it is empty."""
    return json.loads(data) if data else None


def moment(timestamp: Any) -> str | None:
    """A protobuf time in RFC 3339, None if it is not set."""
    return str(timestamp.ToJsonString()) if timestamp.seconds or timestamp.nanos else None


def word(enum: Any, number: int) -> str:
    """The short word for a value of an enum wrapper: ``RUN_STATE_FAILED`` is ``failed``; "" if unspecified."""
    return _word(enum.DESCRIPTOR, number) or ""


def age(timestamp: Any) -> str:
    """How long ago a protobuf time was, roughly: ``3m``; "" if it is not set."""
    if not timestamp.seconds:
        return ""
    return duration(max(0.0, time.time() - timestamp.seconds - timestamp.nanos / 1e9))


def seconds_between(start: Any, end: Any) -> float | None:
    """Seconds from one protobuf time to another; None if one is not set."""
    if not start.seconds or not end.seconds:
        return None
    return max(0.0, float(end.seconds - start.seconds + (end.nanos - start.nanos) / 1e9))


def duration(seconds: float | None) -> str:
    """``0.4s``, ``12s``, ``3m20s``, ``2h05m``, ``4d``; "" for None."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d"


def size(number: int) -> str:
    """Bytes for people: ``12.3 MiB``."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def compact(value: Any) -> str:
    """A JSON value in a line; a string without its quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _message(message: Any) -> Any:
    name = message.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        return moment(message)
    if name == "google.protobuf.Duration":
        return message.seconds + message.nanos / 1e9
    known = {field.name for field in message.DESCRIPTOR.fields}
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        key = field.name
        if key.endswith("_json") and isinstance(value, bytes):
            result[key.removesuffix("_json")] = decoded(value)
            continue
        if f"{key}_json" in known:
            key = f"{key}_attributes"  # Object.status beside Object.status_json
        result[key] = _field(message, field, value)
    return result


def _field(message: Any, field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {str(key): plain(value[key]) for key in value}
    if _is_repeated(field):
        return [_word(field.enum_type, item) if field.enum_type else plain(item) for item in value]
    if field.message_type is not None:
        return plain(value) if message.HasField(field.name) else None
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    return plain(value)


def _is_repeated(field: Any) -> bool:
    # protobuf 6.31 renamed `label` to `is_repeated` and warns about the former; 4.25 has only the former.
    return bool(field.is_repeated) if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def _word(enum: Any, number: int) -> str | None:
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).lstrip("_") + "_"
    short = str(value.name).removeprefix(prefix).lower()
    return None if short == "unspecified" else short


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _row(cells: Iterable[tuple[str, str, int]]) -> None:
    click.echo("  ".join(painted + " " * (width - _width(text)) for painted, text, width in cells).rstrip())

"""Values that people type: durations, KEY=VALUE, KIND/NAME."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import click

from outrider._units import parse_duration

_REF = re.compile(r"[^/\s]+/[^/\s]+")


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """``90s``, ``10m``, ``1h30m``; gives seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Ref(click.ParamType):  # type: ignore[type-arg]
    """``KIND/NAME``; gives the pair."""

    name = "kind/name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        if not _REF.fullmatch(value):
            self.fail(f"{value!r} is not the name of an object; it reads like KIND/NAME", param, ctx)
        kind, _, name = value.partition("/")
        return kind, name


def pair(text: str, what: str) -> tuple[str, str]:
    """Split ``KEY=VALUE``. The text itself is not repeated in the error: it may hold a secret."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.UsageError(f"{what} reads like KEY=VALUE; there is one without a key or without '='")
    return key, value


def pairs(texts: Iterable[str], what: str) -> dict[str, str]:
    """``KEY=VALUE`` texts as a mapping. Raises UsageError if a key stands there twice."""
    values: dict[str, str] = {}
    for text in texts:
        key, value = pair(text, what)
        if key in values:
            raise click.UsageError(f"{what}: {key!r} is given twice")
        values[key] = value
    return values


def json_or_string(text: str) -> Any:
    """The JSON value that the text is, or else the text itself. NaN and Infinity are not JSON.

    A number stays a text if JSON would write it otherwise: version 1.10 must not become 1.1.
    """

    def refuse(_constant: str) -> Any:
        raise ValueError

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if is_number and json.dumps(value) != text else value

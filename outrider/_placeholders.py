"""Parameters in which the step's program replaces `$(…)`: what an expression put there is data, and stays as it is.

A parameter says so in its JSON Schema with ``"x-outrider-placeholders": true``; `$$(` is a literal `$(` there. So each
`$(` that came, whole or in part, out of an expression is doubled before the program sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

KEYWORD = "x-outrider-placeholders"
_MAX_DEPTH = 32

Part = tuple[str, bool]  # a text, and whether it is data


def protected(parts: Iterable[Part]) -> str:
    """The parts as one text, with each `$(` doubled that is not wholly the author's."""
    text, marks = "", b""
    for piece, is_data in parts:
        text += piece
        marks += (b"1" if is_data else b"0") * len(piece)
    out = []
    for at, letter in enumerate(text):
        if text.startswith("$(", at) and b"1" in marks[at : at + 2]:
            out.append("$")
        out.append(letter)
    return "".join(out)


def walk(
    value: Any, schema: Mapping[str, Any], text: Callable[[str, bool, list[Mapping[str, Any]]], Any], *, depth: int = 0
) -> Any:
    """``value`` with each text replaced by ``text(it, whether it holds placeholders, its schemas)``."""
    return _walk(value, [schema], schema, text, depth)


def protect_data(value: Any, schemas: list[Mapping[str, Any]], root: Mapping[str, Any]) -> Any:
    """A value that is data as a whole."""
    return _walk(value, schemas, root, lambda text, held, _: protected([(text, True)]) if held else text, 0)


def _walk(
    value: Any,
    schemas: list[Mapping[str, Any]],
    root: Mapping[str, Any],
    text: Callable[[str, bool, list[Mapping[str, Any]]], Any],
    depth: int,
) -> Any:
    schemas = _alternatives(schemas, root)
    if isinstance(value, str):
        return text(value, any(schema.get(KEYWORD) is True for schema in schemas), schemas)
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        return {
            key: _walk(item, [found for each in schemas for found in _member(each, key)], root, text, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [each["items"] for each in schemas if isinstance(each.get("items"), Mapping)]
        return [_walk(item, items, root, text, depth + 1) for item in value]
    return value


def _member(schema: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    named = schema.get("properties")
    if isinstance(named, Mapping) and isinstance(named.get(key), Mapping):
        return [named[key]]
    found = [*dict(schema.get("patternProperties") or {}).values(), schema.get("additionalProperties")]
    return [each for each in found if isinstance(each, Mapping)]


def _alternatives(schemas: list[Mapping[str, Any]], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemas and whatever they point to; too many are a plugin's mischief."""
    found: list[Mapping[str, Any]] = []
    waiting = list(schemas)
    while waiting and len(found) < 64:
        schema = waiting.pop()
        found.append(schema)
        for keyword in ("anyOf", "oneOf", "allOf"):
            waiting += [each for each in schema.get(keyword) or () if isinstance(each, Mapping)]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/$defs/"):
            target = (root.get("$defs") or {}).get(reference.removeprefix("#/$defs/"))
            if isinstance(target, Mapping):
                waiting.append(target)
    return found

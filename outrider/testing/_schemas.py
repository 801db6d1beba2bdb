"""What JSON Schemas say, at whatever depth: where keys would pass that nobody knows, and what looks like a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from outrider.schema import resolve_ref

Schema = Mapping[str, Any]

_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|bearer|authorization|private_?key|api_?key|access_?keys?$"
    r"|(^|_)(pw|pwd)s?(_|$)",
    re.IGNORECASE,
)
_ELSEWHERE = re.compile(r"(_|^)(envs?|from|names?)$")  # it says where the secret is to be found
_BRANCHES = ("anyOf", "oneOf", "allOf")


def open_objects(root: Schema, label: str) -> Iterator[tuple[str, str]]:
    """Objects with fields that let others pass: where it is, and what the model is called. Mappings are none."""
    for path, schema in _within(root, root, label, set()):
        extra = schema.get("additionalProperties")
        mapping = not schema.get("properties") and (extra is not None or "patternProperties" in schema)
        if schema.get("type") == "object" and extra is not False and not mapping:
            yield path, str(schema.get("title", "Model"))


def secrets(root: Schema) -> Iterator[str]:
    """The paths of properties that look as if a secret was to be given in them."""
    for path, schema in _within(root, root, "", set()):
        for name, inner in dict(schema.get("properties") or {}).items():
            leaves = list(_leaves(root, inner, set()))
            named = _SECRET.search(name) and not _ELSEWHERE.search(name)
            if any(map(_is_hidden, leaves)) or (named and any(map(_is_text, leaves))):
                yield f"{path}.{name}".removeprefix(".")


def _within(root: Schema, schema: Any, path: str, seen: set[str]) -> Iterator[tuple[str, Schema]]:
    """The schema and all within it, with paths like ``auth.password``, ``users[].name``, ``users.*.name``."""
    if isinstance(schema, Mapping):
        yield path, schema
        for inner in _same(root, schema, seen):
            yield from _within(root, inner, path, seen)
        for name, inner in dict(schema.get("properties") or {}).items():
            yield from _within(root, inner, f"{path}.{name}", seen)
        for ending, inner in _members(schema):
            yield from _within(root, inner, path + ending, seen)


def _leaves(root: Schema, schema: Any, seen: set[str]) -> Iterator[Schema]:
    """The schema, and those of what a list or a mapping holds; the fields of a model have names of their own."""
    if schema is True:
        yield {}
    elif isinstance(schema, Mapping):
        yield schema
        for inner in (*_same(root, schema, seen), *(each for _, each in _members(schema))):
            yield from _leaves(root, inner, seen)


def _same(root: Schema, schema: Schema, seen: set[str]) -> Iterator[Any]:
    """Schemas of the very same value. What is referred to is given once: it may refer to itself."""
    if "$ref" in schema and schema["$ref"] not in seen:
        seen.add(schema["$ref"])
        yield resolve_ref(root, schema)
    for keyword in _BRANCHES:
        yield from schema.get(keyword) or ()


def _members(schema: Schema) -> Iterator[tuple[str, Any]]:
    """Schemas of what a list or a mapping holds."""
    for each in (schema.get("items"), *(schema.get("prefixItems") or ())):
        yield "[]", each
    for each in (schema.get("additionalProperties"), *dict(schema.get("patternProperties") or {}).values()):
        yield ".*", each


def _is_hidden(leaf: Schema) -> bool:
    """What pydantic makes of a SecretStr."""
    return leaf.get("format") == "password" or leaf.get("writeOnly") is True


def _is_text(leaf: Schema) -> bool:
    """Whether any text may be given: neither a choice of a few nor a path."""
    if {"enum", "const", "x-outrider-path"} & leaf.keys():
        return False
    if "type" not in leaf:
        return not {"$ref", *_BRANCHES} & leaf.keys()  # whatever one likes
    return leaf["type"] == "string" or "string" in leaf["type"]

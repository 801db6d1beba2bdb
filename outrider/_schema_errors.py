"""Parameters against a JSON Schema, where some values are not known yet, and errors in words.

jsonschema does the checking; around it stand the rules for expressions: a text that holds one fits everywhere, and
a rule about a whole (`not`, `uniqueItems`, `if`) is not applied to something that holds one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from outrider._suggest import did_you_mean, listing
from outrider._yaml import short
from outrider.errors import PermanentError, Problem

_WHOLE = frozenset({"not", "if", "uniqueItems", "contains", "const", "enum", "dependentSchemas"})
"""Keywords that can't be judged while a part of the value is not known."""

_UNSPEAKABLE = frozenset({"pattern", "not", "oneOf", "anyOf"})
"""Keywords whose rule says little to a person: a schema's "x-outrider-message" is said instead."""

_TYPES = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "empty",
}


def schema_problems(
    schema: Mapping[str, Any], value: Any, path: str, what: str, *, expressions: bool = False
) -> list[Problem]:
    """Everything that is wrong with ``value``; ``path`` leads the problems' paths, ``what`` has the schema.

    With ``expressions``, texts that hold one are not known yet; without, every text is data.
    """
    validator_class = _validator_class(expressions)
    try:
        errors = list(validator_class(schema).iter_errors(_plain(value)))
    except Exception as error:
        # The schema is a plugin's. Whatever it does to the library must not look like the user's mistake.
        said = " ".join(str(error).split())[:200]
        return [Problem(f"{what} can't be checked: its schema is broken: {said}", path, hint="update its plugin")]
    problems: list[Problem] = []
    for found in errors:
        for problem in _explain(found, path):
            if problem not in problems:
                problems.append(problem)
    return problems


@functools.cache
def _validator_class(expressions: bool) -> Any:
    try:
        import referencing
        from jsonschema import Draft202012Validator, validators
    except ImportError as error:
        raise PermanentError(
            "checking parameters needs the library jsonschema",
            code="missing_dependency",
            hint="install outrider[agent], outrider[server] or outrider[cli]",
        ) from error
    keywords = {
        name: _relaxed(name, check) if expressions else check for name, check in Draft202012Validator.VALIDATORS.items()
    }
    # A registry of our own: the default one fetches schemas that a `$ref` names by their URL.
    base = validators.extend(Draft202012Validator, keywords)  # type: ignore[no-untyped-call]
    return functools.partial(base, registry=referencing.Registry())


def _relaxed(name: str, check: Any) -> Any:
    def relaxed(validator: Any, rule: Any, value: Any, schema: Any) -> Iterator[Any]:
        if _is_expression(value):
            return
        if name in _WHOLE and _holds_expression(value):
            return
        # More than one may fit while a part is open; which parameters are given is known all the same.
        if name == "oneOf" and not _required_only(rule) and _holds_expression(value):
            yield from validator.VALIDATORS["anyOf"](validator, rule, value, schema) or ()
            return
        yield from check(validator, rule, value, schema) or ()

    return relaxed


def _required_only(rule: Any) -> bool:
    """Whether alternatives differ only in which parameters are given."""
    return isinstance(rule, list) and all(
        isinstance(branch, Mapping) and set(branch) == {"required"} for branch in rule
    )


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and "${{" in value


def _holds_expression(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_expression, value.values()))
    if isinstance(value, list):
        return any(map(_holds_expression, value))
    return _is_expression(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _explain(error: Any, path: str) -> Iterator[Problem]:
    """An error of the library as problems, each of one thing."""
    at = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.relative_path)
    rule, value = error.validator_value, error.instance
    own = error.schema.get("x-outrider-message") if isinstance(error.schema, Mapping) else None
    if isinstance(own, str) and error.validator in _UNSPEAKABLE:
        yield Problem(own.replace("{value}", _shown(value)), at)
        return
    match error.validator:
        case "required":
            for name in rule:
                # The library makes an error of each name; this is the one that speaks of `name`.
                if name not in value and error.message.startswith(repr(name)):
                    yield Problem("is required", f"{at}.{name}", hint=_describe(error.schema, name))
        case "additionalProperties" if rule is False:
            known = error.schema.get("properties", {})
            patterns = error.schema.get("patternProperties", {})
            for name in value:
                if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                    otherwise = f"there are {listing(known, 20)}" if known else "none is taken here"
                    hint = did_you_mean(name, known, otherwise=otherwise)
                    yield Problem("unknown parameter", f"{at}.{name}", hint=hint)
        case "anyOf" | "oneOf" if _required_only(rule):
            choices = ", ".join(" with ".join(branch["required"]) for branch in rule)
            count = "exactly one" if error.validator == "oneOf" else "at least one"
            yield Problem(f"give {count} of {choices}", at)
        case "anyOf" | "oneOf" if error.context:
            yield from _explain_branches(error, at)
        case "type":
            yield Problem(f"must be {_either(rule)}, not {_shown(value)}", at, hint=_quote_hint(rule, value))
        case "enum":
            words = [str(word) for word in rule]
            hint = did_you_mean(str(value), words, otherwise=f"it is one of {listing(words, 20)}")
            yield Problem(f"{_shown(value)} is not known here", at, hint=hint)
        case "const":
            yield Problem(f"must be {_shown(rule)}, not {_shown(value)}", at)
        case "pattern":
            example = "an absolute path, as in /data/file" if rule == "^/" else f"a text that matches {rule}"
            yield Problem(f"must be {example}, not {_shown(value)}", at)
        case "minimum":
            yield Problem(f"must be {rule} at least, not {_shown(value)}", at)
        case "maximum":
            yield Problem(f"must be {rule} at most, not {_shown(value)}", at)
        case "exclusiveMinimum":
            yield Problem(f"must be more than {rule}, not {_shown(value)}", at)
        case "exclusiveMaximum":
            yield Problem(f"must be less than {rule}, not {_shown(value)}", at)
        case "minLength" | "minItems" | "minProperties":
            empty = "must not be empty" if rule == 1 else f"must have {rule} {_parts(error.validator)} at least"
            yield Problem(empty, at)
        case "maxLength" | "maxItems" | "maxProperties":
            yield Problem(f"must have {rule} {_parts(error.validator)} at most", at)
        case _:
            yield Problem(error.message[:300], at)


def _explain_branches(error: Any, at: str) -> Iterator[Problem]:
    """Of alternatives, the one that was most likely meant: the one whose errors lie deepest, and then the fewest."""
    branches: dict[int, list[Any]] = {}
    for inner in error.context:
        branches.setdefault(inner.relative_schema_path[0], []).append(inner)
    kinds = [
        inner.validator_value
        for inners in branches.values()
        for inner in inners
        if inner.validator == "type" and not inner.relative_path
    ]
    if len(kinds) == len(branches):  # none has even the right type
        words = sorted({word for kind in kinds for word in ([kind] if isinstance(kind, str) else kind)} - {"null"})
        yield Problem(
            f"must be {_either(words)}, not {_shown(error.instance)}", at, hint=_quote_hint(words, error.instance)
        )
        return

    def likeness(inners: list[Any]) -> tuple[bool, int, int]:
        wrong_type = any(inner.validator in ("type", "const") and not inner.relative_path for inner in inners)
        wrong_kind = any(inner.validator in ("const", "enum") for inner in inners)  # a discriminator says no
        return wrong_type, wrong_kind, len(inners)

    for inner in min(branches.values(), key=likeness):
        yield from _explain(inner, at)


def _either(kinds: str | Iterable[str]) -> str:
    words = [_TYPES.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return " or ".join(words)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return short(value) if isinstance(value, str) else f"the number {value}"


def _quote_hint(rule: Any, value: Any) -> str:
    wants_text = rule == "string" or (isinstance(rule, list) and "string" in rule)
    return "quote it to make it text" if wants_text and isinstance(value, int | float) else ""


def _parts(keyword: str) -> str:
    return {"Length": "characters", "Items": "items"}.get(keyword[3:], "entries")


def _describe(schema: Mapping[str, Any], name: str) -> str:
    """What a missing parameter would be, as its schema has it."""
    properties = schema.get("properties")
    inner = properties.get(name, {}) if isinstance(properties, Mapping) else {}
    if not isinstance(inner, Mapping):
        return ""
    if isinstance(inner.get("description"), str):
        return " ".join(inner["description"].split())[:160]
    kind = inner.get("type")
    return _TYPES.get(kind, "") if isinstance(kind, str) else ""

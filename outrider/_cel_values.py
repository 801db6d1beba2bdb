"""Values on their way into CEL and out of it, and the functions that its standard library lacks."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from outrider._cel_lexer import Reference, quote
from outrider.errors import PermanentError

MAX_RESULT = 64 * 1024
"""Characters of a text, and bytes of JSON of a list or mapping, that an expression may come to."""
MAX_DATA_DEPTH = 64


# --- what goes in -----------------------------------------------------------------------------------------------


def narrow(context: Mapping[str, Any], wanted: Iterable[Reference], text: str) -> dict[str, Any]:
    """The part of the context that the expression can reach, checked for what the library would get wrong:
    it turns integers over 64 bits into floats without a word, and follows nesting on the machine's stack."""
    data: dict[str, Any] = {}
    for reference in wanted:
        if context.get(reference.root) is None:
            data.setdefault(reference.root, {})
            continue
        value = context[reference.root]
        if len(reference) > 1 and isinstance(value, Mapping):
            part = data.setdefault(reference.root, {})
            if reference[1] in value and isinstance(part, dict):
                part[reference[1]] = _checked(value[reference[1]], text)
    # A bare root (`"x" in args`, `args[object.name]`) needs the whole of it, whatever was taken of it before.
    for reference in wanted:
        if context.get(reference.root) is not None and (
            len(reference) == 1 or not isinstance(context[reference.root], Mapping)
        ):
            data[reference.root] = _checked(context[reference.root], text)
    return data


def _checked(value: Any, text: str, depth: int = 0) -> Any:
    if depth > MAX_DATA_DEPTH:
        raise PermanentError(
            f"the expression {quote(text)} reads data nested deeper than {MAX_DATA_DEPTH} levels",
            code="expression_failed",
        )
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if not value.isascii() else value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise PermanentError(
                f"the expression {quote(text)} reads the number {str(value)[:40]}, which does not fit 64 bits",
                code="expression_failed", hint="keep it as text",
            )  # fmt: skip
        return value
    if isinstance(value, Mapping):
        return {str(key): _checked(item, text, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item, text, depth + 1) for item in value]
    raise PermanentError(
        f"the expression {quote(text)} reads a value of type {type(value).__name__}, which is not JSON",
        code="expression_failed",
    )


# --- what comes out ---------------------------------------------------------------------------------------------


def json_value(value: Any, text: str) -> Any:
    plain = _plain(value, text)
    if isinstance(plain, str):
        size = len(plain)
    elif isinstance(plain, list | dict):
        size = len(json.dumps(plain))
    else:
        return plain
    if size > MAX_RESULT:
        raise PermanentError(
            f"the expression {quote(text)} comes to {size:,} characters", code="expression_failed",
            hint=f"{MAX_RESULT:,} is the most",
        )  # fmt: skip
    return plain


def _plain(value: Any, text: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise PermanentError(f"the expression {quote(text)} comes to {value}", code="expression_failed")
    if isinstance(value, dt.datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, dt.timedelta):
        return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".") + "s"
    if isinstance(value, Mapping):
        return {str(key): _plain(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, text) for item in value]
    raise PermanentError(
        f"the expression {quote(text)} comes to a value of type {type(value).__name__}, which is not JSON",
        code="expression_failed",
    )


# --- functions that CEL's standard library lacks ------------------------------------------------------------------


def _string(value: Any) -> str:
    """What the library's own string() leaves out: booleans and null."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    raise TypeError("string() takes no list or mapping")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}() takes texts, not {type(value).__name__}")
    return value


def _replace(text: str, old: str, new: str) -> str:
    text, old, new = (_text("replace", value) for value in (text, old, new))
    if len(text) + text.count(old) * len(new) > MAX_RESULT:
        raise ValueError(f"replace() would make more than {MAX_RESULT:,} characters")
    return text.replace(old, new)


def _split(text: str, separator: str) -> list[str]:
    if not _text("split", separator):
        raise ValueError("split() needs something to split at")
    return _text("split", text).split(separator)


def _join(items: list[str], separator: str = "") -> str:
    if not isinstance(items, list):
        raise TypeError("join() takes a list of texts")
    if sum(len(_text("join", item)) for item in items) + len(items) * len(_text("join", separator)) > MAX_RESULT:
        raise ValueError(f"join() would make more than {MAX_RESULT:,} characters")
    return separator.join(items)


_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_UPPER = {code: code - 32 for code in range(ord("a"), ord("z") + 1)}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "string": _string,
    "lowerAscii": lambda text: _text("lowerAscii", text).translate(_LOWER),
    "upperAscii": lambda text: _text("upperAscii", text).translate(_UPPER),
    "trim": lambda text: _text("trim", text).strip(),
    "replace": _replace,
    "split": _split,
    "join": _join,
}

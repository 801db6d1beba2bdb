"""Which paths of a tree are meant: patterns to include and to exclude, read as in .gitignore, without its ``!``.

A path is relative, with slashes, and has no slash at its end. A pattern without a slash (but at its end) is compared
with every part of the path, one with a slash with the path from its beginning; what matches a folder matches all that
is below it. ``*`` stands for anything but a slash, ``?`` for one character but a slash, ``[a-z]`` for one of a class,
``**`` as a whole part for any number of parts.

    >>> Selection(exclude=["*.log", "/cache/", "maps/**/old"]).wants("maps/dm1/old/a.bsp")
    False
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from outrider_stepkit.step import StepFailure


class Selection:
    """What is wanted: all that an ``include`` matches, or everything without one, less what an ``exclude`` matches."""

    def __init__(self, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        """Raises StepFailure for a pattern that can't be one."""
        self._include = _compiled(include)
        self._exclude = _compiled(exclude)

    def wants(self, path: str) -> bool:
        if self._exclude and self._exclude.match(path):
            return False
        return self._include is None or self._include.match(path) is not None


def _compiled(patterns: Iterable[str]) -> re.Pattern[str] | None:
    expressions = [expression(pattern) for pattern in patterns]
    return re.compile("|".join(f"(?:{each})" for each in expressions), re.DOTALL) if expressions else None


def expression(pattern: str) -> str:
    """The regular expression of one pattern, to be matched with a path from its beginning."""
    text = pattern.rstrip("/")
    anchored = "/" in text
    parts = [part for part in text.split("/") if part]
    if not parts or "\0" in text or any(part in (".", "..") for part in parts):
        raise StepFailure(
            f"{pattern!r} is not a pattern of paths: it reads like '*.log' or 'maps/**/*.bsp'", code="bad_pattern"
        )
    pieces: list[str] = [] if anchored else ["(?:[^/]+/)*"]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            pieces.append("[^/]+(?:/[^/]+)*" if last else "(?:[^/]+/)*")
        else:
            pieces.append(_part(part, pattern) + ("" if last else "/"))
    return "".join(pieces) + "(?:/.*)?\\Z"


def _part(part: str, pattern: str) -> str:
    out: list[str] = []
    at = 0
    while at < len(part):
        char = part[at]
        at += 1
        if char == "*":
            if not out or out[-1] != "[^/]*":  # several in a row would make the matching slow
                out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[" and (end := part.find("]", at + 1 + (part[at : at + 1] == "!"))) > 0:
            members, negated = part[at:end], ""
            if members[0] == "!":
                members, negated = members[1:], "^/"
            members = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
            try:
                re.compile(f"[{negated}{members}]")
            except re.error:
                raise StepFailure(f"{pattern!r} has a class that ends before it begins", code="bad_pattern") from None
            out.append(f"[{negated}{members}]")
            at = end + 1
        else:
            out.append(re.escape(char))
    return "".join(out)

"""Which entries are meant: include, exclude and strip_components."""

from __future__ import annotations

import re
from collections.abc import Iterable

from archiving.names import Names, Parts


def pattern(text: str) -> str:
    """A regular expression for a pattern over whole paths: ``*`` and ``?`` stay within a folder, ``**`` does not.

    A pattern names a folder with all that is in it. One without a slash (but at its end) means any folder's entry of
    that name, as in a .gitignore.
    """
    body = text.strip("/")
    expression = "" if "/" in text.rstrip("/") else r"(?:.*/)?"
    position = 0
    while position < len(body):
        if body.startswith("**/", position):
            expression += r"(?:.*/)?"
            position += 3
        elif body.startswith("**", position):
            expression += ".*"
            position += 2
        else:
            letter = body[position]
            expression += {"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter))
            position += 1
    return rf"{expression}(?:/.*)?"


class Patterns:
    """Whether a path is among what is included (all, if nothing is named) and not excluded."""

    def __init__(self, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        self._include = _compiled(include)
        self._exclude = _compiled(exclude)
        self.all = self._include is None and self._exclude is None

    def take(self, path: str) -> bool:
        if self._exclude is not None and self._exclude.fullmatch(path):
            return False
        return self._include is None or self._include.fullmatch(path) is not None

    def leaves_out(self, path: str) -> bool:
        """Whether the folder ``path`` is excluded with all that is in it."""
        return self._exclude is not None and self._exclude.fullmatch(path) is not None


def _compiled(patterns: Iterable[str]) -> re.Pattern[str] | None:
    found = [pattern(text) for text in patterns]
    return re.compile("|".join(f"(?:{one})" for one in found), re.DOTALL) if found else None


class Choice:
    """Where an entry of an archive goes, if anywhere. Every name is vetted first, whether it is chosen or not."""

    def __init__(
        self, *, strip: int = 0, include: Iterable[str] = (), exclude: Iterable[str] = (), max_depth: int = 128
    ) -> None:
        self._strip = strip
        self._patterns = Patterns(include, exclude)
        self._names = Names(max_depth)

    def parts(self, name: str, *, backslash: bool) -> Parts | None:
        """The path below the target; ``()`` for the target itself, None for what is left out."""
        parts = self._names.parts(name, backslash=backslash)
        if not self._patterns.all and parts and not self._patterns.take("/".join(parts)):
            return None
        if self._strip == 0:
            return parts
        return parts[self._strip :] or None

    def stripped(self, name: str, *, backslash: bool) -> Parts:
        """Where the target of a hard link was unpacked to, if it was."""
        return self._names.parts(name, backslash=backslash)[self._strip :]

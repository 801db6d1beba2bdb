"""Dotenv files, as `outrider env set --from-file` reads them."""

from __future__ import annotations

import re

from outrider.errors import InvalidInput, Problem

_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "$": "$", "`": "`"}


def parse(text: str, source: str) -> dict[str, str]:
    """Names and values of a dotenv text.

    ``NAME=value`` a line, ``export`` before it allowed, ``#`` begins a comment on a line of its own or after a
    space. ``'…'`` is taken as it stands, ``"…"`` knows ``\\n \\r \\t \\\\ \\" \\$``; both may go over several lines.
    Nothing is substituted. Raises InvalidInput with every problem; no value is ever repeated in it.
    """
    values: dict[str, str] = {}
    problems: list[Problem] = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    number = 0
    while number < len(lines):
        line, start = lines[number], number + 1
        number += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _ASSIGNMENT.match(line)
        if not found:
            problems.append(Problem("this is not NAME=value", line=start))
            continue
        name, rest = found[1], line[found.end() :]
        if rest[:1] in ("'", '"'):
            # A key's PEM goes over many lines: read on until the quote is closed.
            while (closed := _quoted(rest)) is None and number < len(lines):
                rest += "\n" + lines[number]
                number += 1
            if closed is None:
                problems.append(Problem(f"the quote of {name} is never closed", line=start))
                break
            value, tail = closed
            if tail.strip() and not tail.lstrip().startswith("#"):
                problems.append(Problem(f"something follows the closing quote of {name}", line=start))
        else:
            value = re.split(r"(?:^|\s)#", rest, maxsplit=1)[0].strip()
        if name in values:
            problems.append(Problem(f"{name} is given twice", line=start))
        values[name] = value
    if problems:
        raise InvalidInput(f"{source} is not a dotenv file", problems)
    return values


def _quoted(text: str) -> tuple[str, str] | None:
    """The value in the quotes that ``text`` begins with, and what follows; None if they are not closed."""
    if text[0] == "'":
        end = text.find("'", 1)
        return None if end < 0 else (text[1:end], text[end + 1 :])
    value: list[str] = []
    position = 1
    while position < len(text):
        character = text[position]
        if character == '"':
            return "".join(value), text[position + 1 :]
        if character == "\\" and position + 1 < len(text):
            following = text[position + 1]
            value.append(_ESCAPES.get(following, "\\" + following))
            position += 2
            continue
        value.append(character)
        position += 1
    return None

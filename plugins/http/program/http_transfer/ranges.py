"""What a server says about its content: its length, its version, and which part of it an answer has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """What a 206 carries: the bytes from ``start`` to ``end`` (not included) of ``total`` (None: not said)."""

    start: int
    end: int
    total: int | None


def part_of(headers: Message) -> Part | None:
    """Content-Range (RFC 9110, 14.4), or None if it makes no sense."""
    given = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if given is None:
        return None
    start, end = int(given[1]), int(given[2]) + 1
    total = None if given[3] == "*" else int(given[3])
    if start >= end or (total is not None and end > total):
        return None
    return Part(start, end, total)


def continues(headers: Message, start: int, total: int, etag: str | None) -> bool:
    """Whether a 206 begins exactly at ``start`` of the content that is known."""
    part = part_of(headers)
    if part is None or part.start != start or part.total not in {None, total} or part.end > total:
        return False
    return headers.get("ETag") in {None, etag}


def range_header(start: int, end: int | None = None) -> str:
    """The bytes from ``start`` to ``end`` (not included; None: to the last one)."""
    return f"bytes={start}-{'' if end is None else end - 1}"


def strong_validator(headers: Message) -> str | None:
    """What If-Range may carry (RFC 9110, 13.1.5), or None: then what was cut has to start over."""
    if headers.get("Accept-Ranges", "").strip().lower() == "none":
        return None
    etag = headers.get("ETag")
    if etag:
        return None if etag.startswith("W/") else etag
    modified = headers.get("Last-Modified")
    # A date is only strong when it is not as young as the answer: it has a resolution of a second.
    return modified if modified and modified != headers.get("Date") else None

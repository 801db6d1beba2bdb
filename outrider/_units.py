"""Sizes and durations as people write them: `5GiB`, `1h30m`."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)")
_SIZE_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", 1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", 1)},
    "kB": 1000,
}
_DURATION_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

SIZE_HINT = "a size reads like 512MiB or 5GiB"
DURATION_HINT = "a duration reads like 30s, 10m, 1h30m or 2d"


def parse_size(text: str) -> int:
    """Bytes of `5GiB`, `1.5 MB`, `4096`. Raises ValueError with a sentence."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError(f"{text[:60]!r} is not a size; {SIZE_HINT}")
    size = round(float(match[1]) * _SIZE_UNITS[match[2]]) if "." in match[1] else int(match[1]) * _SIZE_UNITS[match[2]]
    if size >= 2**63:
        raise ValueError(f"{text[:60]!r} is more than any disk holds; {SIZE_HINT}")
    return size


def parse_duration(text: str) -> float:
    """Seconds of `500ms`, `90s`, `1h30m`, `2d`; a unit is always needed. Raises ValueError with a sentence."""
    rest, total = text.strip(), 0.0
    if not rest or len(rest) > 60:
        raise ValueError(f"{text[:60]!r} is not a duration; {DURATION_HINT}")
    while rest:
        match = _DURATION_PART.match(rest)
        if match is None:
            raise ValueError(f"{text[:60]!r} is not a duration; {DURATION_HINT}")
        total += float(match[1]) * _DURATION_UNITS[match[2]]
        rest = rest[match.end() :]
    return total

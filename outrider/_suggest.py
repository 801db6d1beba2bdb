"""'Did you mean': the known word nearest to the one that was written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "", prefix: str = "") -> str:
    """A hint, or ``otherwise`` where nothing is near. Long words are not compared: that takes quadratic time.

    ``prefix``: what all of them begin with, so that it makes none of them nearer.
    """
    if len(word) <= 100:
        bare = [each.removeprefix(prefix) for each in list(known)[:500]]
        near = difflib.get_close_matches(word.removeprefix(prefix), bare, n=1, cutoff=0.6)
        if near:
            return f"did you mean {prefix}{near[0]}?"
    return otherwise


def listing(words: Iterable[str], limit: int = 12) -> str:
    """`a, b, c`, cut after ``limit``."""
    names = sorted(words)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

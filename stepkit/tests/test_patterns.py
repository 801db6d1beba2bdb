"""Patterns of paths."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_stepkit import Selection, StepFailure

NAMES = st.text("ab.*[]!?-^", min_size=1, max_size=5).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.log", "a.log", True),
        ("*.log", "deep/er/a.log", True),
        ("*.log", "a.log.gz", False),
        ("cache", "a/cache/b/c", True),
        ("cache/", "a/cache/b", True),
        ("/cache", "cache/b", True),
        ("/cache", "a/cache", False),
        ("maps/*.bsp", "maps/dm1.bsp", True),
        ("maps/*.bsp", "maps/deep/dm1.bsp", False),
        ("maps/*.bsp", "more/maps/dm1.bsp", False),
        ("maps/**/*.bsp", "maps/dm1.bsp", True),
        ("maps/**/*.bsp", "maps/a/b/dm1.bsp", True),
        ("**/old", "old", True),
        ("**/old", "a/b/old/c", True),
        ("logs/**", "logs/a/b", True),
        ("logs/**", "logs", False),
        ("**", "anything/at/all", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[!a]x", "/x", False),
        ("a[", "a[", True),
        ("a+b", "aab", False),
        ("ü*", "übung", True),
        ("a\nb", "a\nb", True),
    ],
)
def test_patterns_are_read_as_in_gitignore(pattern: str, path: str, expected: bool) -> None:
    assert Selection(include=[pattern]).wants(path) is expected
    assert Selection(exclude=[pattern]).wants(path) is not expected


def test_exclude_wins_and_without_include_everything_is_wanted() -> None:
    chosen = Selection(include=["*.cfg", "maps"], exclude=["secret.cfg"])
    assert [path for path in ("a.cfg", "maps/x", "x", "d/secret.cfg") if chosen.wants(path)] == ["a.cfg", "maps/x"]
    assert Selection().wants("x")


@pytest.mark.parametrize("pattern", ["", "/", "a/../b", ".", "[z-a]", "a\0b"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(StepFailure, match=r"pattern|class"):
        Selection(exclude=[pattern])


@given(path=PATHS)
def test_a_path_quoted_matches_itself_and_what_is_below(path: str) -> None:
    quoted = "/" + "".join(f"[{char}]" if char in "*?[" else char for char in path)
    chosen = Selection(include=[quoted])
    assert chosen.wants(path)
    assert chosen.wants(f"{path}/below")
    assert not chosen.wants(f"{path}x")


@given(name=st.text("ab.", min_size=1, max_size=6), pattern=st.text("ab.*?", min_size=1, max_size=6))
def test_one_part_is_what_the_shell_makes_of_it(name: str, pattern: str) -> None:
    if pattern in (".", "..") or pattern == "**" or name in (".", ".."):
        return
    assert Selection(include=[pattern]).wants(name) is fnmatch.fnmatchcase(name, pattern)

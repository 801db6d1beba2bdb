"""Names and links, by property: whatever is accepted stays below the root."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from outrider_step_archive import ExtractParams
from outrider_stepkit import StepFailure

PROGRAM = str(Path(__file__).parents[1] / "program")


@pytest.fixture(scope="module")
def names() -> Iterator[ModuleType]:
    sys.path.insert(0, PROGRAM)
    try:
        yield importlib.import_module("archiving.names")
    finally:
        sys.path.remove(PROGRAM)


@pytest.fixture(scope="module")
def trees(names: ModuleType) -> ModuleType:
    sys.path.insert(0, PROGRAM)
    try:
        return importlib.import_module("archiving.tree")
    finally:
        sys.path.remove(PROGRAM)


def test_what_is_packed_is_unpacked_by_default(names: ModuleType) -> None:
    params = ExtractParams.model_validate({"from": "/a", "to": "/b"})
    assert params.max_depth == names.MAX_DEPTH


PIECES = st.sampled_from(["..", ".", "", "a", "b", "c:", "\\", "..\\..", "a\\..", "\0", "é", "\udcff", " "])
NAMES = st.lists(PIECES, min_size=1, max_size=6).map("/".join) | st.text(max_size=20)


@given(name=NAMES, backslash=st.booleans())
@example(name="a/../../b", backslash=False)
@example(name="..\\x", backslash=True)
def test_accepted_name_stays_below(names: ModuleType, name: str, backslash: bool) -> None:
    try:
        parts = names.safe_parts(name, backslash=backslash)
    except StepFailure:
        return
    root = "/volume/target"
    path = os.path.normpath(os.path.join(root, *parts))
    assert path == root or path.startswith(root + "/")
    assert not any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts)


LINK_PARTS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map(tuple)
TARGETS = st.lists(st.sampled_from(["..", "a", "b", "c", "."]), min_size=1, max_size=6).map("/".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(links=st.lists(st.tuples(LINK_PARTS, TARGETS), min_size=1, max_size=6))
@example(links=[(("a", "b", "c"), "../.."), (("b",), "a/b/c/..")])
@example(links=[(("a",), "."), (("b",), "a/..")])
def test_no_set_of_accepted_links_leads_out(
    trees: ModuleType, tmp_path_factory: pytest.TempPathFactory, links: list[tuple[tuple[str, ...], str]]
) -> None:
    """The kernel is the judge: real links, really resolved."""
    root = tmp_path_factory.mktemp("tree") / "root"
    root.mkdir()
    with trees.Tree(root, trees.Limits(max_bytes=1, max_entries=100), symlinks="keep") as tree:
        for parts, target in links:
            with contextlib.suppress(StepFailure):
                tree.symlink("/".join(parts), parts, target)
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                continue
            try:
                where = os.path.realpath(path, strict=True)
            except OSError:
                where = os.path.realpath(path)  # dangling, or a circle
            assert where == str(root) or where.startswith(f"{root}/")
